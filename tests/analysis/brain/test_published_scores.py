"""Published recordings: what pixels and an untrained ResNet-50 reach was measured before, with Brain-Score's metrics.

The figures are from fits of another untrained ResNet-50, with five splits, so they must lie inside our intervals.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localsim.analysis import brain

SHARED = Path(os.environ.get("LOCALSIM_SHARED_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
V4, IT = SHARED / "neural" / "cowley2026_v4", SHARED / "neural" / "kriegeskorte2008_92"
needs_v4 = pytest.mark.skipif(not V4.is_dir(), reason="the V4 recordings of Cowley et al. 2026 are not here")
needs_it = pytest.mark.skipif(not IT.is_dir(), reason="the RDMs of Kriegeskorte et al. 2008 are not here")


def session(name: str) -> brain.Recording:
    (found,) = [one for one in brain.load_recordings(V4) if one.name.endswith(name)]
    return found


def check(scores: brain.BrainScores, recording: str, expected: dict[tuple[str, str], float]) -> None:
    """Hold scores, by layer and region, against figures."""
    layers = {layer.name: layer for layer in scores.layers}
    for (layer, region), figure in expected.items():
        one = scores.score(recording, region, layers[layer])
        assert one.interval is not None and one.interval[0] < figure < one.interval[1], (layer, region, one.value)
        assert one.chance is not None and abs(one.chance) < 0.1


@needs_v4
@pytest.mark.parametrize(
    ("name", "metric", "figure"),
    [("210325", "ridgecv", 0.274), ("210325", "pls", 0.201), ("190923", "ridgecv", 0.236)],
)
def test_pixels_predict_v4_as_measured_before(name, metric, figure):
    one = session(name)
    check(
        brain.score(recordings=one, metric=metric, controls=["pixels", "shuffled"]),
        one.name,
        {("pixels", "V4"): figure},
    )


@needs_v4
def test_the_ceiling_of_v4_is_as_measured_before():
    one = session("210325")
    assert brain.METRICS["ridgecv"].target(one).ceiling.value == pytest.approx(0.759, abs=0.0005)


@needs_it
def test_pixels_resemble_it_as_measured_before():
    scores = brain.score(recordings=IT, controls=["pixels", "shuffled"])
    check(scores, "kriegeskorte2008", {("pixels", "monkey IT"): 0.145, ("pixels", "human IT"): 0.106})


@needs_it
def test_the_noise_ceiling_of_human_it_is_as_measured_before():
    (one,) = brain.load_recordings(IT)
    found = brain.METRICS["rsa"].target(one.of("human IT")).ceiling
    assert (found.lower, found.value) == (pytest.approx(0.379, abs=0.0005), pytest.approx(0.661, abs=0.0005))


@pytest.mark.slow
@needs_v4
def test_an_untrained_resnet50_predicts_v4_as_measured_before():
    one = session("210325")
    modules = {"modules": ["layer1", "layer2", "layer3", "layer4"]}
    scores = brain.score(
        "torchvision:resnet50", recordings=one, layers=modules, image_size=112, spatial="4x4", controls=["shuffled"]
    )
    figures = (0.481, 0.471, 0.427, 0.387)
    check(scores, one.name, {(layer, "V4"): figure for layer, figure in zip(modules["modules"], figures, strict=True)})


@pytest.mark.slow
@needs_it
def test_an_untrained_resnet50_resembles_it_as_measured_before():
    layers = {"modules": ["layer1", "layer4", "avgpool"]}
    scores = brain.score("torchvision:resnet50", recordings=IT, layers=layers, spatial="flatten", controls=["shuffled"])
    monkey, human = (0.246, 0.202, 0.257), (0.087, 0.088, 0.111)
    check(scores, "kriegeskorte2008", {
        (layer, region): figure
        for region, figures in (("monkey IT", monkey), ("human IT", human))
        for layer, figure in zip(layers["modules"], figures, strict=True)
    })  # fmt: skip
