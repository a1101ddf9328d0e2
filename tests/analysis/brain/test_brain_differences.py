"""Differences of regimes: what is paired with what, and intervals that know that both saw the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from localsim.analysis import brain
from localsim.analysis.brain.contrasts import BrainDifference, all_differences, differences, references_of
from localsim.analysis.brain.means import profile
from localsim.analysis.brain.metrics import get_metric
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.brain.scores import BrainScore, BrainScores
from localsim.analysis.profiles import ENOUGH_SEEDS, over_seeds, seed_weights
from localsim.analysis.regimes import Layer
from localsim.analysis.statistics import centred_interval
from localsim.data import ImageSet
from localsim.errors import UserError

DRAWS = 400


def layers_of(regime: str, seed: int | None, depths=(0.5, 1.0), names=("low", "high")) -> list[Layer]:
    return [Layer(regime, seed, None, name, depth) for name, depth in zip(names, depths, strict=True)]


NETWORKS = [
    *layers_of("untrained", 0), *layers_of("untrained", 1),
    *layers_of("blockwise", 0), *layers_of("blockwise", 1),
    *layers_of("end_to_end", 1), *layers_of("end_to_end", 2),
    *layers_of("loco", 5, depths=(0.45, 0.75)), *layers_of("loco", 6, depths=(0.45, 0.75)),
    Layer("pixels", None, None, "pixels", 0.0), Layer("gabor", None, None, "gabor", 0.0),
    *(Layer("end_to_end", 1, 4, name, depth) for name, depth in (("low", 0.5), ("high", 1.0))),
]  # fmt: skip


def made(layers=NETWORKS, resamples: int = DRAWS, **record) -> BrainScores:
    """Return scores that are drawn, with a difficulty in every draw that all layers share."""
    rng = np.random.default_rng(0)
    scores = {}
    for region in ("V4", "IT"):
        difficulty = rng.normal(size=resamples)
        for layer in layers:
            value, own = rng.uniform(0.2, 0.6), 0.01 * rng.normal(size=resamples)
            draws = value + 0.05 * difficulty + own
            scores["A", region, layer] = BrainScore(value, draws, None, None, None, 50, 9, -1, 1)
    untrained = {"blockwise": "untrained", "end_to_end": "untrained", "loco": None}
    about = {"pooled": [], "baselines": ["pixels", "gabor"], "end_to_end": ["end_to_end"], "resamples": resamples}
    return BrainScores(get_metric("ridge"), tuple(layers), scores, {}, untrained, [], {**about, **record})


def score(scores: BrainScores, region: str, regime: str, seed: int | None, name: str) -> BrainScore:
    (layer,) = [x for x in scores.finished(regime) if (x.seed, x.name) == (seed, name)]
    return scores.score("A", region, layer)


def only(found: list, region: str, layer: str):
    (one,) = [x for x in found if (x.region, x.layer) == (region, layer)]
    return one


def test_a_difference_is_the_mean_over_pairs_of_the_same_seed():
    scores = made()
    found = differences(scores, "blockwise", "untrained")
    assert [(one.region, one.layer) for one in found] == list(itertools.product(("V4", "IT"), ("low", "high")))
    for one in found:
        pairs = [[score(scores, one.region, regime, seed, one.layer) for regime in ("blockwise", "untrained")]
                 for seed in (0, 1)]  # fmt: skip
        assert one.value == pytest.approx(np.mean([a.value - b.value for a, b in pairs]))
        assert (one.pairs, one.same_seed) == (2, True) and one.reference_layer == one.layer
        assert one.each == tuple(a.value - b.value for a, b in pairs)
        assert one.over == f"{scores.metric.over}; runs held fixed"
        expected = centred_interval(one.value, np.mean([a.draws - b.draws for a, b in pairs], axis=0))
        assert (one.low, one.high) == pytest.approx(expected, abs=1e-12)
        assert (one.n, one.neurons, one.metric, one.recording) == (50, 9, "ridge", "A")
        assert str(one) == f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"


def test_of_seeds_that_only_one_side_has_none_is_paired():
    scores = made()
    one = only(differences(scores, "blockwise", "end_to_end"), "V4", "low")
    a, b = score(scores, "V4", "blockwise", 1, "low"), score(scores, "V4", "end_to_end", 1, "low")
    assert one.value == a.value - b.value and (one.pairs, one.same_seed) == (1, True)
    assert one.over == f"{scores.metric.over}; runs held fixed"
    assert (one.low, one.high) == pytest.approx(centred_interval(one.value, a.draws - b.draws), abs=1e-12)


def test_without_a_shared_seed_all_pairs_are_taken_of_layers_at_one_depth():
    scores = made()
    found = differences(scores, "loco", "blockwise", [("A", "IT")])
    assert [(one.layer, one.reference_layer, one.depth) for one in found] == [("low", "low", 0.45)], "0.75 meets none"
    (one,) = found
    values = [
        score(scores, "IT", "loco", mine, "low").value - score(scores, "IT", "blockwise", other, "low").value
        for mine in (5, 6)
        for other in (0, 1)
    ]
    assert one.value == pytest.approx(np.mean(values)) and (one.pairs, one.same_seed) == (4, False)
    assert one.each == tuple(values) and one.over.endswith("; runs held fixed")


def runs_of(regime: str, seeds: range) -> list[Layer]:
    return [Layer(regime, seed, None, "low", 0.5) for seed in seeds]


@pytest.mark.parametrize(("number", "over"), [(ENOUGH_SEEDS - 1, False), (ENOUGH_SEEDS, True), (7, True)])
def test_of_enough_seeds_intervals_are_over_seeds_too(number, over):
    scores = made([*runs_of("untrained", range(number)), *runs_of("blockwise", range(number))])
    (one,) = differences(scores, "blockwise", "untrained", [("A", "V4")])
    pairs = [[score(scores, "V4", regime, seed, "low") for regime in ("blockwise", "untrained")]
             for seed in range(number)]  # fmt: skip
    draws = np.stack([a.draws - b.draws for a, b in pairs])
    runs = [(Layer("a", s, None, "", 0.0), Layer("b", s, None, "", 0.0)) for s in range(number)]
    spread = over_seeds(runs, draws, True) if over else draws.mean(0)
    assert (one.low, one.high) == pytest.approx(centred_interval(one.value, spread), abs=1e-12)
    assert one.over == scores.metric.over + (" and seeds" if over else "; runs held fixed")
    (mean,) = profile(scores, ("A", "V4"), "blockwise")
    own = np.stack([a.draws for a, _ in pairs])
    np.testing.assert_allclose(mean.draws, over_seeds(runs, own, True) if over else own.mean(0), atol=1e-12)
    assert mean.seeds == tuple(range(number)) and mean.chance is mean.ceiled is None


def test_seeds_have_to_be_enough_on_both_sides():
    """Three runs of one and two of another are five, but neither is enough to know how runs differ."""
    few = made([*runs_of("loco", range(3)), *runs_of("blockwise", range(3, 5))])
    (one, _) = differences(few, "loco", "blockwise")
    assert one.pairs == 6 and one.over.endswith("; runs held fixed")
    many = made([*runs_of("loco", range(5)), *runs_of("blockwise", range(5, 10))])
    (one, _) = differences(many, "loco", "blockwise")
    assert one.pairs == 25 and one.over.endswith(" and seeds")


@pytest.mark.parametrize(("number", "words"), [(4, "; runs held fixed"), (5, " and seeds")])
def test_a_baseline_counts_as_no_seed(number, words):
    scores = made([*runs_of("blockwise", range(number)), Layer("gabor", None, None, "gabor", 0.0)])
    (one, _) = differences(scores, "blockwise", "gabor")
    assert one.over == scores.metric.over + words


def test_the_difference_of_each_pair_is_in_the_table():
    scores = made()
    for one in all_differences(scores):
        assert len(one.each) == one.pairs and one.value == pytest.approx(np.mean(one.each), abs=1e-12)
        row = one.to_row()
        assert list(row) == list(BrainDifference.__dataclass_fields__)
        assert [float(text) for text in row["each"].split()] == pytest.approx(one.each, rel=1e-5)
        assert {**row, "each": one.each} == {name: getattr(one, name) for name in row}


def test_a_baseline_is_held_against_every_layer():
    scores = made()
    found = differences(scores, "blockwise", "gabor")
    assert [(one.layer, one.reference_layer) for one in found] == [("low", "gabor"), ("high", "gabor")] * 2
    for one in found:
        gabor = score(scores, one.region, "gabor", None, "gabor").value
        values = [score(scores, one.region, "blockwise", seed, one.layer).value - gabor for seed in (0, 1)]
        assert one.value == pytest.approx(np.mean(values)) and (one.pairs, one.same_seed) == (2, None)
    (between,) = differences(scores, "gabor", "pixels", [("A", "V4")])
    assert (between.layer, between.reference_layer, between.same_seed) == ("gabor", "pixels", None)
    with pytest.raises(UserError, match="gabor is a baseline, which has no layers; ask for blockwise minus gabor"):
        differences(scores, "gabor", "blockwise")


def test_what_is_hard_for_both_sides_is_in_neither_interval():
    """Drawn apart, the images and neurons that make all layers' scores rise and fall would hide the difference."""
    scores = made()
    for one in differences(scores, "blockwise", "end_to_end"):
        a, b = (score(scores, one.region, regime, 1, one.layer) for regime in ("blockwise", "end_to_end"))
        order = np.random.default_rng(0).permutation(DRAWS)
        low, high = centred_interval(one.value, a.draws - b.draws[order])
        assert one.low is not None and one.high is not None and one.high - one.low < (high - low) / 3


def test_the_same_in_a_recording_whose_neurons_are_unequally_hard():
    """Two noisy views of what made the responses; some neurons are noise, so that scores depend on those drawn."""
    rng = np.random.default_rng(0)
    causes = rng.normal(size=(80, 6))
    noise = np.where(np.arange(12) % 2, 0.3, 5.0)
    responses = causes @ rng.normal(size=(6, 12)) + noise * rng.normal(size=(80, 12))
    shown = ImageSet(torch.zeros((80, 3, 2, 2), dtype=torch.uint8), None, None)
    views = [{"one": causes + 0.2 * rng.normal(size=causes.shape)} for _ in range(2)]
    scores = brain.score(
        *views, recordings=Recording("A", shown, responses), metric="ridge", resamples=200, controls=[]
    )
    (one,) = differences(scores, "arrays 1", "arrays 2")
    first, second = (scores.score("A", "unknown", layer) for layer in scores.layers)
    assert one.value == first.value - second.value and one.low is not None and one.high is not None
    other = centred_interval(one.value, first.draws - np.roll(second.draws, 1))
    assert one.high - one.low < 0.5 * (other[1] - other[0])


def test_snapshots_are_no_part_of_a_difference():
    (one, *_) = differences(made(), "end_to_end", "blockwise", [("A", "V4")])
    assert one.pairs == 1


def test_what_a_regime_is_held_against():
    scores = made()
    assert references_of(scores, "blockwise") == ["untrained", "end_to_end"]
    assert references_of(scores, "end_to_end") == ["untrained"]
    assert references_of(scores, "loco") == ["end_to_end"]
    found = all_differences(scores)
    assert list(dict.fromkeys((one.regime, one.reference) for one in found)) == [
        ("blockwise", "untrained"), ("blockwise", "end_to_end"), ("end_to_end", "untrained"), ("loco", "end_to_end"),
    ]  # fmt: skip
    wide = made(end_to_end=["end_to_end", "loco"])
    assert references_of(wide, "blockwise") == ["untrained", "end_to_end", "loco"]


def test_without_resamples_there_are_values_only():
    for one in all_differences(made(resamples=0)):
        assert one.low is one.high is None and str(one) == f"{one.value:+.3f}"


def test_unknown_regimes_are_refused():
    with pytest.raises(UserError, match="unknown regime 'hebb'; allowed: untrained, blockwise, end_to_end, loco"):
        differences(made(), "hebb", "untrained")


def test_how_seeds_are_drawn_is_made_once_for_all_regions_and_layers():
    """Else a thousand draws for hundreds of differences take minutes."""
    seed_weights.cache_clear()
    scores = made([*runs_of("untrained", range(5)), *runs_of("blockwise", range(5))])
    assert len(differences(scores, "blockwise", "untrained")) == 2
    assert (seed_weights.cache_info().misses, seed_weights.cache_info().hits) == (1, 1), "one for each pair of regimes"
