"""A recording whose answer is known: responses made from layer2 of a network are best accounted for by its layer2."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from localsim.analysis import Source, brain, features
from localsim.analysis.brain.brainscore import prepare, quiet
from localsim.analysis.brain.contrasts import differences
from localsim.analysis.brain.metrics import get_metric
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.statistics import centred_interval
from localsim.data import ImageSet
from localsim.rng import key

N, NEURONS, SIZE = 120, 30, 32
LAYERS = ["layer1", "layer2", "layer3", "layer4"]
SPATIAL = "upto4x4"


@pytest.fixture(scope="module")
def network() -> Source:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Source("resnet18", resnet18().eval(), size=SIZE)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.normal(size=(N, 3, 8, 8))).float()
    smooth = torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")
    return ImageSet((smooth * 50 + 128).clamp(0, 255).to(torch.uint8), None, None)


@pytest.fixture(scope="module")
def taken(network, images):
    return features(network, images, modules=LAYERS, spatial=SPATIAL)


@pytest.fixture(scope="module")
def recording(taken, images) -> Recording:
    """Return four noisy trials of random read-outs of layer2."""
    rng = np.random.default_rng(1)
    x = np.asarray(taken["layer2"], dtype=np.float64)
    signal = (x - x.mean(0)) @ rng.normal(size=(x.shape[1], NEURONS))
    signal /= signal.std(0)
    trials = signal[:, :, None] + 0.5 * rng.normal(size=(N, NEURONS, 4))
    return Recording("known", images, trials, regions=("V4",) * NEURONS)


@pytest.mark.parametrize("metric", ["ridgecv", "pls"])
def test_layer2_is_found(metric, network, recording):
    scores = brain.score(
        network, recordings=recording, metric=metric, layers={"modules": LAYERS}, resamples=200, choose_stage=True,
        controls=["pixels", "shuffled"],
    )  # fmt: skip
    found = {layer.name: scores.score("known", "V4", layer) for layer in scores.layers}
    own = found.pop("layer2")
    assert own.value > 0.6 and own.ceiled is not None and own.ceiling is not None and own.ceiling.value > 0.9
    assert set(found) == {"layer1", "layer3", "layer4", "pixels"}
    for other in found.values():
        low, _ = centred_interval(own.value - other.value, own.draws - other.draws)
        assert low > 0, "the same images and neurons are drawn for both layers"
    (best,) = scores.best
    assert best.layer == "layer2" and best.chosen["layer2"] >= 4 and 0.5 < best.value <= own.value + 0.1
    (baseline,) = [one for one in differences(scores, "resnet18", "pixels") if one.layer == "layer2"]
    assert baseline.low is not None and baseline.low > 0
    # of 10 splits, each tests 12 images: had these nothing in common, the mean of r would have this standard error,
    # were all neurons alike; images that several splits test make it larger, the median over neurons smaller
    error = 1 / np.sqrt(10 * (N // 10 - 1))
    for one in (own, *found.values()):
        assert one.chance is not None and abs(one.chance) < 3 * error < one.value


@pytest.mark.parametrize("metric", ["ridgecv", "pls"])
def test_responses_given_to_other_images_score_zero_on_average(metric, taken, recording):
    """Of tested images in another order, r with any prediction is zero on average over all orders."""
    chosen = get_metric(metric, splits=4)
    layer = chosen.represent(taken["layer2"])
    chances = [chosen.compare(layer, chosen.target(recording.shuffled(seed))).value for seed in range(20)]
    assert abs(np.mean(chances)) < 3.5 * np.std(chances, ddof=1) / len(chances) ** 0.5
    assert max(np.abs(chances)) < 0.5 * chosen.compare(layer, chosen.target(recording)).value


@pytest.mark.parametrize("metric", ["ridgecv", "pls"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of old xarray, pandas
@pytest.mark.filterwarnings("ignore:Maximum number of iterations")  # of scikit-learn's PLS
def test_the_metrics_of_brain_score_give_the_same_numbers(metric, network, taken, recording):
    prepare()
    pytest.importorskip("brainscore_vision", reason="needs the extra [brain]")
    from brainscore_core.supported_data_standards.brainio.assemblies import (  # type: ignore[import-not-found]
        NeuroidAssembly,
    )
    from brainscore_vision import load_metric  # type: ignore[import-not-found]
    from brainscore_vision.metrics.regression_correlation import metric as theirs  # type: ignore[import-not-found]

    def assembly(values: np.ndarray) -> NeuroidAssembly:
        presentations = {name: ("presentation", list(recording.stimuli)) for name in ("stimulus_id", "object_name")}
        neuroids = {
            "neuroid_id": ("neuroid", np.arange(values.shape[1])),
            "region": ("neuroid", ["V4"] * values.shape[1]),
        }
        return NeuroidAssembly(values, coords={**presentations, **neuroids}, dims=["presentation", "neuroid"])

    options = {"crossvalidation_kwargs": {"stratification_coord": None}}
    judge = (
        load_metric("pls", **options)
        if metric == "pls"
        else theirs.CrossRegressedCorrelation(
            theirs.dual_ridge_cv_regression(), theirs.pearsonr_correlation(), **options
        )
    )
    scores = brain.score(
        network, recordings=recording, metric=metric, layers={"modules": LAYERS}, resamples=0, controls=["shuffled"]
    )
    for layer in scores.layers:
        found = scores.score("known", "V4", layer)
        x = assembly(np.asarray(taken[layer.name]))
        with quiet():
            own, chance = (
                judge(x, assembly(one.means())) for one in (recording, recording.shuffled(key(0, "shuffle", 0)))
            )
        assert found.value == pytest.approx(float(own), abs=1e-6)
        # in some splits without signal PLS does not converge in 500 rounds, and rounding grows to 1e-4 of a neuron's r
        assert found.chance == pytest.approx(float(chance), abs=1e-4 if metric == "pls" else 1e-6)
