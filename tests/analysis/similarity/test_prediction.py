"""Ridge predictivity: the penalty and predictions against explicit formulas, and the answers known in advance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localsim.analysis.similarity.latent import MEASURES as LATENT
from localsim.analysis.similarity.latent import pls_predictivity
from localsim.analysis.similarity.measure import Measure, Numerics
from localsim.analysis.similarity.prediction import (
    MEASURES,
    PENALTIES,
    Layer,
    Spectrum,
    predictivity,
    ridge_predictivity,
)
from localsim.errors import UserError

RIDGE, RIDGE_R = MEASURES
NUMERICS = Numerics(torch.device("cpu"), torch.float64)


def mixture(n: int, p: int, q: int, seed: int = 0, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Two layers that see the same 5 sources of unequal size, with noise of their own and an offset."""
    rng = np.random.default_rng(seed)
    sources = rng.normal(size=(n, 5)) * np.array([3.0, 2.0, 1.0, 1.0, 0.5])
    x = sources @ rng.normal(size=(5, p)) + noise * rng.normal(size=(n, p)) + 2
    y = sources @ rng.normal(size=(5, q)) + noise * rng.normal(size=(n, q)) - 1
    return x, y


def rotation(size: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def folds_of(n: int, number: int = 5, seed: int = 0) -> list[np.ndarray]:
    return [fold.numpy() for fold in Layer.of(torch.arange(n)[:, None] * 1.0, number, seed).folds]


def hat(x: np.ndarray, penalty: float) -> np.ndarray:
    """The map from targets to fitted values of a ridge regression with an intercept, from its normal equations."""
    one = np.full((len(x), len(x)), 1 / len(x))
    away = x - x.mean(0)
    return one + away @ np.linalg.solve(away.T @ away + penalty * np.eye(x.shape[1]), away.T)


def gcv(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    h, m = hat(x, penalty), len(x)
    return (((np.eye(m) - h) @ y) ** 2).sum(0) / m / (1 - np.trace(h) / m) ** 2


def by_hand(x: np.ndarray, y: np.ndarray, pooled: bool) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per fold: images, their targets less the training mean, predictions of that, one target after the other."""
    made = []
    for test in folds_of(len(x)):
        train = np.setdiff1d(np.arange(len(x)), test)
        away = x[train] - x[train].mean(0)
        grid = np.array(PENALTIES) * (away**2).sum() / len(train)
        errors = np.array([gcv(x[train], y[train], penalty) for penalty in grid])
        if pooled:
            errors = np.repeat(errors.sum(1, keepdims=True), y.shape[1], 1)
        columns = []
        for column, penalty in enumerate(grid[errors.argmin(0)]):
            target = y[train, column] - y[train, column].mean()
            weights = np.linalg.solve(away.T @ away + penalty * np.eye(x.shape[1]), away.T @ target)
            columns.append((x[test] - x[train].mean(0)) @ weights)
        made.append((test, y[test] - y[train].mean(0), np.stack(columns, 1)))
    return made


@pytest.mark.parametrize("p", [7, 30, 55, 200], ids=["few", "some", "dual within folds", "more than images"])
def test_r2_equals_plain_ridge_per_fold_with_the_penalty_of_explicit_hat_matrices(p: int) -> None:
    x, y = mixture(60, p, 9, noise=1.5)
    made = by_hand(x, y, pooled=True)
    missed = sum(((target - fitted) ** 2).sum() for _, target, fitted in made)
    total = sum((target**2).sum() for _, target, _ in made)
    assert predictivity(x, y) == pytest.approx(1 - missed / total, abs=1e-9)


@pytest.mark.parametrize("p", [7, 200])
def test_r_equals_the_median_correlation_of_plain_ridge_with_a_penalty_per_feature(p: int) -> None:
    x, y = mixture(60, p, 9, noise=1.5)
    y[:, 3] = np.random.default_rng(1).normal(size=60)  # one feature wants another penalty
    medians = [
        np.median([np.corrcoef(target[:, i], fitted[:, i])[0, 1] for i in range(9)])
        for _, target, fitted in by_hand(x, y, pooled=False)
    ]
    assert predictivity(x, y, score="r") == pytest.approx(np.mean(medians), abs=1e-9)


def test_the_penalty_is_within_a_step_of_sklearns_leave_one_out_choice() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    for noise in (0.5, 3.0, 20.0):
        x, y = mixture(200, 30, 8, noise=noise)
        layer = Layer.of(torch.from_numpy(x - x.mean(0)), 5, 0)
        test, spectrum = folds_of(200)[0], layer.spectra[0]
        train = np.setdiff1d(np.arange(200), test)
        targets = y[train] - y[train].mean(0)
        on = spectrum.vectors.T @ torch.from_numpy((x[train] - x[train].mean(0)).T @ targets)
        power = torch.tensor([(targets**2).sum()])
        ours = float(spectrum.choose(on.square().sum(1, keepdim=True), power, len(train), PENALTIES))
        grid = np.array(PENALTIES) * spectrum.mean
        fitted = linear_model.RidgeCV(alphas=grid).fit(x[train], y[train])
        assert abs(np.log10(ours / fitted.alpha_)) < 0.51
        # with that one penalty the two predict the same
        single = ridge_predictivity(penalties=[fitted.alpha_ / spectrum.mean])
        a, b = (single.transform(torch.from_numpy(f)) for f in (x, y))
        assert single.terms is not None
        terms = single.terms(a, b)[test].numpy()
        theirs = ((y[test] - fitted.predict(x[test])) ** 2).sum(1)
        np.testing.assert_allclose(terms[:, 1] - terms[:, 0], theirs, rtol=1e-9)


def test_both_gram_matrices_give_the_same_predictions() -> None:
    x, y = mixture(60, 20, 6, noise=1.5)
    wide = np.concatenate([x, np.zeros((60, 100))], axis=1)  # the same images, decomposed by images
    assert Layer.of(torch.from_numpy(x), 5, 0).spectra[0].dual is False
    assert Layer.of(torch.from_numpy(wide), 5, 0).spectra[0].dual is True
    for score in ("r2", "r"):
        assert predictivity(wide, y, score=score) == pytest.approx(predictivity(x, y, score=score), abs=1e-10)


def test_a_layer_is_decomposed_once_for_all_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or plain(matrix))
    x, y = mixture(60, 20, 6)
    a, b = (RIDGE.transform(RIDGE.represent(features, NUMERICS)) for features in (x, y))
    assert not calls
    assert RIDGE.compare(a, b) < RIDGE.compare(a, a)
    assert len(calls) == 5


def test_r_of_wide_targets_does_not_depend_on_how_many_are_done_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = mixture(60, 20, 30, noise=2.0)
    whole = predictivity(x, y, score="r")
    monkeypatch.setattr("localsim.analysis.similarity.prediction.CHUNK", 7 * 80)
    assert predictivity(x, y, score="r") == pytest.approx(whole, abs=1e-12)


# Known answers


def test_a_linear_map_is_found() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 10))
    assert predictivity(x, x @ rng.normal(size=(10, 20))) > 1 - 1e-8
    assert predictivity(x, x) > 1 - 1e-8
    assert predictivity(x, x @ rng.normal(size=(10, 20)), score="r") > 1 - 1e-8


@pytest.mark.parametrize("p", [30, 300])
def test_independent_or_mismatched_layers_predict_nothing(p: int) -> None:
    rng = np.random.default_rng(0)
    x, y = mixture(200, p, 40)
    for other in (rng.normal(size=(200, 40)), y[rng.permutation(200)]):
        assert -0.1 < predictivity(x, other) < 0.02
        assert abs(predictivity(x, other, score="r")) < 0.15


def test_a_noise_ceiling_is_reached_and_not_passed() -> None:
    rng = np.random.default_rng(0)
    sources = rng.normal(size=(2000, 6))
    x = sources @ rng.normal(size=(6, 40))
    signal = sources @ rng.normal(size=(6, 60))
    y = signal + rng.normal(size=signal.shape) * signal.std(0)  # half of each feature's variance is noise
    assert predictivity(x, y) == pytest.approx(0.5, abs=0.015)
    assert predictivity(x, y, score="r") == pytest.approx(np.sqrt(0.5), abs=0.015)


def test_a_narrow_layer_does_not_predict_a_wide_one_but_is_predicted_by_it() -> None:
    wide = np.random.default_rng(0).normal(size=(400, 20))
    assert predictivity(wide[:, :5], wide) == pytest.approx(0.25, abs=0.05)
    assert predictivity(wide, wide[:, :5]) > 0.999
    assert not RIDGE.symmetric


# Declarations


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 999),
    p=st.sampled_from([3, 12, 50]),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100, 100),
    first=st.booleans(),
    which=st.sampled_from(range(4)),
)
def test_declared_invariances(seed: int, p: int, scale: float, shift: float, first: bool, which: int) -> None:
    measure = (RIDGE, RIDGE_R, pls_predictivity(components=2), pls_predictivity("r", components=2))[which]
    x, y = mixture(30, p, 6, seed)
    value = measure(x, y)
    assert measure.low <= value <= measure.high
    changed = {"translation": lambda f: f + shift, "scale": lambda f: f * scale}
    if first or "orthogonal" in measure.invariances:
        changed["orthogonal"] = lambda f: f @ rotation(f.shape[1], seed)
    assert measure.invariances <= {"translation", "scale", "orthogonal"}
    for change in changed.values():
        pair = (change(x), y) if first else (x, change(y))
        assert measure(*pair) == pytest.approx(value, abs=1e-6)


def test_invariances_not_declared_are_broken() -> None:
    x, y = mixture(60, 8, 6, noise=2.0)
    stretch = np.diag(np.logspace(0, 3, 8))
    for measure in (RIDGE, RIDGE_R, pls_predictivity(components=2)):
        assert "linear" not in measure.invariances
        assert abs(measure(x @ stretch, y) - measure(x, y)) > 1e-4
    for measure in (RIDGE_R, pls_predictivity("r", components=2)):
        assert "orthogonal" not in measure.invariances
        assert abs(measure(x, y @ rotation(6)) - measure(x, y)) > 1e-3


def test_names_and_ranges() -> None:
    measures = MEASURES + LATENT
    assert [measure.name for measure in measures] == [
        "predictivity",
        "predictivity_r",
        "predictivity_pls",
        "predictivity_pls_r",
    ]
    assert all(measure.bias == "cross-validated" and not measure.metric for measure in measures)
    assert [measure.terms is None for measure in measures] == [False, True, False, True]


# Of some of the images


@pytest.mark.parametrize("p", [10, 30, 90])
@pytest.mark.parametrize("measure", (RIDGE, RIDGE_R, pls_predictivity(components=3)), ids=lambda m: m.name)
def test_take_equals_the_features_of_those_images(measure: Measure, p: int) -> None:
    x, y = mixture(60, p, 70, noise=1.5)
    images = np.sort(np.random.default_rng(3).permutation(60)[:30])
    a, b = (measure.represent(features, NUMERICS) for features in (x, y))
    a, b = (measure.transform(measure.take(f, torch.from_numpy(images))) for f in (a, b))
    assert measure.compare(a, b) == pytest.approx(measure(x[images], y[images]), abs=1e-8)


@pytest.mark.parametrize("method", ["ridge", "pls"])
def test_terms_are_of_images_and_their_ratio_is_the_score(method: str) -> None:
    x, y = mixture(60, 10, 6, noise=1.5)
    measure = pls_predictivity(components=3) if method == "pls" else ridge_predictivity()
    a, b = (measure.transform(measure.represent(features, NUMERICS)) for features in (x, y))
    assert measure.terms is not None
    terms = measure.terms(a, b)
    assert terms.shape == (60, 2)
    assert float(terms[:, 0].sum() / terms[:, 1].sum()) == pytest.approx(measure.compare(a, b), abs=1e-12)
    for test in folds_of(60):
        train = np.setdiff1d(np.arange(60), test)
        np.testing.assert_allclose(terms[test, 1], ((y[test] - y[train].mean(0)) ** 2).sum(1), rtol=1e-9)


@pytest.mark.parametrize("measure", (RIDGE, RIDGE_R), ids=lambda m: m.name)
def test_images_that_look_the_same_are_a_sentence_also_among_others(measure: Measure) -> None:
    x, _ = mixture(60, 10, 6)
    x[:30] = x[0]
    kept = measure.represent(x, NUMERICS)
    with pytest.raises(UserError, match="features are constant"):
        measure.transform(measure.take(kept, torch.arange(30)))


def test_folds_hold_each_image_once_and_follow_the_seed() -> None:
    folds = folds_of(23)
    assert sorted(np.concatenate(folds)) == list(range(23))
    assert {len(fold) for fold in folds} == {4, 5}
    assert any((a != b).any() for a, b in zip(folds_of(20), folds_of(20, seed=1), strict=True))
    x, y = mixture(40, 10, 6, noise=1.5)
    assert predictivity(x, y, seed=1) != predictivity(x, y)
    assert predictivity(x, y, folds=4) != predictivity(x, y)


# Precision and input


@pytest.mark.parametrize("p", [20, 70, 84, 90, 95, 99, 130, 400])
@pytest.mark.parametrize("score", ["r2", "r"])
def test_float32_agrees_with_float64(p: int, score: str) -> None:
    rng = np.random.default_rng(0)
    for noise, decay in ((0.5, 0.0), (1e-3, 0.0), (0.1, 1.5)):
        x, y = mixture(120, p, 25, noise=noise)
        x = (x @ rotation(p)) * np.arange(1, p + 1) ** -decay + 10 * rng.normal(size=p)
        wide = predictivity(x, y, score=score)
        assert predictivity(x.astype(np.float32), y.astype(np.float32), score=score) == pytest.approx(wide, abs=1e-4)


def test_arrays_tensors_and_wider_types_are_the_same() -> None:
    x, y = mixture(40, 10, 6)
    assert predictivity(torch.from_numpy(x), torch.from_numpy(y)) == predictivity(x, y)
    narrow = x.astype(np.float32)
    assert predictivity(narrow, y, dtype="float64") == pytest.approx(predictivity(x, y), abs=1e-5)


def test_dead_features_are_left_out_of_r_and_unpredictable_ones_are_not() -> None:
    x, y = mixture(60, 10, 5, noise=1.0)
    dead = np.concatenate([y, np.full((60, 20), 0.1)], axis=1)
    assert predictivity(x, dead, score="r") == pytest.approx(predictivity(x, y, score="r"), abs=1e-12)
    once = np.zeros((60, 1))
    once[folds_of(60)[0][0]] = 1.0  # varies among the images of one fold only, and there nothing predicts it
    with pytest.raises(UserError, match="no feature of y varies over the 12 images of a fold"):
        predictivity(x, once, score="r")
    assert predictivity(np.concatenate([x, once], axis=1), y) == pytest.approx(predictivity(x, y), abs=0.05)


def test_a_constant_prediction_of_what_varies_counts_as_no_correlation() -> None:
    x, y = mixture(60, 1, 5)
    x[folds_of(60)[0]] = x[folds_of(60)[0][0]]
    values = [predictivity(x, y, score="r"), predictivity(x + 100, y, score="r")]
    assert np.isfinite(values).all() and values[0] == pytest.approx(values[1], abs=1e-9)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "lasso"}, "unknown method 'lasso'; allowed: ridge, pls"),
        ({"score": "mse"}, "unknown score 'mse'; allowed: r2, r"),
        ({"folds": 1}, "folds 1 leaves nothing to fit to; allowed: 2 or more"),
        ({"folds": 21}, "40 images are too few for 21 folds; allowed: 42 images or more"),
        ({"penalties": [1.0, -1.0]}, "penalties .1.0, -1.0. are not allowed; allowed: one or more positive"),
        ({"penalties": []}, "penalties .. are not allowed"),
        ({"components": 3}, "components 3 has no meaning for ridge"),
        ({"method": "pls", "penalties": [1.0]}, "penalties .1.0,. have no meaning for pls"),
        ({"method": "pls", "components": 0}, "components 0 predict nothing"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        predictivity(*mixture(40, 10, 6), **options)


@pytest.mark.parametrize("score", ["r2", "r"])
def test_layers_that_cannot_be_compared_are_a_sentence(score: str) -> None:
    x, y = mixture(40, 10, 6)
    broken = x.copy()
    broken[3, 3] = np.nan
    for features, sentence in (
        (broken, "NaN or infinite"),
        (np.full((40, 50), 0.1), "features are constant"),
        (np.full((40, 5), 0.1, dtype=np.float32), "features are constant"),
        (x[:39], "39 and 40 images"),
        (x[:3], "3 images are too few"),
        (x[0], "images by features"),
    ):
        with pytest.raises(UserError, match=sentence):
            predictivity(features, y[: len(features)] if len(features) == 3 else y, score=score)
    alone = np.zeros((40, 2))
    alone[folds_of(40)[0][0]] = 1.0
    with pytest.raises(UserError, match="constant over the 32 images of a training fold"):
        predictivity(alone, y, score=score)


def test_a_spectrum_chooses_the_least_error_of_the_formula() -> None:
    x, y = mixture(40, 12, 5, noise=2.0)
    spectrum = Layer.of(torch.from_numpy(x), 5, 0).spectra[2]
    assert isinstance(spectrum, Spectrum)
    train = np.setdiff1d(np.arange(40), folds_of(40)[2])
    targets = y[train] - y[train].mean(0)
    on = (spectrum.vectors.T @ torch.from_numpy(x[train].T @ targets)).square()
    power = torch.from_numpy((targets**2).sum(0))
    fine = tuple(np.logspace(-3, 1, 1000))  # so that the least error is found to a percent
    grid = np.array(fine) * spectrum.mean
    expected = grid[np.argmin([gcv(x[train], y[train], penalty) for penalty in grid], axis=0)]
    assert (expected > grid[0]).all() and (expected < grid[-1]).sum() > 2
    np.testing.assert_allclose(spectrum.choose(on, power, len(train), fine), expected)
