"""Procrustes distance against scipy, closed forms, and what it declares about itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, spatial

from localsim.analysis.similarity.measure import Numerics
from localsim.analysis.similarity.shape import MEASURES, procrustes, procrustes_measure
from localsim.errors import UserError

F64 = Numerics(torch.device("cpu"), torch.float64)
kinds = pytest.mark.parametrize("angular", [False, True], ids=["distance", "angle"])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def related(n=30, p=6, q=6, seed=0):
    """Return two layers that are mixtures of common causes, with noise of their own."""
    causes = normal(n, 3, seed=seed)
    return [causes @ normal(3, w, seed=seed + w + k) + 0.3 * normal(n, w, seed=seed + k) for k, w in ((1, p), (2, q))]


def unit(x):
    x = x - x.mean(0)
    return x / np.linalg.norm(x)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_is_left_after_scipy_turns_one_layer_to_the_other(seed):
    x, y = related(seed=seed)
    turn, overlap = linalg.orthogonal_procrustes(unit(y), unit(x))
    assert procrustes(x, y) == pytest.approx(np.linalg.norm(unit(x) - unit(y) @ turn), abs=1e-10)
    assert procrustes(x, y, angular=True) == pytest.approx(math.acos(overlap), abs=1e-10)
    assert spatial.procrustes(x, y)[2] == pytest.approx(1 - overlap**2, abs=1e-10)  # it rescales y to fit
    assert math.sin(procrustes(x, y, angular=True)) ** 2 == pytest.approx(spatial.procrustes(x, y)[2], abs=1e-10)


def test_layers_of_other_widths_are_compared_as_if_padded_with_zeros():
    x, y = related(p=4, q=9)
    padded = np.concatenate([x, np.zeros((30, 5))], axis=1)
    assert procrustes(x, y) == pytest.approx(procrustes(padded, y), abs=1e-10)
    turn, _ = linalg.orthogonal_procrustes(unit(y), unit(padded))
    assert procrustes(x, y) == pytest.approx(np.linalg.norm(unit(padded) - unit(y) @ turn), abs=1e-10)


def test_more_features_than_images_give_the_distance_of_the_features_themselves():
    x, y = related(n=20, p=50, q=80)
    overlap = np.linalg.svd(unit(x).T @ unit(y), compute_uv=False).sum()
    assert procrustes(x, y) == pytest.approx(math.sqrt(2 - 2 * overlap), abs=1e-8)


def test_layers_with_the_same_directions_have_a_closed_form():
    rows = normal(50, 4)
    rows = np.linalg.qr(rows - rows.mean(0))[0]
    s, t = np.array([1.0, 2, 3, 4]), np.array([4.0, 1, 1, 2])
    overlap = s @ t / np.sqrt((s @ s) * (t @ t))
    wide = np.linalg.qr(normal(90, 90, seed=3))[0][:4]
    assert procrustes(rows * s, (rows * t) @ wide, angular=True) == pytest.approx(math.acos(overlap), abs=1e-9)


@kinds
def test_layers_without_a_common_direction_are_as_far_apart_as_can_be(angular):
    rows = np.linalg.qr(normal(20, 8) - normal(20, 8).mean(0))[0]
    assert procrustes(rows[:, :4], rows[:, 4:], angular=angular) == pytest.approx(
        procrustes_measure(angular=angular).high, abs=1e-10
    )


@kinds
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("p", [6, 60])
def test_identical_and_turned_layers_are_at_zero(angular, dtype, p):
    x, y = related(p=p)
    turned = 5 * x @ np.linalg.qr(normal(p, p))[0] + 1
    assert procrustes(x, x, angular=angular, dtype=dtype) < 1e-7
    assert procrustes(x, turned, angular=angular, dtype=dtype) < (1e-3 if dtype == "float32" else 1e-6)
    assert procrustes(x, y, angular=angular, dtype=dtype) > 0.1


@kinds
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), factor=st.floats(1e-3, 1e3))
def test_declared_invariances_hold(angular, seed, factor):
    assert procrustes_measure(angular=angular).invariances == {"translation", "orthogonal", "scale"}
    x, y = related(seed=seed)
    value = procrustes(x, y, angular=angular)
    turn = np.linalg.qr(normal(6, 6, seed=seed))[0]
    assert procrustes(x + normal(6), y, angular=angular) == pytest.approx(value, abs=1e-9)
    assert procrustes(x @ turn, y, angular=angular) == pytest.approx(value, abs=1e-9)
    assert procrustes(x, y * factor, angular=angular) == pytest.approx(value, abs=1e-9)
    assert procrustes(y, x, angular=angular) == pytest.approx(value, abs=1e-12)


@kinds
def test_other_linear_maps_change_it(angular):
    x, y = related()
    stretched = x * np.array([9, 1, 1, 1, 1, 1])
    assert abs(procrustes(stretched, y, angular=angular) - procrustes(x, y, angular=angular)) > 0.01


@kinds
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), noise=st.floats(0.01, 3), widths=st.tuples(*[st.integers(1, 9)] * 3))
def test_the_triangle_inequality_holds(angular, seed, noise, widths):
    x = normal(12, widths[0], seed=seed)
    y = x @ normal(widths[0], widths[1], seed=seed + 1) + noise * normal(12, widths[1], seed=seed + 2)
    z = y @ normal(widths[1], widths[2], seed=seed + 3) + noise * normal(12, widths[2], seed=seed + 4)
    a, b, c = (procrustes(*pair, angular=angular) for pair in ((x, y), (y, z), (x, z)))
    assert c <= a + b + 1e-9


@kinds
@pytest.mark.parametrize("p", [6, 90])
def test_some_of_the_images_are_as_if_only_they_had_been_represented(angular, p):
    x, y = related(n=60, p=p)
    images = np.sort(np.random.default_rng(1).permutation(60)[:30])
    measure = procrustes_measure(angular=angular)
    a, b = (measure.transform(measure.take(measure.represent(z, F64), torch.from_numpy(images))) for z in (x, y))
    assert measure.compare(a, b) == pytest.approx(measure(x[images], y[images]), abs=1e-8)


@kinds
@pytest.mark.parametrize("p", [20, 200])
def test_float32_agrees_with_float64(angular, p):
    x, y = related(n=100, p=p, q=30)
    single = procrustes(x, y, angular=angular, dtype="float32")
    assert single == pytest.approx(procrustes(x, y, angular=angular), abs=1e-5)


def test_unrelated_layers_of_many_features_come_near_each_other():
    assert (
        procrustes(normal(20, 400), normal(20, 400, seed=1))
        < 0.5
        < procrustes(normal(400, 20), normal(400, 20, seed=1))
    )


@kinds
def test_what_cannot_be_compared_raises_a_sentence(angular):
    x, y = related()
    with pytest.raises(UserError, match="constant"):
        procrustes(np.ones((30, 3)), y, angular=angular)
    with pytest.raises(UserError, match="3 images are too few"):
        procrustes(x[:3], y[:3], angular=angular)
    with pytest.raises(UserError, match="NaN"):
        procrustes(x, y * np.nan, angular=angular)
    assert procrustes(x[:4], y[:4], angular=angular) >= 0


def test_both_distances_are_in_the_registry():
    assert [measure.name for measure in MEASURES] == ["procrustes", "procrustes_angular"]
    assert all(measure.metric and measure.kind == "distance" for measure in MEASURES)
