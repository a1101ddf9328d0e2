"""The best of several stages, without the luck that comes with choosing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from localsim.analysis.brain.held_out import HeldOut
from localsim.analysis.brain.metrics import NeuralMetric, get_metric
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.brain.stage_choice import FOLDS, BestStage, best_stage, check_folds
from localsim.analysis.regimes import Layer
from localsim.data import ImageSet
from localsim.errors import UserError

METRICS = {"ridge": get_metric("ridge", splits=3, train_size=0.8), "rdm": get_metric("rdm"), "cka": get_metric("cka")}


def recorded(responses: np.ndarray, name: str = "made") -> Recording:
    shown = ImageSet(torch.zeros((len(responses), 3, 2, 2), dtype=torch.uint8), None, None)
    return Recording(name, shown, responses, regions=("V4",) * responses.shape[1])


def network(metric: NeuralMetric, layers: list[np.ndarray]) -> dict:
    depths = np.arange(1, len(layers) + 1) / len(layers)
    return {
        Layer("net", 0, None, f"layer{number}", depth): metric.represent(x)
        for number, (x, depth) in enumerate(zip(layers, depths, strict=True), start=1)
    }


@pytest.mark.parametrize("name", METRICS)
def test_layers_of_pure_noise_score_zero_where_their_maximum_does_not(name):
    """Over recordings the mean is zero: responses of the images tested are independent of what chose the stage."""
    metric = METRICS[name]
    fair, naive = [], []
    for number in range(60):
        rng = np.random.default_rng(number)
        layers = network(metric, [rng.normal(size=(40, 10)) for _ in range(6)])
        recording = recorded(rng.normal(size=(40, 5)), f"recording {number}")
        fair.append(best_stage(metric, layers, recording).value)
        target = metric.target(recording)
        naive.append(max(metric.compare(one, target).value for one in layers.values()))

    def errors(values: list[float]) -> float:
        """How many standard errors the mean lies above zero."""
        return float(np.mean(values) / (np.std(values, ddof=1) / len(values) ** 0.5))

    assert abs(errors(fair)) < 3.5
    assert errors(naive) > 7 and np.mean(naive) > np.mean(fair) + 3 * np.std(fair) / len(fair) ** 0.5


@pytest.mark.parametrize("name", METRICS)
def test_the_layer_that_made_the_responses_is_chosen_by_all_folds(name):
    metric, rng = METRICS[name], np.random.default_rng(0)
    layers = [rng.normal(size=(60, 12)) for _ in range(4)]
    recording = recorded(layers[2] @ rng.normal(size=(12, 8)) + 0.2 * rng.normal(size=(60, 8)))
    found = best_stage(metric, network(metric, layers), recording)
    assert (found.layer, found.chosen) == ("layer3", {"layer3": FOLDS})
    assert 0.5 < found.value < 1 and (found.n, found.neurons) == (60, 8)
    assert (found.metric, found.recording, found.region, found.regime, found.seed) == (name, "made", "V4", "net", 0)
    assert str(found) == f"{found.value:.3f}, chosen by other images: layer3 5 of 5"
    assert found.to_row()["chosen"] == "layer3:5"


def test_folds_are_all_images_once_and_belong_to_the_seed_and_the_recording(monkeypatch):
    metric, rng = METRICS["rdm"], np.random.default_rng(0)
    layers = network(metric, [rng.normal(size=(43, 10)) for _ in range(2)])
    recording = recorded(rng.normal(size=(43, 5)))
    folds: list[list[int]] = []
    held_out = NeuralMetric.held_out

    def seen(self, predictor, whole, train, test):
        assert sorted([*train, *test]) == list(range(43)) and len(whole) == 43
        folds.append(list(test))
        return held_out(self, predictor, whole, train, test)

    monkeypatch.setattr(NeuralMetric, "held_out", seen)
    first = best_stage(metric, layers, recording)
    assert sorted(image for fold in folds for image in fold) == list(range(43))
    assert {len(fold) for fold in folds} == {8, 9}
    assert best_stage(metric, layers, recording) == first
    best_stage(metric, layers, recording, seed=1)
    best_stage(metric, layers, replace(recording, name="other"))
    parts = [folds[start : start + FOLDS] for start in range(0, len(folds), FOLDS)]
    assert parts[0] == parts[1] and parts[0] != parts[2] != parts[3] != parts[0]


@pytest.mark.parametrize("name", ["rdm", "cka"])
def test_held_out_without_a_fit_is_the_score_of_the_images_tested(name):
    metric, rng = METRICS[name], np.random.default_rng(0)
    x, recording = rng.normal(size=(40, 10)), recorded(rng.normal(size=(40, 5)))
    test = np.array([3, 1, 8, 20, 33, 39, 2])
    train = np.setdiff1d(np.arange(40), test)
    found = metric.held_out(metric.represent(x), recording, train, test)
    assert found == pytest.approx(
        metric.compare(metric.represent(x[test]), metric.target(recording.take(test))).value, abs=1e-10
    )
    if name == "rdm":
        pairs = np.triu_indices(7, 1)
        rdms = [(1 - np.corrcoef(values[test]))[pairs] for values in (x, recording.means())]
        assert found == pytest.approx(spearmanr(*rdms)[0], abs=1e-10)


@pytest.mark.parametrize("name", ["pls", "ridge", "ridgecv"])
def test_held_out_regressions_are_fitted_to_the_other_images(name):
    from sklearn.cross_decomposition import PLSRegression
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 10))
    recording = recorded(x @ rng.normal(size=(10, 5)) + rng.normal(size=(40, 5)))
    metric = get_metric(name, **({"components": 3} if name == "pls" else {}))
    y, test = recording.means(), np.array([3, 1, 8, 20, 33, 39, 2])
    train = np.setdiff1d(np.arange(40), test)
    found = metric.held_out(metric.represent(x), recording, train, test)
    fits = {
        "pls": [PLSRegression(3, scale=False)],
        "ridge": [Ridge(1.0)],
        # the penalty is that with the least leave-one-out error, here close to 1
        "ridgecv": [Ridge(alpha) for alpha in (0.5, 1.0, 10.0, 32.5)],
    }[name]
    expected = []
    for fit in fits:
        predicted = fit.fit(x[train], y[train]).predict(x[test])
        expected.append(np.median([np.corrcoef(predicted[:, i], y[test][:, i])[0, 1] for i in range(5)]))
    assert min(abs(found - one) for one in expected) < 1e-6
    assert isinstance(metric.target(recording).content, HeldOut)
    # responses to other images than these do not matter
    changed = y.copy()
    changed[test] = rng.permutation(changed[test])
    assert metric.held_out(metric.represent(x), recorded(changed), train, test) != found
    noise = x.copy()
    noise[test] = 0
    assert metric.held_out(metric.represent(x), recorded(y), train, test) == found


def test_a_neuron_that_responds_to_one_image_only_does_not_stand_in_the_way():
    """It is constant over the images that choose, or over those that are scored."""
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(60, 12)) for _ in range(3)]
    responses = layers[1] @ rng.normal(size=(12, 8)) + 0.2 * rng.normal(size=(60, 8))
    with_rare = np.hstack([responses, np.eye(60)[:, :1]])
    metric = METRICS["ridge"]
    check_folds(metric, recorded(with_rare))
    found = best_stage(metric, network(metric, layers), recorded(with_rare))
    assert found.chosen == {"layer2": FOLDS} and found.value > 0.5 and found.neurons == 9


@pytest.mark.parametrize(
    ("name", "n", "sentence"),
    [
        ("rdm", 19, "recording made has 19 images, too few to choose a stage by some and score it on others; allowed"),
        ("ridge", 22, "the best stage is chosen by 4 of 5 folds of the 22 images: 17 images are too few"),
    ],
)
def test_too_few_images_are_refused(name, n, sentence):
    recording = recorded(np.random.default_rng(0).normal(size=(n, 5)))
    metric = METRICS[name]
    for refused in (
        lambda: check_folds(metric, recording),
        lambda: best_stage(metric, network(metric, [np.random.default_rng(0).normal(size=(n, 4))]), recording),
    ):
        with pytest.raises(UserError, match=sentence):
            refused()


def test_rdms_alone_will_do():
    rng = np.random.default_rng(0)
    layers = [rng.normal(size=(40, 10)) for _ in range(3)]
    rdm = 1 - np.corrcoef(layers[0])
    np.fill_diagonal(rdm, 0)
    shown = ImageSet(torch.zeros((40, 3, 2, 2), dtype=torch.uint8), None, None)
    two = Recording("two", shown, rdms=np.stack([rdm, rdm**2]), regions=("IT",) * 2, subjects=("a", "b"))
    for name in ("rdm", "rsa"):
        metric = get_metric(name)
        found = best_stage(metric, network(metric, layers), two)
        assert isinstance(found, BestStage) and found.chosen == {"layer1": FOLDS} and found.value > 0.9
