"""Canonical correlations against scikit-learn, angles between subspaces, closed forms, and what is declared."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from localsim.analysis.similarity.canonical import MEASURES, cca, pwcca, svcca, svcca_measure
from localsim.analysis.similarity.measure import Numerics
from localsim.errors import UserError

F64 = Numerics(torch.device("cpu"), torch.float64)
FUNCTIONS = dict(zip([measure.name for measure in MEASURES], (cca, svcca, pwcca), strict=True))
each = pytest.mark.parametrize("name", FUNCTIONS)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def related(n=60, p=6, q=9, seed=0):
    """Return two layers that are mixtures of common causes, with noise of their own."""
    causes = normal(n, 3, seed=seed)
    mix = [causes @ normal(3, w, seed=seed + k) + 0.7 * normal(n, w, seed=seed + 9 + k) for k, w in ((1, p), (2, q))]
    return mix[0] + 2, mix[1] - 1


def with_correlations(rho, n=80, seed=0):
    """Return two layers with exactly these canonical correlations, in canonical coordinates."""
    k = len(rho)
    rows = normal(n, 2 * k, seed=seed)
    rows = np.linalg.qr(rows - rows.mean(0))[0]
    return rows[:, :k], rows[:, :k] * rho + rows[:, k:] * np.sqrt(1 - np.square(rho))


def cosines(x, y):
    return np.cos(linalg.subspace_angles(x - x.mean(0), y - y.mean(0)))


def by_eigenvalues(x, y):
    """Return canonical correlations and variates of x, largest first, from covariances (Hotelling 1936)."""
    x, y = x - x.mean(0), y - y.mean(0)
    cross = x.T @ y
    values, vectors = linalg.eigh(cross @ np.linalg.solve(y.T @ y, cross.T), x.T @ x)
    variates = x @ vectors[:, ::-1]
    return np.sqrt(values[::-1].clip(0)), variates / np.linalg.norm(variates, axis=0)


def kept(x, share):
    """Return the coordinates on the fewest principal axes with this share of variance."""
    x = x - x.mean(0)
    left, sizes, _ = np.linalg.svd(x, full_matrices=False)
    number = int(np.argmax(np.cumsum(sizes**2) / (sizes**2).sum() >= share)) + 1
    return left[:, :number] * sizes[:number]


@pytest.mark.parametrize("seed", range(3))
def test_cca_is_the_mean_cosine_of_angles_between_subspaces(seed):
    x, y = related(seed=seed)
    assert cca(x, y) == pytest.approx(cosines(x, y).mean(), abs=1e-10)
    assert cca(x, y) == pytest.approx(by_eigenvalues(x, y)[0].mean(), abs=1e-10)


def test_cca_is_that_of_scikit_learn():
    module = pytest.importorskip("sklearn.cross_decomposition")
    x, y = related(n=200, p=3, q=4)
    a, b = module.CCA(n_components=3, max_iter=10_000, tol=1e-12).fit_transform(x, y)
    theirs = np.mean([np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(3)])
    assert cca(x, y) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("q", [9, 5])
def test_pwcca_weights_by_the_projections_of_the_first_layer(seed, q):
    x, y = related(seed=seed, q=q)
    rho, variates = by_eigenvalues(x, y)
    weights = np.abs(variates.T @ (x - x.mean(0))).sum(1)
    number = min(6, q)
    expected = (weights * rho)[:number].sum() / weights[:number].sum()
    assert pwcca(x, y) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("share", [0.99, 0.8])
@pytest.mark.parametrize("p", [6, 100])
def test_svcca_is_cca_of_the_principal_directions(share, p):
    x, y = related(p=p)
    expected = cosines(kept(x, share), kept(y, share)).mean()
    assert svcca(x, y, variance=share) == pytest.approx(expected, abs=1e-8)


def test_svcca_keeps_no_direction_too_many_where_a_share_is_met_exactly():
    rows = normal(50, 6)
    rows = np.linalg.qr(rows - rows.mean(0))[0]
    x, y = rows[:, :4], rows[:, [0, 1, 2, 5]] * [1, 1, 1, 1e-3]
    assert svcca(y, y[:, :3], variance=0.99) == pytest.approx(1, abs=1e-12)
    assert svcca_measure(variance=0.5).transform(torch.from_numpy(x)).basis.shape == (50, 2)


def test_closed_forms():
    rho = np.array([0.9, 0.6, 0.2])
    x, y = with_correlations(rho)
    assert cca(x, y) == pytest.approx(rho.mean(), abs=1e-12)
    assert svcca(x, y) == pytest.approx(rho.mean(), abs=1e-12)
    sizes = np.array([1.0, 2, 5])  # each canonical variate is one feature, so that its weight is the feature's size
    assert pwcca(x * sizes, y) == pytest.approx(rho @ sizes / sizes.sum(), abs=1e-12)
    assert pwcca(y * sizes, x) == pytest.approx(rho @ sizes / sizes.sum(), abs=1e-12)
    assert cca(x, x[:, :1]) == pytest.approx(1, abs=1e-12)  # over the smaller number of directions


def test_features_that_never_vary_or_repeat_others_do_not_count():
    x, y = related()
    more = np.concatenate([x, np.zeros((60, 3)), np.full((60, 1), 7.0), x[:, :2] - x[:, 2:4]], axis=1)
    for dtype in ("float32", "float64"):
        assert cca(more, y, dtype=dtype) == pytest.approx(cca(x, y), abs=1e-5)
        # rounding of float32 features is no direction of theirs, in whatever precision it is looked at
        assert cca(more.astype(np.float32), y, dtype=dtype) == pytest.approx(cca(x, y), abs=1e-5)


@each
def test_identical_layers_score_one_and_unrelated_ones_less_with_more_images(name):
    x, y = related()
    measure = FUNCTIONS[name]
    assert measure(x, x) == pytest.approx(1, abs=1e-12)
    assert measure(x, y) < 0.95
    few, many = (measure(normal(n, 5), normal(n, 5, seed=1)) for n in (20, 2000))
    assert many < 0.06 < 0.2 < few


def test_unrelated_layers_score_by_the_quarter_circle_law():
    expected = 8 / (3 * np.pi) * np.sqrt(60 / 3000)
    assert cca(normal(3000, 60), normal(3000, 60, seed=1)) == pytest.approx(expected, rel=0.03)


@each
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), factor=st.floats(1e-2, 1e2), side=st.integers(0, 1))
def test_declared_invariances_hold(name, seed, factor, side):
    measure = FUNCTIONS[name]
    declared = next(m.invariances for m in MEASURES if m.name == name)
    layers = related(seed=seed)
    value = measure(*layers)

    def changed(change):
        return measure(*(change(z) if index == side else z for index, z in enumerate(layers)))

    p = layers[side].shape[1]
    turn = np.linalg.qr(normal(p, p, seed=seed))[0]
    shear = turn * np.linspace(1, 5, p) @ np.linalg.qr(normal(p, p, seed=seed + 1))[0]
    assert {"translation", "scale"} <= declared
    assert changed(lambda z: z + normal(p, seed=seed)) == pytest.approx(value, abs=1e-9)
    assert changed(lambda z: z * factor) == pytest.approx(value, abs=1e-9)
    if "orthogonal" in declared:
        assert changed(lambda z: z @ turn) == pytest.approx(value, abs=1e-9)
    if "linear" in declared or (name == "pwcca" and side == 1):
        assert changed(lambda z: z @ shear) == pytest.approx(value, abs=1e-9)


def test_what_is_not_declared_changes_them():
    x, y = related()
    declared = {measure.name: measure.invariances for measure in MEASURES}
    assert declared["cca"] == {"translation", "scale", "orthogonal", "linear"}
    assert declared["svcca"] == declared["cca"] - {"linear"}
    assert declared["pwcca"] == {"translation", "scale"}
    assert abs(svcca(x * [100, 100, 1, 1, 1, 1], y) - svcca(x, y)) > 0.01
    turn = np.linalg.qr(normal(6, 6))[0]
    assert abs(pwcca(x @ turn, y) - pwcca(x, y)) > 1e-4
    assert abs(pwcca(x * [9, 1, 1, 1, 1, 1], y) - pwcca(x, y)) > 1e-3


def test_only_pwcca_depends_on_the_order():
    x, y = related()
    assert cca(x, y) == pytest.approx(cca(y, x), abs=1e-12)
    assert svcca(x, y) == pytest.approx(svcca(y, x), abs=1e-12)
    assert abs(pwcca(x, y) - pwcca(y, x)) > 1e-3
    assert [measure.symmetric for measure in MEASURES] == [True, True, False]


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_some_of_the_images_are_as_if_only_they_had_been_represented(measure):
    images = np.sort(np.random.default_rng(1).permutation(60)[:30])
    pairs = [related(), related(p=100)] if measure.name == "svcca" else [related()]
    for x, y in pairs:
        a, b = (measure.transform(measure.take(measure.represent(z, F64), torch.from_numpy(images))) for z in (x, y))
        assert measure.compare(a, b) == pytest.approx(measure(x[images], y[images]), abs=1e-8)


@each
def test_float32_agrees_with_float64(name):
    x, y = related(n=300, p=30, q=40)
    measure = FUNCTIONS[name]
    assert measure(x + 10, y, dtype="float32") == pytest.approx(measure(x, y), abs=1e-4)


@pytest.mark.parametrize("measure", [cca, pwcca])
def test_as_many_features_as_images_is_refused(measure):
    y = normal(12, 3)
    with pytest.raises(
        UserError, match=r"p = 12 features of n = 12 images: .* 1 by construction; use svcca, or more than 13"
    ):
        measure(normal(12, 12), y)
    with pytest.raises(UserError, match=r"p = 11 dimensions spans all 11 that n = 12 images have.*use svcca"):
        measure(y, normal(12, 11))
    assert measure(normal(12, 10), y) < 1.0


def test_half_of_the_images_may_be_too_few():
    measure = MEASURES[0]
    rows = measure.represent(normal(30, 20), F64)
    with pytest.raises(UserError, match=r"p = 20 dimensions spans all 14 that n = 15 images have"):
        measure.transform(measure.take(rows, torch.arange(15)))


def test_svcca_refuses_where_every_direction_is_kept():
    with pytest.raises(UserError, match="use a smaller variance"):
        svcca(normal(12, 5000), normal(12, 3))
    assert 0 < svcca(normal(12, 5000), normal(12, 3), variance=0.5) < 1
    for variance in (0, 1, float("nan")):
        with pytest.raises(UserError, match="no share of variance"):
            svcca(*related(), variance=variance)


@each
def test_what_cannot_be_compared_raises_a_sentence(name):
    measure, (x, y) = FUNCTIONS[name], related()
    with pytest.raises(UserError, match="constant"):
        measure(np.ones((60, 3)), y)
    with pytest.raises(UserError, match="3 images are too few"):
        measure(x[:3], y[:3])
    with pytest.raises(UserError, match="NaN"):
        measure(x, y * np.nan)
    assert 0 <= measure(normal(4, 1), normal(4, 1, seed=1)) <= 1
