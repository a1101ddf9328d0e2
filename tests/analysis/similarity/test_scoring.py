"""Scores with intervals and chance levels are the measure itself, on all images, on halves and on mismatched ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from localsim.analysis.similarity import MEASURES, get_measure, score_pairs, similarity
from localsim.analysis.similarity.measure import Numerics
from localsim.analysis.statistics import centred_interval, half_samples, p_value, resample, shuffles
from localsim.errors import UserError

F64 = Numerics(torch.device("cpu"), torch.float64)
N = 32
SOME = ["cka_debiased", "rsa", "procrustes", "svcca", "mutual_knn", "predictivity", "predictivity_r"]


def three_layers(n=N, seed=0):
    """Return three layers, the first two with common causes, the third without."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(n, 3))
    mixed = [causes @ rng.normal(size=(3, width)) + 0.3 * rng.normal(size=(n, width)) for width in (6, 9)]
    return {"a": mixed[0], "b": mixed[1], "c": rng.normal(size=(n, 7))}


def scored(name, pairs, **options):
    measure = get_measure(name)
    layers = {layer: measure.represent(x, F64) for layer, x in three_layers().items()}
    return score_pairs(measure, layers, pairs, N, **options), layers


PAIRS = [("a", "b"), ("a", "c"), ("b", "b"), ("c", "a")]


@pytest.mark.parametrize("name", SOME)
def test_values_are_the_measures_whatever_else_is_asked_for(name):
    x = three_layers()
    plain, _ = scored(name, PAIRS)
    full, _ = scored(name, PAIRS, resamples=20, permutations=3)
    assert list(plain) == PAIRS
    for a, b in PAIRS:
        assert plain[a, b].value == pytest.approx(get_measure(name)(x[a], x[b]), abs=1e-12)
        assert full[a, b].value == plain[a, b].value
        assert (plain[a, b].low, plain[a, b].high, plain[a, b].chance, plain[a, b].p) == (None,) * 4
        assert plain[a, b].draws.shape == (0,) and full[a, b].draws.shape == (20,)
        assert plain[a, b].n == N


@pytest.mark.parametrize("name", [name for name in SOME if MEASURES[name].terms is None])
def test_draws_are_the_measure_of_halves_of_the_images(name):
    x, measure = three_layers(), get_measure(name)
    found, _ = scored(name, PAIRS, resamples=20, seed=5)
    for a, b in PAIRS:
        afresh = [measure(x[a][half], x[b][half]) for half in half_samples(N, 20, 5)]
        np.testing.assert_allclose(found[a, b].draws, afresh, atol=1e-7)  # a root of rounding
        bounds = measure.low, measure.high
        assert (found[a, b].low, found[a, b].high) == centred_interval(found[a, b].value, found[a, b].draws, *bounds)


def test_no_interval_leaves_the_range_of_its_measure():
    x, measure = three_layers(), get_measure("cka_debiased")
    low = 0.5 * (1 + measure(x["a"], x["b"]))
    score = similarity(x["a"], x["b"], replace(measure, low=low - 1, high=low), resamples=20)
    assert score.low >= low - 1 and score.high <= low and score.draws.max() > low - 1
    assert centred_interval(0.5, [0, 1, 2], 0.2, 0.8) == (0.2, 0.8)


def test_a_half_that_cannot_be_scored_is_named_as_such():
    x = np.random.default_rng(0).normal(size=(30, 20))
    with pytest.raises(
        UserError, match=r"an interval takes half of the 30 images at a time, and of these: .*resamples=0"
    ):
        similarity(x, x[:, ::-1].copy(), get_measure("cca"), resamples=20)


@pytest.mark.parametrize("name", [name for name in SOME if MEASURES[name].terms is not None])
def test_draws_of_a_ratio_of_sums_weight_images_by_how_often_they_are_drawn(name):
    measure = get_measure(name)
    found, layers = scored(name, PAIRS, resamples=20, seed=5)
    assert measure.terms is not None
    for a, b in PAIRS:
        terms = measure.terms(*(measure.transform(layers[layer]) for layer in (a, b))).numpy()
        assert terms[:, 0].sum() / terms[:, 1].sum() == pytest.approx(found[a, b].value, abs=1e-9)
        explicit = [terms[drawn, 0].sum() / terms[drawn, 1].sum() for drawn in resample(N, 20, 5)]
        np.testing.assert_allclose(found[a, b].draws, explicit, atol=1e-9)


@pytest.mark.parametrize("name", SOME)
def test_the_chance_level_is_the_mean_over_mismatched_images(name):
    x, measure = three_layers(), get_measure(name)
    found, _ = scored(name, PAIRS, permutations=9, seed=2)
    for a, b in PAIRS:
        null = [measure(x[a], x[b][order]) for order in shuffles(N, 9, 2)]
        assert found[a, b].chance == pytest.approx(np.mean(null), abs=1e-9)
        assert found[a, b].p == p_value(found[a, b].value, null, larger=measure.kind == "similarity")
    assert found["a", "b"].p == found["b", "b"].p == 1 / 10, "never 0"


def test_chance_is_zero_where_debiased_and_not_where_biased():
    x = three_layers(n=40)
    debiased = similarity(x["a"], x["b"], get_measure("cka_debiased"), resamples=0, permutations=100)
    biased = similarity(x["a"], x["b"], get_measure("cka"), resamples=0, permutations=100)
    assert debiased.chance == pytest.approx(0, abs=0.02)
    assert biased.chance is not None and biased.chance > 0.04
    assert debiased.p == biased.p == 1 / 101
    unrelated = similarity(x["a"], x["c"], get_measure("cka_debiased"), resamples=0, permutations=100)
    assert unrelated.p is not None and unrelated.p > 0.02


def test_small_distances_are_the_extreme_ones():
    x = three_layers()
    score = similarity(x["a"], x["b"], get_measure("procrustes"), resamples=0, permutations=19)
    assert score.p == 1 / 20 and score.chance is not None and score.chance > score.value


def test_draws_are_shared_so_that_differences_have_intervals():
    found, _ = scored("cka_debiased", [("a", "b"), ("b", "a"), ("a", "c")], resamples=40)
    np.testing.assert_allclose(found["a", "b"].draws, found["b", "a"].draws, atol=1e-12)
    low, high = centred_interval(
        found["a", "b"].value - found["a", "c"].value, found["a", "b"].draws - found["a", "c"].draws
    )
    assert low > 0 and high < 1.2
    again, _ = scored("cka_debiased", [("a", "b")], resamples=40)
    np.testing.assert_array_equal(again["a", "b"].draws, found["a", "b"].draws, "whichever pairs come with it")


def test_layers_are_given_up_only_where_they_are_needed_once():
    assert scored("cka", PAIRS)[1] == {}
    assert set(scored("cka", PAIRS, resamples=20)[1]) == set("abc")
    assert set(scored("cka", PAIRS, permutations=1)[1]) == set("abc")


def test_a_score_prints_what_it_knows():
    x = three_layers()
    measure = get_measure("cka_debiased")
    full = similarity(x["a"], x["b"], measure, resamples=20, permutations=9)
    assert str(full) == (
        f"{full.value:.3f} [{full.low:.3f}, {full.high:.3f}], chance {full.chance:.3f} (p = 0.1), n = {N}"
    )
    assert str(similarity(x["a"], x["b"], measure, resamples=0)) == f"{full.value:.3f}, n = {N}"


def test_the_same_seed_gives_the_same_score_and_tensors_what_arrays_give():
    x = three_layers()
    measure = get_measure("rsa")
    one, two, other = (
        similarity(x["a"], x["b"], measure, resamples=20, permutations=5, seed=seed) for seed in (1, 1, 2)
    )
    assert str(one) == str(two)
    np.testing.assert_array_equal(one.draws, two.draws)
    assert one.value == other.value and (one.draws != other.draws).any()
    tensors = [torch.from_numpy(x[layer]) for layer in "ab"]
    assert similarity(*tensors, measure, resamples=20, permutations=5, seed=1).value == one.value


def test_repeated_measurements_count_images_and_not_repeats():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 3, 12, 5))
    score = similarity(x, y, get_measure("rsa_crossnobis_pearson"), resamples=20)
    assert score.n == 12 and len(score.draws) == 20


@pytest.mark.parametrize(
    ("n", "options", "sentence"),
    [(3, {}, "3 images are too few"), (7, {"resamples": 20}, "an interval over 7 images is not possible"),
     (12, {"resamples": 5}, "5 resamples are too few")],
)  # fmt: skip
def test_too_little_is_a_sentence(n, options, sentence):
    x = three_layers(n=n)
    with pytest.raises(UserError, match=sentence):
        similarity(x["a"], x["b"], get_measure("cka"), **options)
