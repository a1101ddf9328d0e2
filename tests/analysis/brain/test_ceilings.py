"""Ceilings from their formulas, and of the shared recordings."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import loadmat
from scipy.stats import pearsonr, spearmanr

from localsim.analysis.brain.ceilings import internal_consistency, pearson, subject_ceiling
from localsim.analysis.brain.metrics import METRICS
from localsim.analysis.brain.recordings import Recording
from localsim.data import ImageSet

NEURAL = Path(os.environ.get("LOCALSIM_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data")) / "neural"


def recording(responses: np.ndarray, **fields) -> Recording:
    images = ImageSet(torch.zeros((len(responses), 3, 2, 2), dtype=torch.uint8), None, None)
    return Recording("made", images, responses, regions=("V4",) * responses.shape[1], **fields)


def noisy(n: int = 40, neurons: int = 5, trials: int = 7, noise: float = 1.0, bins: int = 1) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, neurons, 1, 1)) + noise * rng.normal(size=(n, neurons, trials, bins))


@pytest.mark.parametrize("missing", [0.0, 0.1])
def test_split_halves_by_loops(missing):
    from sklearn.model_selection import ShuffleSplit

    y = noisy(bins=2)
    rng = np.random.default_rng(1)
    gone = np.broadcast_to(rng.uniform(size=(40, 1, 7, 1)) < missing, y.shape).copy()
    gone[:, :, :5] = False
    y[gone] = np.nan
    expected = []
    for one, other in ShuffleSplit(10, train_size=0.5, random_state=1).split(np.zeros(7)):
        a, b = (np.nanmean(y[:, :, half], axis=2).mean(2) for half in (one, other))
        r = np.array([pearsonr(a[:, neuron], b[:, neuron])[0] for neuron in range(5)])
        expected.append(np.median(2 * r / (1 + r)))
    ceiling = METRICS["pls"].target(recording(y)).ceiling
    assert ceiling is not None
    assert ceiling.value == pytest.approx(np.mean(expected), abs=1e-12)
    assert ceiling.kind == "internal consistency of neurons, Spearman-Brown, over 7 trials"


def test_a_neuron_without_trials_in_a_half_is_left_out_of_it():
    y = noisy(trials=4)
    whole = internal_consistency(recording(y[:, :4]), pearson, "neurons")
    y[0, 4, 1:] = np.nan  # the fifth neuron saw the first image once: some half has nothing
    assert internal_consistency(recording(y), pearson, "neurons") == whole


def test_the_estimate_is_the_reliability_of_the_mean():
    """Of variance 1 between images and s^2 between t trials, the mean of all trials has reliability 1 / (1 + s^2/t)."""
    y = noisy(n=3000, neurons=9, trials=8, noise=2.0)
    found = internal_consistency(recording(y), pearson, "neurons")
    assert not isinstance(found, str) and found.value == pytest.approx(1 / (1 + 4 / 8), abs=0.02)


@pytest.mark.parametrize("name", ["pls", "ridge", "ridgecv", "rdm", "cka"])
def test_no_ceiling(name):
    metric = METRICS[name]
    averaged = metric.target(recording(noisy(trials=1)))
    assert averaged.ceiling is None and "averaged" in averaged.ceiling_or_reason
    scarce = noisy(trials=2)
    scarce[:, :, 1] = np.where(np.arange(40)[:, None, None] % 2, np.nan, scarce[:, :, 1])
    assert metric.target(recording(scarce)).ceiling_or_reason.startswith("no half of the trials")


def test_trials_that_do_not_agree():
    rng = np.random.default_rng(0)
    one = rng.normal(size=(40, 5, 1))
    target = METRICS["pls"].target(recording(np.concatenate([one, 0.2 * rng.normal(size=(40, 5, 1)) - one], axis=2)))
    assert target.ceiling is None and "do not agree" in target.ceiling_or_reason


def test_matrices_have_the_ceiling_of_their_own_metric():
    y = noisy(neurons=30, noise=0.5)
    found = {name: METRICS[name].target(recording(y)).ceiling for name in ("pls", "rdm", "cka")}
    assert len({one.value for one in found.values()}) == 3 and all(0.8 < one.value < 1 for one in found.values())
    assert found["cka"].kind.startswith("internal consistency of cka")


def test_rsa_ceiling_by_loops():
    rng = np.random.default_rng(0)
    y = noisy(neurons=12)[:, :, 0, 0] + rng.normal(size=(40, 1))
    subjects = tuple("CAB"[number % 3] for number in range(12))
    target = METRICS["rsa"].target(recording(y, subjects=subjects))
    pairs = np.triu_indices(40, 1)
    own = np.array([(1 - np.corrcoef(y[:, place::3]))[pairs] for place in range(3)])
    upper = np.mean([spearmanr(one, own.mean(0))[0] for one in own])
    lower = np.mean([spearmanr(own[place], np.delete(own, place, 0).mean(0))[0] for place in range(3)])
    assert target.ceiling.value == pytest.approx(upper) and target.ceiling.lower == pytest.approx(lower)
    assert target.ceiling.kind == "upper noise ceiling over 3 subjects"


def test_subjects_that_do_not_agree():
    """One subject's distances fall where the other's rise, and are too small to be seen in their mean."""
    rdms, pairs = np.zeros((2, 6, 6)), np.triu_indices(6, 1)
    rdms[:, pairs[0], pairs[1]] = np.arange(1, 16), np.arange(15, 0, -1) / 100
    assert (
        subject_ceiling(rdms, "2 subjects") == "the subjects do not agree with each other: their noise ceiling is 0.000"
    )


@pytest.mark.skipif(not NEURAL.is_dir(), reason="needs the shared neural data")
def test_human_it_has_the_ceiling_of_four_subjects():
    """0.379 to 0.661, as in the data's own notes, where sessions of one subject are averaged first."""
    loaded = loadmat(
        NEURAL / "kriegeskorte2008_92" / "92_brainRDMs.mat", squeeze_me=True, struct_as_record=False, appendmat=False
    )
    rdms = np.array([session.RDM for subject in loaded["RDMs"] for session in subject], dtype=np.float64)
    images = ImageSet(torch.zeros((92, 3, 2, 2), dtype=torch.uint8), None, None)
    human = Recording("human", images, rdms=rdms, regions=("IT",) * 8, subjects=tuple("BBKKSSTT"))
    ceiling = METRICS["rsa"].target(human).ceiling
    assert ceiling is not None
    assert (round(ceiling.lower, 3), round(ceiling.value, 3)) == (0.379, 0.661)


@pytest.mark.skipif(not NEURAL.is_dir(), reason="needs the shared neural data")
def test_v4_has_the_ceiling_of_its_notes():
    """0.759, of 6 to 10 trials per image."""
    y = np.load(NEURAL / "cowley2026_v4" / "responses_raw_210325.npy").transpose(1, 0, 2)
    ceiling = METRICS["pls"].target(recording(y)).ceiling
    assert ceiling is not None and round(ceiling.value, 3) == 0.759
