"""Neural metrics as they are used: a layer, a region, a score, its draws, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from localsim.analysis.brain import matrices, resampled
from localsim.analysis.brain.held_out import median
from localsim.analysis.brain.matrices import Dissimilarities, ranks
from localsim.analysis.brain.metrics import METRICS, NAMES, get_metric
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.similarity import cka as similarity_cka
from localsim.analysis.similarity import rsa as similarity_rsa
from localsim.analysis.statistics import centred_interval, half_samples
from localsim.data import ImageSet
from localsim.errors import UserError

REGRESSIONS = ("pls", "ridge", "ridgecv")


def images(n: int) -> ImageSet:
    return ImageSet(torch.zeros((n, 3, 2, 2), dtype=torch.uint8), None, None)


def made(n: int = 60, neurons: int = 12, noise: float = 1.0, seed: int = 0) -> tuple[np.ndarray, Recording]:
    """Return features and a recording made from them, of two subjects."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 50)) * np.arange(1, 51) ** -0.5
    y = x @ rng.normal(size=(50, neurons)) + noise * rng.normal(size=(n, neurons))
    subjects = tuple("AB"[number % 2] for number in range(neurons))
    return x, Recording("made", images(n), y, regions=("V4",) * neurons, subjects=subjects)


def matrices_of(n: int = 24, subjects: str = "AABBC", noise: float = 0.3) -> tuple[np.ndarray, Recording]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 20))
    shared = 1 - np.corrcoef(x)
    found = []
    for _ in subjects:
        error = rng.normal(size=(n, n)) * noise
        error += error.T
        np.fill_diagonal(error, 0)
        np.fill_diagonal(shared, 0)
        found.append(shared + error)
    return x, Recording("rdms", images(n), rdms=np.array(found), regions=("IT",) * len(found), subjects=tuple(subjects))


def scored(name: str, x: np.ndarray, recording: Recording, **options):
    metric = METRICS[name]
    return metric.compare(metric.represent(x), metric.target(recording, **options))


@pytest.mark.parametrize("name", NAMES)
def test_what_was_made_from_the_features_scores_higher_than_what_was_not(name):
    x, recording = made(noise=0.3)
    own, other = scored(name, x, recording), scored(name, np.random.default_rng(5).normal(size=x.shape), recording)
    assert own.value > 0.4 > 0.2 > abs(other.value) and own.draws.shape == (0,)
    assert METRICS[name].low <= own.value <= METRICS[name].high


@pytest.mark.parametrize("name", ["rdm", "cka"])
def test_scores_are_those_of_the_similarity_measures(name):
    x, recording = made()
    measure = {"rdm": similarity_rsa, "cka": lambda a, b: similarity_cka(a, b, debiased=True)}[name]
    assert scored(name, x, recording).value == pytest.approx(measure(x, recording.means()), abs=1e-10)


def test_rsa_is_the_mean_over_subjects():
    x, recording = made()
    pairs = np.triu_indices(60, 1)
    y = recording.means()
    expected = [spearmanr(1 - np.corrcoef(x)[pairs], 1 - np.corrcoef(y[:, subject::2])[pairs])[0] for subject in (0, 1)]
    found = scored("rsa", x, recording)
    np.testing.assert_allclose(found.each, expected, atol=1e-12)
    assert found.value == pytest.approx(np.mean(expected))


def test_rdms_are_averaged_over_sessions_then_subjects():
    x, recording = matrices_of()
    pairs = np.triu_indices(24, 1)
    layer = (1 - np.corrcoef(x))[pairs]
    assert recording.rdms is not None
    subjects = [recording.rdms[:2].mean(0), recording.rdms[2:4].mean(0), recording.rdms[4]]
    each = [spearmanr(layer, one[pairs])[0] for one in subjects]
    np.testing.assert_allclose(scored("rsa", x, recording).each, each, atol=1e-12)
    found = scored("rdm", x, recording)
    assert found.value == pytest.approx(spearmanr(layer, np.mean(subjects, axis=0)[pairs])[0], abs=1e-12)
    assert found.each is None


@pytest.mark.parametrize("name", NAMES)
def test_draws_are_paired_and_belong_to_seed_and_recording(name):
    x, recording = made()
    metric = METRICS[name]
    predictor = metric.represent(x)

    def draws(recorded: Recording, number: int = 20, seed: int = 0) -> np.ndarray:
        return metric.compare(predictor, metric.target(recorded, draws=number, seed=seed)).draws

    first = draws(recording)
    assert first.shape == (20,) and np.isfinite(first).all() and len(set(first)) == 20
    np.testing.assert_array_equal(first, draws(recording))
    np.testing.assert_allclose(first, draws(recording, 30)[:20], atol=1e-12)
    assert not np.array_equal(first, draws(recording, seed=1))
    assert not np.array_equal(first, draws(replace(recording, name="other")))
    # both networks see the same resamples: the same layer under another name differs by nothing
    rotated = metric.represent(x * 3)
    scaled = metric.compare(rotated, metric.target(recording, draws=20)).draws
    if name not in ("ridge", "ridgecv"):  # whose penalty is felt more by smaller features
        np.testing.assert_allclose(scaled, first, atol=1e-9)


@pytest.mark.parametrize("name", REGRESSIONS)
def test_threads_change_no_bit(name):
    """Some neurons vary in no split's images to fit, and some draws have no two images of a split."""
    x, recording = made(neurons=6)
    y = recording.means()
    y[:, 0] = np.arange(60) == 7
    metric, found = METRICS[name], []
    before, filters = torch.get_num_threads(), list(warnings.filters)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            target = metric.target(replace(recording, responses=y), draws=200)
            found.append(target.content.scores(metric.represent(x)))
    finally:
        torch.set_num_threads(before)
    assert np.isnan(found[0][0]).any() and len(set(found[0][1])) > 100
    for r, draws in found[1:]:
        np.testing.assert_array_equal(r, found[0][0])
        np.testing.assert_array_equal(draws, found[0][1])
    assert warnings.filters == filters, "which all threads share"


def test_the_median_of_those_that_are_known():
    r = np.random.default_rng(0).normal(size=(40, 7))
    r[r > 1] = np.nan
    r[3], r[5, 1:] = np.nan, np.nan
    expected = [np.median(row[~np.isnan(row)]) if not np.isnan(row).all() else np.nan for row in r]
    np.testing.assert_array_equal(median(r), expected)


@pytest.mark.parametrize("name", REGRESSIONS)
def test_draws_of_a_regression_by_repeating_images(name):
    """From the definition: predictions kept, images and neurons repeated as often as they are drawn."""
    x, recording = made(n=40, neurons=5)
    metric = get_metric(name, splits=3, **({"components": 4} if name == "pls" else {}))
    predictor, target = metric.represent(x), metric.target(recording, draws=20)
    held_out = target.content
    outcome = metric.compare(predictor, target)
    assert (held_out.counts.sum(1) == 40).all() and held_out.neurons.shape == (20, 5)
    y = recording.means()
    for number in range(20):
        medians = []
        for train, test in held_out.folds:
            predicted = held_out.fit.predict(predictor, y, train, test)
            places = np.repeat(np.arange(len(test)), held_out.counts[number, test].astype(int))
            if len(set(places)) > 1:
                r = [pearsonr(predicted[places, one], y[test][places, one])[0] for one in held_out.neurons[number]]
                medians.append(np.median(r))
        assert outcome.draws[number] == pytest.approx(np.mean(medians), abs=1e-9)


@pytest.mark.parametrize("name", ["rdm", "cka"])
def test_draws_of_matrices_from_halves(name):
    """From the definition, with the resampled neurons' own measure."""
    x, recording = made(n=30, neurons=8)
    metric = METRICS[name]
    target = metric.target(recording, draws=20)
    outcome = metric.compare(metric.represent(x), target)
    halves = list(half_samples(30, 20, target.content.source.seeds.images))
    for number, (chosen, pairs) in enumerate(target.content.source.resamples()):
        assert set(chosen) <= set(halves[number]) and np.linalg.norm(pairs) == pytest.approx(1)
        expected = metric.represent(x[chosen]).unit() @ pairs
        assert outcome.draws[number] == pytest.approx(expected, abs=2e-4)  # kept in float16


def test_resamples_beyond_what_is_kept_are_made_anew(monkeypatch):
    x, recording = made()
    kept = scored("rdm", x, recording, draws=20).draws
    monkeypatch.setattr(resampled, "KEPT_BYTES", 60 * 59 // 4 * 7)
    metric = METRICS["rdm"]
    target = metric.target(recording, draws=20)
    partly = metric.compare(metric.represent(x), target).draws
    assert len(target.content._kept) == 7
    np.testing.assert_array_equal(partly[:7], kept[:7])
    np.testing.assert_allclose(partly[7:], kept[7:], atol=2e-5)


@pytest.mark.parametrize("name", ["rdm", "rsa"])
def test_draws_of_subjects_keep_sessions_together(name):
    x, recording = matrices_of(subjects="AABB")
    target = METRICS[name].target(recording, draws=40)
    source = target.content.source
    assert len(source.rdms) == 2
    assert len(set(scored(name, x, recording, draws=40).draws)) == 40
    seen = set()
    for chosen, pairs in source.resamples():
        taken = [ranks(matrices.upper(one[np.ix_(chosen, chosen)]), "") for one in source.rdms]
        both = matrices.upper(source.rdms.mean(0)[np.ix_(chosen, chosen)])
        options = [*taken, ranks(both, "") if name == "rdm" else np.mean(taken, axis=0)]
        seen.add(int(np.argmin([np.abs(pairs - one).max() for one in options])))
        assert min(np.abs(pairs - one).max() for one in options) < 1e-12
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("name", NAMES)
def test_some_images(name):
    x, recording = made(n=60)
    places = np.random.default_rng(1).permutation(60)[:45]
    metric = METRICS[name]
    target = metric.target(recording.take(places))
    part, whole = metric.represent(x).take(places), metric.represent(x[places])
    assert len(part) == 45
    assert metric.compare(part, target).value == pytest.approx(metric.compare(whole, target).value, abs=1e-8)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(5, 15), levels=st.integers(2, 30), seed=st.integers(0, 999))
def test_ranks_of_some_pairs_by_counting(n, levels, seed):
    rng = np.random.default_rng(seed)
    matrix = np.triu(rng.integers(levels, size=(n, n)).astype(float), 1)
    matrix[0, 1:3] = -1, levels
    matrix += matrix.T
    chosen = np.concatenate([[0, 1, 2], 3 + np.flatnonzero(rng.uniform(size=n - 3) < 0.5)])
    pairs, some = matrix[np.triu_indices(n, 1)], matrix[np.ix_(chosen, chosen)][np.triu_indices(len(chosen), 1)]
    other = rng.normal(size=len(some))
    found = Dissimilarities(matrix)
    assert found.unit(chosen) @ ranks(other, "") == pytest.approx(spearmanr(some, other)[0], abs=1e-12)
    np.testing.assert_allclose(found.unit(), ranks(pairs, ""), atol=1e-12)


def test_images_without_a_response_are_left_out_of_a_draw():
    """Of two neurons, a draw often has one twice; then no image has a correlation and neurons are drawn anew."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(30, 2))
    y[:10, 0] = y[:10, 1] + 1
    recording = Recording("two", images(30), y, regions=("V4",) * 2)
    x, _ = made(30)
    found = scored("rdm", x, recording, draws=20).draws
    assert np.isfinite(found).all()


def test_the_interval_of_a_difference_covers_it():
    """Two feature sets see different parts of what drives the neurons; every recording has new images and neurons.

    Resampling both images and neurons is known to be wide (Owen 2007, Ann. Appl. Stat. 1:386), not too narrow.
    """
    fixed = np.random.default_rng(0)
    seen = {"one": np.arange(12) < 9, "other": np.arange(12) >= 4}
    maps = {name: fixed.normal(size=(12, 30)) for name in seen}
    metric, differences, intervals = METRICS["ridge"], [], []
    for number in range(40):
        rng = np.random.default_rng(number)
        latent = rng.normal(size=(100, 12)) * np.linspace(1, 0.3, 12)
        y = latent @ rng.normal(size=(12, 20)) + 2 * rng.normal(size=(100, 20))
        target = metric.target(Recording(f"{number}", images(100), y, regions=("V4",) * 20), draws=60)
        one, other = (metric.compare(metric.represent(latent * seen[k] @ maps[k]), target) for k in seen)
        differences.append(one.value - other.value)
        intervals.append(centred_interval(differences[-1], one.draws - other.draws))
    low, high = np.array(intervals).T
    assert np.mean((low <= np.mean(differences)) & (np.mean(differences) <= high)) >= 0.93
    assert (high - low).mean() / 2 < 2 * 1.96 * np.std(differences)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "plsr"}, "unknown neural metric 'plsr'; allowed: pls, ridge, ridgecv, rdm, rsa, cka"),
        ({"name": "rdm", "splits": 10}, "rdm has no splits, but was given 10; allowed: splits of pls, ridge, ridgecv"),
        ({"name": "ridge", "components": 25}, "ridge has no components, .* of pls$"),
        ({"name": "pls", "components": 0}, "0 PLS components"),
        ({"name": "pls", "splits": 0}, "0 splits"),
        ({"name": "ridge", "train_size": 1.0}, "train_size 1.0"),
    ],
)
def test_metrics_that_are_not(options, sentence):
    with pytest.raises(UserError, match=sentence):
        get_metric(**options)


def test_options_are_used():
    x, recording = made()
    metric = get_metric("pls", splits=4, train_size=0.5, components=3)
    target = metric.target(recording)
    assert [len(train) for train, _ in target.content.folds] == [30] * 4 and "3 components" in metric.summary
    assert metric.compare(metric.represent(x), target).value != scored("pls", x, recording).value


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("pls", lambda r: r.take(range(19)), "19 images are too few"),
        ("ridge", lambda r: replace(r, groups=("a",) * 59 + ("b",)), "group 'b' has 1 image"),
        ("cka", lambda r: replace(r, regions=("V4",) * 6 + ("IT",) * 6), "2 regions, V4, IT; .* one at a time"),
        ("rsa", lambda r: replace(r, subjects=("A",) * 12), "1 subject, A; rsa needs 2 or more"),
        ("rsa", lambda r: replace(r, subjects=("A",) * 11 + ("B",)), "subject B of made has 1 neuron"),
        ("rdm", lambda r: r.pick([0]), "made V4 has 1 neuron"),
        ("rdm", lambda r: replace(r, responses=r.responses * (np.arange(60) != 7)[:, None, None, None]), "image 8"),
        ("ridgecv", lambda r: replace(r, responses=r.responses * (np.arange(12) != 2)[:, None, None]), "neuron 3 of"),
        ("pls", lambda _: matrices_of()[1], "rdms has RDMs only, which pls cannot use; allowed: rdm, rsa"),
    ],
)
def test_recordings_that_do_not_fit(name, change, sentence):
    with pytest.raises(UserError, match=sentence):
        METRICS[name].target(change(made()[1]))


@pytest.mark.parametrize(("draws", "sentence"), [(-1, "-1 draws"), (5, "5 resamples are too few")])
def test_draws_that_cannot_be(draws, sentence):
    with pytest.raises(UserError, match=sentence):
        METRICS["cka"].target(made()[1], draws=draws)


def test_layers_that_do_not_fit():
    x, recording = made()
    with pytest.raises(UserError, match="layer has 59 images, recording made 60"):
        scored("cka", x[1:], recording)
    with pytest.raises(UserError, match="25 PLS components are more than 54 images to fit and 20 features allow"):
        scored("pls", x[:, :20], recording)
    for name in NAMES:
        with pytest.raises(UserError, match=r"constant|all equal"):
            METRICS[name].represent(np.ones((60, 5)))
        with pytest.raises(UserError, match="NaN"):
            METRICS[name].represent(np.where(x > 2, np.nan, x))


def test_a_split_in_which_no_neuron_varies():
    x, _ = made()
    y = np.zeros((60, 2))
    y[3] = 1
    with pytest.raises(UserError, match="no neuron varies over both the fitted and the tested images of split 1"):
        scored("ridge", x, Recording("once", images(60), y, regions=("V4",) * 2))


def test_ceiled():
    assert METRICS["pls"].ceiled(-0.5, 0.5) == -0.5
    assert METRICS["rsa"].ceiled(-0.25, 0.5) == -0.5
    with pytest.raises(UserError, match="ceiling of 0"):
        METRICS["pls"].ceiled(0.5, 0)


def test_what_a_metric_says_of_itself():
    assert tuple(METRICS) == NAMES
    for name, metric in METRICS.items():
        assert metric.name == name and metric.summary.endswith(".") and metric.source and metric.brainscore
        assert metric.takes in ("responses", "both") and "images" in metric.over
