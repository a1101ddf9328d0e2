"""Recordings of the same images: draws have these alike and neurons apart, so that means over them are not too sure."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from localsim.analysis.brain.metrics import METRICS
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.brain.scores import BrainScore
from localsim.analysis.statistics import centred_interval
from localsim.data import ImageSet


def images(n: int, seed: int = 0) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 3, 2, 2), dtype=np.uint8)
    return ImageSet(torch.from_numpy(pixels), None, None)


def recorded(name: str, shown: ImageSet, neurons: int = 8, region: str = "V4") -> Recording:
    y = np.random.default_rng(len(name)).normal(size=(len(shown), neurons))
    return Recording(name, shown, y, regions=(region,) * neurons)


def test_of_regressions_equal_images_are_drawn_alike_and_neurons_apart():
    def drawn(recording: Recording, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        made = METRICS["ridge"].target(recording, draws=20, seed=seed).content
        return made.counts, made.neurons

    counts, neurons = drawn(recorded("A", images(30)))
    for other in (recorded("B", images(30)), recorded("A", images(30), region="IT"), recorded("A", images(30), 9)):
        same, apart = drawn(other)
        np.testing.assert_array_equal(counts, same)
        assert not np.array_equal(neurons, apart)
    for recording, seed in ((recorded("A", images(30, seed=1)), 0), (recorded("A", images(30)), 1)):
        assert not np.array_equal(counts, drawn(recording, seed)[0])


@pytest.mark.parametrize("name", ["rdm", "rsa", "cka"])
def test_of_pairs_equal_images_are_drawn_alike_and_the_rest_apart(name):
    def target(who: str, shown: ImageSet):
        x = np.random.default_rng(0).normal(size=(30, 12))
        recording = Recording(who, shown, x, regions=("V4",) * 12, subjects=("a", "b", "c") * 4)
        return list(METRICS[name].target(recording, draws=20).content.source.resamples())

    first, second, other = target("A", images(30)), target("B", images(30)), target("A", images(30, seed=1))
    for (one, _), (two, _) in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)
    assert any(not np.array_equal(one, two) for (_, one), (_, two) in zip(first, second, strict=True))
    assert any(not np.array_equal(one, two) for (one, _), (two, _) in zip(first, other, strict=True))


def test_the_interval_of_a_mean_over_recordings_of_the_same_images_covers_it():
    """Two feature sets are equally noisy views of what drives the neurons, so that their difference is 0.

    Drawn apart in each recording, what is peculiar to the images would average out: 23 of these intervals covered.
    """
    metric, covered = METRICS["cka"], 0
    for number in range(40):
        rng = np.random.default_rng(number)
        causes, shown = rng.normal(size=(60, 4)), images(60, seed=number)
        layers = [metric.represent(causes + rng.normal(size=causes.shape)) for _ in range(2)]
        scores: list[list[BrainScore]] = [[], []]
        for session in range(8):
            y = causes @ rng.normal(size=(4, 40)) + rng.normal(size=(60, 40))
            target = metric.target(Recording(f"{session}", shown, y, regions=("V4",) * 40), draws=60)
            for side, layer in zip(scores, layers, strict=True):
                made = metric.compare(layer, target)
                side.append(BrainScore(made.value, made.draws, None, None, None, 60, 40, -1, 1))
        one, other = (BrainScore.mean(side, 60) for side in scores)
        low, high = centred_interval(one.value - other.value, one.draws - other.draws)
        covered += low <= 0 <= high
    assert covered >= 0.85 * 40
