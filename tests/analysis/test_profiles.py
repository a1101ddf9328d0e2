"""Profiles against means taken by hand, for made-up scores of made-up runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from localsim.analysis.profiles import ENOUGH_SEEDS, profile_of, seed_weights
from localsim.analysis.regimes import Layer
from localsim.analysis.similarity.scoring import Score

DEPTHS = {"low": 0.5, "high": 1.0}


def layers(regime, seeds=(0, 1), depths=DEPTHS):
    return [Layer(regime, seed, None, name, depth) for seed in seeds for name, depth in depths.items()]


def of(value, draws=()):
    low, high = (value - 0.1, value + 0.1) if len(draws) else (None, None)
    return Score(value, low, high, 50, None, None, np.asarray(draws, dtype=float))


def scorer(values):
    """Return a function of two layers that looks a score up by (regime, seed, name) twice; 0 for any other pair."""

    def score(a, b):
        return of(values.get(((a.regime, a.seed, a.name), (b.regime, b.seed, b.name)), 0.0))

    return score


def test_pairs_of_the_same_seed_and_of_different_seeds_are_apart():
    values = {
        (("a", 0, "low"), ("b", 0, "low")): 0.9,
        (("a", 1, "low"), ("b", 1, "low")): 0.7,
        (("a", 0, "low"), ("b", 1, "low")): 0.4,
        (("a", 1, "low"), ("b", 0, "low")): 0.2,
        (("a", 0, "high"), ("b", 1, "high")): 0.6,
    }
    same = profile_of(scorer(values), layers("a"), layers("b"), same_seed=True)
    different = profile_of(scorer(values), layers("a"), layers("b"))
    assert [(point.layer, point.depth, point.seed_pairs, point.same_seed) for point in same] == [
        ("low", 0.5, 2, True), ("high", 1.0, 2, True),
    ]  # fmt: skip
    assert [point.value for point in same] == pytest.approx([0.8, 0])
    assert [point.value for point in different] == pytest.approx([0.3, 0.3])
    assert {(point.low, point.high, point.n, point.same_seed) for point in different} == {(None, None, 50, False)}
    assert str(different[0]) == "low          0.300"


def test_the_floor_is_two_seeds_of_one_regime_each_pair_once():
    regime = layers("a", seeds=(0, 1, 2))
    values = {((("a", i, "low")), ("a", j, "low")): 0.1 * (i + j) for i, j in itertools.combinations(range(3), 2)}
    low, high = profile_of(scorer(values), regime, regime)
    assert low.seed_pairs == high.seed_pairs == 3
    assert low.value == pytest.approx(np.mean([0.1, 0.2, 0.3]))
    assert profile_of(scorer(values), regime, regime, same_seed=True) == []
    alone = layers("a", seeds=(0,))
    assert profile_of(scorer(values), alone, alone) == []


def test_an_asymmetric_measure_counts_both_orders():
    regime = layers("a")
    values = {(("a", 0, "low"), ("a", 1, "low")): 0.9, (("a", 1, "low"), ("a", 0, "low")): 0.5}
    low, _ = profile_of(scorer(values), regime, regime, symmetric=False)
    assert (low.seed_pairs, low.value) == (1, pytest.approx(0.7)), "one pair of runs, both orders"
    forth, _ = profile_of(scorer(values), regime, regime, symmetric=True)
    assert (forth.seed_pairs, forth.value) == (1, pytest.approx(0.9))


def test_layers_correspond_by_depth():
    deep = layers("b", depths={"x": 0.1, "y": 0.42, "z": 0.55, "top": 0.95})
    values = {
        (("a", i, name), ("b", j, other)): value
        for i, j in ((0, 1), (1, 0))
        for name, other, value in [("low", "z", 0.3), ("low", "y", 0.9), ("high", "top", 0.6)]
    }
    points = profile_of(scorer(values), layers("a"), deep)
    assert [(point.layer, point.value) for point in points] == [("low", pytest.approx(0.3)), ("high", 0.6)]
    points = profile_of(scorer({}), deep, layers("a"))
    assert [point.layer for point in points] == ["y", "z", "top"], "x has no counterpart within a tenth of the trunk"


def test_of_layers_at_one_depth_the_namesake_corresponds():
    depths = {"conv": 0.5, "block": 0.5, "readout": 0.5}
    values = {
        (("a", i, name), ("b", 1 - i, name)): value
        for i in range(2)
        for name, value in zip(depths, (0.1, 0.2, 0.3), strict=True)
    }
    points = profile_of(scorer(values), layers("a", depths=depths), layers("b", depths=depths))
    assert {point.layer: point.value for point in points} == pytest.approx({"conv": 0.1, "block": 0.2, "readout": 0.3})


def test_networks_without_seeds_count_as_different():
    one, other = layers("a", seeds=(None,)), layers("b", seeds=(None,))
    score = scorer({(("a", None, "low"), ("b", None, "low")): 0.5})
    low, _ = profile_of(score, one, other)
    assert (low.value, low.same_seed, low.seed_pairs) == (0.5, None, 1)
    assert profile_of(score, one, other, same_seed=True) == []
    mixed = profile_of(scorer({}), layers("a"), other)
    assert [(point.seed_pairs, point.same_seed) for point in mixed] == [(2, None)] * 2


def test_pairs_that_were_not_compared_are_left_out():
    def score(a, b):
        return of(0.5) if a.name == "low" else None

    assert [point.layer for point in profile_of(score, layers("a"), layers("b"))] == ["low"]


def spread_of(seeds, value_of, same_seed=False, draws=400, sd=0.0):
    """Return the point and the half-width of the interval, for scores with a value per pair of seeds."""
    noise = sd * np.random.default_rng(0).normal(size=draws)

    def score(a, b):
        return of(value_of(a.seed, b.seed), value_of(a.seed, b.seed) + noise)

    one, other = (layers(regime, seeds=range(seeds), depths={"low": 1.0}) for regime in "ab")
    (point,) = profile_of(score, one, other, same_seed=same_seed)
    assert point.low is not None and point.high is not None
    return point, (point.high - point.low) / 2


def test_intervals_of_one_pair_are_over_images_alone():
    point, half = spread_of(1, lambda i, j: 0.5, same_seed=True, sd=0.05, draws=4000)
    assert point.seed_pairs == 1 and half == pytest.approx(1.96 * 0.05, rel=0.05)


def test_intervals_grow_with_what_seeds_differ_by():
    effect = np.random.default_rng(4).normal(scale=0.1, size=8)
    point, half = spread_of(8, lambda i, j: effect[i], same_seed=True)
    assert point.value == pytest.approx(effect.mean())
    assert half == pytest.approx(1.96 * effect.std() / np.sqrt(8), rel=0.2), "runs of a seed are drawn together"
    point, alone = spread_of(8, lambda i, j: effect[i] + effect[j])
    assert point.seed_pairs == 56
    assert alone == pytest.approx(1.96 * np.sqrt(2) * effect.std() / np.sqrt(8), rel=0.25), "within each regime apart"
    _, both = spread_of(8, lambda i, j: effect[i], same_seed=True, sd=0.1)
    assert both == pytest.approx(np.hypot(half, 1.96 * 0.1), rel=0.2)
    _, none = spread_of(8, lambda i, j: 0.3)
    assert none == pytest.approx(0, abs=1e-12)


def test_of_few_seeds_runs_are_held_fixed():
    """However much they differ: two of them, drawn again and again, do not tell by how much."""
    for seeds in (2, ENOUGH_SEEDS - 1):
        _, half = spread_of(seeds, lambda i, j: 0.1 * i)
        assert half == pytest.approx(0, abs=1e-12)


def test_a_draw_without_a_pair_of_different_runs_is_drawn_again():
    """Of four draws of two runs some hold one run only."""
    ends = ((("a", "0"), ("a", "1")),)
    assert (seed_weights(ends, 40, False) == 1).all()


def test_a_point_says_what_its_interval_is_over():
    """Of two seeds a floor has one pair, whose interval knows of images only."""
    draws = np.linspace(-0.1, 0.1, 40)

    def score(_a, _b):
        return Score(0.95, 0.9, 1.0, 60, None, None, 0.95 + draws)

    two, four, five = ([Layer("a", seed, None, "low", 0.5) for seed in range(seeds)] for seeds in (2, 4, 5))
    said = ["images", "images; runs held fixed", "images and seeds"]
    assert [profile_of(score, runs, runs)[0].over for runs in (two, four, five)] == said
    (point,) = profile_of(score, two, two, bounds=(0.0, 1.0))
    assert point.high == 1.0
