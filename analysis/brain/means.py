"""Scores of a regime on average over its seeds, and the ceiling in the units of scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from localsim.analysis.profiles import mean_draws
from localsim.analysis.regimes import Layer
from localsim.analysis.statistics import centred_interval

if TYPE_CHECKING:
    from localsim.analysis.brain.scores import BrainScore, BrainScores, Place


@dataclass(frozen=True, eq=False)
class SeedMean:
    """The score of one layer of a regime for one region, on average over seeds.

    Attributes:
        name, depth: of the layer.
        value: the mean.
        draws: `(draws,)` the mean of every resample, of seeds too from `ENOUGH_SEEDS` on.
        interval: 95 %, None without resamples.
        each: the score of each seed.
        seeds: the seeds, None for networks that have none.
        chance, ceiled: means over seeds; None where scores have none.
    """

    name: str
    depth: float
    value: float
    draws: np.ndarray
    interval: tuple[float, float] | None
    each: tuple[float, ...]
    seeds: tuple[int | None, ...]
    chance: float | None
    ceiled: float | None


def seed_mean(name: str, depth: float, scores: Mapping[int | None, BrainScore]) -> SeedMean:
    """Return the mean of scores of one layer by seed."""
    each = tuple(one.value for one in scores.values())
    value, draws = fmean(each), np.stack([one.draws for one in scores.values()])
    runs = [Layer("", seed, None, name, depth) for seed in scores]
    draws = mean_draws([(run, run) for run in runs], draws, same_seed=True)
    one = next(iter(scores.values()))
    interval = centred_interval(value, draws, one.low, one.high) if draws.size else None
    chance, ceiled = (
        None if None in (parts := [getattr(one, part) for one in scores.values()]) else fmean(parts)
        for part in ("chance", "ceiled")
    )
    return SeedMean(name, depth, value, draws, interval, each, tuple(scores), chance, ceiled)


def counted(scores: BrainScores, place: Place) -> str:
    """Return how many images, and neurons or matrices, a place has, in words."""
    one = scores.score(*place, scores.layers[0])
    of = scores.record["recordings"][members(scores, place)[0][0]]["of"]
    single = {"neurons": "neuron", "matrices": "matrix"}
    return f"{one.n} images, {one.neurons} {of if one.neurons > 1 else single[of]}"


def profile(scores: BrainScores, place: Place, regime: str) -> list[SeedMean]:
    """Return the mean over seeds of each layer of a regime's networks as they ended, lowest first."""
    layers: dict[str, dict[int | None, Layer]] = {}
    for layer in scores.finished(regime):
        layers.setdefault(layer.name, {})[layer.seed] = layer
    return [
        seed_mean(name, next(iter(own.values())).depth, {seed: scores.score(*place, one) for seed, one in own.items()})
        for name, own in layers.items()
    ]


def raw_ceiling(scores: BrainScores, place: Place) -> tuple[float, float] | None:
    """Return the lower and upper end of the raw scores whose `ceiled` is 1, equal where there is one ceiling.

    Of a mean over recordings it is the mean of theirs: what a network at the ceiling of each would reach.
    """
    ceilings = [scores.score(*one, scores.layers[0]).ceiling for one in members(scores, place)]
    found = [one for one in ceilings if one is not None]
    if not found or len(found) < len(ceilings):
        return None
    root = np.sqrt if scores.metric.squared else float
    ends = [[root(one.value if one.lower is None else one.lower), root(one.value)] for one in found]
    low, high = np.mean(ends, axis=0)
    return float(low), float(high)


def members(scores: BrainScores, place: Place) -> list[Place]:
    """Return the recordings, and their region, that a place is the mean over; else the place itself."""
    for group in scores.record["pooled"]:
        if (group["recording"], group["region"]) == place:
            return [(one, place[1]) for one in group["of"]]
    return [place]
