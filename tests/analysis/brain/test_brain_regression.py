"""Regressions from Gram matrices equal scikit-learn's from features."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from localsim.analysis.brain import regression
from localsim.analysis.brain.held_out import Regression, mean, median, weighted_correlation
from localsim.analysis.brain.regression import ALPHAS, Layer
from localsim.analysis.brain.splits import cross_validation
from localsim.errors import UserError

SHAPES = [(100, 300, 1), (100, 40, 20), (120, 500, 30), (60, 30, 90)]


def data(n: int, p: int, q: int, kind: str = "structured", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return features and neurons that depend on them; structured ones have a falling spectrum and a mean."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    if kind == "structured":
        x = x * np.arange(1, p + 1) ** -0.5 + rng.normal(size=p)
    return x, x @ rng.normal(size=(p, q)) * 0.5 + rng.normal(size=(n, q)) + 5


def theirs(method: str, components: int = 25):
    from sklearn.cross_decomposition import PLSRegression
    from sklearn.linear_model import Ridge, RidgeCV

    return {
        "pls": lambda: PLSRegression(components, scale=False),
        "ridge": lambda: Ridge(alpha=1),
        "ridgecv": lambda: RidgeCV(alphas=ALPHAS),
    }[method]()


@pytest.mark.parametrize("kind", ["random", "structured"])
@pytest.mark.parametrize(("n", "p", "q"), SHAPES)
@pytest.mark.parametrize("method", ["pls", "ridge", "ridgecv"])
def test_predictions_of_every_neuron(method, n, p, q, kind):
    x, y = data(n, p, q, kind)
    layer, own = Layer.of(x), Regression(method)
    for train, test in cross_validation(n)[:3]:
        expected = theirs(method).fit(x[train], y[train]).predict(x[test]).reshape(len(test), q)
        found = own.predict(layer, y, train, test)
        np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max())
        r = [pearsonr(a, b)[0] for a, b in zip(found.T, y[test].T, strict=True)]
        np.testing.assert_allclose(weighted_correlation(np.ones((1, len(test))), found, y[test])[0], r, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(25, 60),
    p=st.integers(5, 90),
    q=st.integers(1, 40),
    components=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_pls_of_any_shape(n, p, q, components, seed):
    x, y = data(n, p, q, seed=seed)
    kernel, across = Layer.of(x).fold(np.arange(n - 5), np.arange(n - 5, n))
    expected = theirs("pls", components).fit(x[:-5], y[:-5]).predict(x[-5:]).reshape(5, q)
    means = y[:-5].mean(0)
    found = across @ regression.pls(kernel, y[:-5] - means, components) + means
    np.testing.assert_allclose(found, expected, atol=1e-8 * np.abs(expected).max())


def test_pls_stops_where_scikit_learn_stops():
    """The loose tolerance is felt: neurons with two equally strong directions stop far from the singular vector."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 40))
    y = x[:, :10] + 0.1 * rng.normal(size=(80, 10))
    y /= np.linalg.norm(y - y.mean(0), axis=0)
    kernel, across = Layer.of(x).fold(np.arange(60), np.arange(60, 80))
    means = y[:60].mean(0)
    found = across @ regression.pls(kernel, y[:60] - means, 1) + means
    from sklearn.cross_decomposition import PLSRegression

    loose = PLSRegression(1, scale=False).fit(x[:60], y[:60]).predict(x[60:])
    tight = PLSRegression(1, scale=False, tol=1e-20, max_iter=100_000).fit(x[:60], y[:60]).predict(x[60:])
    assert np.abs(found - loose).max() < 1e-12 < 1e-6 < np.abs(loose - tight).max()


def test_pls_starts_from_the_first_neuron_that_varies():
    x, y = data(60, 80, 4)
    y[:, 0] = 2
    kernel, across = Layer.of(x).fold(np.arange(50), np.arange(50, 60))
    expected = theirs("pls", 5).fit(x[:50], y[:50]).predict(x[50:])
    means = y[:50].mean(0)
    np.testing.assert_allclose(across @ regression.pls(kernel, y[:50] - means, 5) + means, expected, atol=1e-10)


def test_pls_ends_where_features_are_exhausted():
    """With as many components as directions PLS is least squares; more change nothing."""
    rng = np.random.default_rng(0)
    x = np.hstack([rng.normal(size=(50, 6)), np.zeros((50, 30))]) @ np.linalg.qr(rng.normal(size=(36, 36)))[0]
    y = x @ rng.normal(size=(36, 3)) + rng.normal(size=(50, 3))
    kernel, _ = Layer.of(x).fold(np.arange(50), np.arange(50))
    fitted = kernel @ regression.pls(kernel, y - y.mean(0), 6) + y.mean(0)
    exact = np.linalg.lstsq(np.hstack([x, np.ones((50, 1))]), y, rcond=1e-10)[0]
    np.testing.assert_allclose(fitted, np.hstack([x, np.ones((50, 1))]) @ exact, atol=1e-10)
    more = kernel @ regression.pls(kernel, y - y.mean(0), 20) + y.mean(0)
    np.testing.assert_allclose(more, fitted, atol=1e-10)
    assert not regression.pls(kernel, np.zeros((50, 3)), 5).any()


def test_the_penalties_are_those_of_brain_score():
    assert len(ALPHAS) == 99 and ALPHAS[:6] == (0.01, 0.1, 0.5, 1.0, 10.0, 32.5) and ALPHAS[-1] == 1e7
    assert ALPHAS[8:10] == (100.0, 150.0) and list(ALPHAS) == sorted(ALPHAS)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 3.0, 100.0])
@pytest.mark.parametrize(("n", "p", "q"), SHAPES)
def test_the_penalty_is_the_one_that_scikit_learn_chooses(n, p, q, scale):
    x, y = data(n, p, q)
    fitted = theirs("ridgecv").fit(x * scale, y)
    kernel, _ = Layer.of(x * scale).fold(np.arange(n), np.arange(n))
    dual, alpha = regression.ridgecv(*regression.decompose(kernel), y - y.mean(0))
    assert alpha == fitted.alpha_
    np.testing.assert_allclose(kernel @ dual + y.mean(0), fitted.predict(x * scale).reshape(n, q), atol=1e-8)


def test_the_penalty_has_the_least_error_of_images_left_out():
    """From the definition: each image left out, the intercept fitted without it, for every penalty."""
    x, y = data(24, 30, 3)
    errors = []
    for alpha in ALPHAS:
        missed = []
        for image in range(24):
            kept = np.delete(np.arange(24), image)
            kernel, across = Layer.of(x).fold(kept, np.array([image]))
            means = y[kept].mean(0)
            missed.append(y[image] - across @ regression.ridge(kernel, y[kept] - means, alpha) - means)
        errors.append(np.square(missed).mean())
    kernel, _ = Layer.of(x).fold(np.arange(24), np.arange(24))
    assert regression.ridgecv(*regression.decompose(kernel), y - y.mean(0))[1] == ALPHAS[int(np.argmin(errors))]


def test_decompositions_are_kept_for_other_regions_only():
    x, y = data(60, 40, 3)
    regression._kept.cache_clear()
    for own in (y, y[:, ::-1]):
        for layer in (Layer.of(x),):
            for train, test in cross_validation(60)[:2]:
                Regression("ridgecv").predict(layer, own, train, test)
    assert regression._kept.cache_info().hits == 0, "another layer has other features"
    layer = Layer.of(x)
    found = [Regression("ridgecv").predict(layer, y, *cross_validation(60)[0]) for _ in range(2)]
    assert regression._kept.cache_info().hits == 1 and np.array_equal(*found)


def test_some_images_of_a_layer():
    x, y = data(60, 40, 3)
    places = np.random.default_rng(0).permutation(60)[:40]
    train, test = np.arange(30), np.arange(30, 40)
    part, whole = Layer.of(x).take(places), Layer.of(x[places])
    for method in ("pls", "ridge", "ridgecv"):
        found, expected = (Regression(method).predict(one, y[places], train, test) for one in (part, whole))
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_mapped_features_and_tensors(tmp_path):
    x, _ = data(40, 30, 3)
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = Layer.of(x.astype(np.float32).astype(np.float64))
    for given_x in (mapped, torch.from_numpy(x.astype(np.float32))):
        found = Layer.of(given_x)
        assert found.gram.dtype == np.float64 and found.features == 30
        np.testing.assert_allclose(found.gram, expected.gram, atol=1e-12)


def test_folds_are_scikit_learns():
    from sklearn.model_selection import ShuffleSplit, StratifiedShuffleSplit

    groups = [f"group {number % 3}" for number in range(40)]
    plain = ShuffleSplit(10, train_size=0.9, random_state=1).split(np.zeros(40))
    strata = StratifiedShuffleSplit(10, train_size=0.9, random_state=1).split(np.zeros(40), groups)
    for found, expected in ((cross_validation(40), plain), (cross_validation(40, groups), strata)):
        for (a, b), (c, d) in zip(found, expected, strict=True):
            assert np.array_equal(a, c) and np.array_equal(b, d)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"n": 19}, "19 images are too few .* allowed: 21 or more"),
        ({"n": 20}, "20 images are too few .* allowed: 21 or more"),
        ({"n": 40, "train_size": 1.5}, "train_size 1.5 is not possible"),
        ({"n": 40, "splits": 0}, "0 splits"),
        ({"n": 40, "groups": ["a"] * 39 + ["b"]}, "group 'b' has 1 image and"),
        ({"n": 40, "groups": [f"{number // 2}" for number in range(40)]}, "20 groups cannot all be among 36 .* 4 to"),
    ],
)
def test_folds_that_cannot_be(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        cross_validation(**arguments)


def test_features_that_do_not_vary_over_the_images_to_fit():
    x = np.zeros((30, 4))
    x[0] = 1
    with pytest.raises(UserError, match="constant"):
        Layer.of(x).fold(np.arange(1, 30), np.arange(1))
    with pytest.raises(UserError, match="constant"):
        Layer.of(np.ones((30, 4)))


@settings(deadline=None, max_examples=30)
@given(m=st.integers(4, 12), q=st.integers(1, 4), seed=st.integers(0, 999))
def test_weights_count_as_repeated_images(m, q, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(m, q)) + 100, rng.normal(size=(m, q))
    x[:, 0] = x[0, 0]
    y[: m // 2] = y[0]
    drawn = rng.integers(m, size=(5, m))
    counts = np.stack([np.bincount(one, minlength=m) for one in drawn]).astype(float)
    found = weighted_correlation(counts, x, y)
    for row, places in zip(found, drawn, strict=True):
        for column, r in enumerate(row):
            a, b = x[places, column], y[places, column]
            if (a == a[0]).all() or (b == b[0]).all():
                assert np.isnan(r)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of values that differ little from each other
                    assert r == pytest.approx(pearsonr(a, b)[0], abs=1e-8)


def test_averages_without_what_is_undefined():
    r = np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan], [1.0, 2.0, 4.0]])
    np.testing.assert_array_equal(median(r), [2, np.nan, 2])
    np.testing.assert_array_equal(mean(r), [1, 2, 3.5])
    np.testing.assert_array_equal(mean(np.full((2, 1), np.nan)), [np.nan])
    np.testing.assert_array_equal(median(r[2:]), [2])
