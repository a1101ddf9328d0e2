"""Partial least squares: predictions equal scikit-learn's, and the directions are the leading ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from localsim.analysis.similarity.latent import MEASURES, latent_prediction, leading, pls_predictivity
from localsim.analysis.similarity.prediction import Layer, predictivity
from localsim.errors import UserError


def layers(n: int, p: int, q: int, *, rank: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two layers that see the same sources, with a spectrum that falls as that of a network's layer does."""
    rng = np.random.default_rng(seed)
    sources = rng.normal(size=(n, rank)) * np.arange(1, rank + 1) ** -0.7
    x = sources @ rng.normal(size=(rank, p)) + 0.2 * rng.normal(size=(n, p)) + 3
    y = sources @ rng.normal(size=(rank, q)) + 0.2 * rng.normal(size=(n, q)) - 1
    return x, y


def fitted(x: np.ndarray, y: np.ndarray, new: np.ndarray, components: int) -> np.ndarray:
    parts = (torch.from_numpy(part) for part in (x - x.mean(0), y - y.mean(0), new - x.mean(0)))
    return latent_prediction(*parts, components=components).numpy() + y.mean(0)


@pytest.mark.parametrize(
    ("n", "p", "q", "components"),
    [(150, 60, 40, 25), (150, 60, 1, 10), (60, 200, 30, 25), (150, 30, 8, 30), (150, 60, 40, 1)],
    ids=["many targets", "one target", "more features than images", "all features", "one component"],
)
def test_predictions_equal_sklearns(n: int, p: int, q: int, components: int) -> None:
    cross_decomposition = pytest.importorskip("sklearn.cross_decomposition")
    x, y = layers(n + 20, p, q)
    reference = cross_decomposition.PLSRegression(components, scale=False, tol=1e-24, max_iter=100_000)
    reference.fit(x[:n], y[:n])
    expected = reference.predict(x[n:]).reshape(20, q)
    np.testing.assert_allclose(fitted(x[:n], y[:n], x[n:], components), expected, atol=1e-6)


def test_scores_are_of_sklearns_predictions_in_the_same_folds() -> None:
    cross_decomposition = pytest.importorskip("sklearn.cross_decomposition")
    x, y = layers(200, 60, 40)
    missed, total, medians = 0.0, 0.0, []
    for fold in Layer.of(torch.arange(200.0)[:, None], 5, 0).folds:
        test = fold.numpy()
        train = np.setdiff1d(np.arange(200), test)
        reference = cross_decomposition.PLSRegression(25, scale=False, tol=1e-20, max_iter=100_000)
        predicted = reference.fit(x[train], y[train]).predict(x[test])
        missed += ((y[test] - predicted) ** 2).sum()
        total += ((y[test] - y[train].mean(0)) ** 2).sum()
        medians.append(np.median([np.corrcoef(y[test, i], predicted[:, i])[0, 1] for i in range(40)]))
    assert predictivity(x, y, method="pls") == pytest.approx(1 - missed / total, abs=1e-7)
    assert predictivity(x, y, method="pls", score="r") == pytest.approx(np.mean(medians), abs=1e-7)


def test_all_components_are_ordinary_least_squares() -> None:
    x, y = layers(120, 12, 6)
    design = np.column_stack([x[:100], np.ones(100)])
    weights = np.linalg.lstsq(design, y[:100], rcond=None)[0]
    expected = np.column_stack([x[100:], np.ones(20)]) @ weights
    np.testing.assert_allclose(fitted(x[:100], y[:100], x[100:], 12), expected, atol=1e-9)


def test_components_beyond_the_rank_change_nothing() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 4)) @ rng.normal(size=(4, 30))
    y = x @ rng.normal(size=(30, 10)) + rng.normal(size=(80, 10))
    few, many = (fitted(x[:60], y[:60], x[60:], components) for components in (4, 25))
    np.testing.assert_allclose(many, few, atol=1e-8)
    assert np.isfinite(fitted(x[:60], np.ones((60, 3)), x[60:], 5)).all()  # targets that do not vary


@pytest.mark.parametrize("shape", [(50, 80), (80, 50), (40, 3), (3, 40), (30, 1)])
def test_leading_is_the_first_singular_vector(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, block, size = leading(matrix)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    assert size == pytest.approx(float(s[0]), rel=1e-10)
    assert abs(float(left @ u[:, 0])) == pytest.approx(1, abs=1e-10)
    assert abs(float(block[:, 0] @ v[0])) == pytest.approx(1, abs=1e-10)
    again, _, _ = leading(matrix, block)
    assert abs(float(again @ left)) == pytest.approx(1, abs=1e-10)


def test_known_answers() -> None:
    rng = np.random.default_rng(0)
    x, y = layers(1000, 60, 40, rank=6)
    assert predictivity(x, y, method="pls", components=6) > 0.95
    assert predictivity(x, x[:, :20], method="pls", components=60) > 1 - 1e-9
    for other in (rng.normal(size=y.shape), y[rng.permutation(1000)]):
        assert -0.2 < predictivity(x, other, method="pls", components=6) < 0.0
        assert abs(predictivity(x, other, method="pls", components=6, score="r")) < 0.05


@pytest.mark.parametrize("score", ["r2", "r"])
def test_float32_agrees_with_float64(score: str) -> None:
    for p in (40, 300):
        x, y = layers(200, p, 60)
        wide = predictivity(x, y, method="pls", score=score)
        narrow = predictivity(x.astype(np.float32), y.astype(np.float32), method="pls", score=score)
        assert narrow == pytest.approx(wide, abs=1e-4)


def test_features_of_any_rotation_are_as_predictable() -> None:
    x, y = layers(100, 40, 150)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(150, 150)))[0]
    measure, own = (pls_predictivity(score, components=10) for score in ("r2", "r"))
    assert measure(x, y @ turn) == pytest.approx(measure(x, y), abs=1e-8)
    assert measure(y @ turn, x) == pytest.approx(measure(y, x), abs=1e-8)
    assert own(y @ turn, x) == pytest.approx(own(y, x), abs=1e-8)


def test_too_many_components_are_a_sentence() -> None:
    x, y = layers(100, 10, 40)
    with pytest.raises(UserError, match="25 components cannot be fitted to 10 features; allowed: up to 10"):
        predictivity(x, y, method="pls")
    with pytest.raises(UserError, match="25 components cannot be fitted to 24 training images; allowed: up to 23"):
        predictivity(y[:30], x[:30], method="pls")
    assert predictivity(y, x, method="pls") > 0  # few targets are no hindrance


def test_names() -> None:
    assert [measure.name for measure in MEASURES] == ["predictivity_pls", "predictivity_pls_r"]
    assert all("25 components" in measure.summary for measure in MEASURES)
