"""Similarity of two regimes against depth, on average over their seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from localsim.analysis.regimes import Layer
from localsim.analysis.similarity.scoring import Score
from localsim.analysis.statistics import centred_interval
from localsim.rng import key

CORRESPOND = 0.1
"""Layers of two networks correspond where their depths differ by no more than this share of the trunk."""
ENOUGH_SEEDS = 5
"""From how many runs on an interval is over seeds too: of two, redrawing covers the truth half of the time."""


@dataclass(frozen=True)
class ProfilePoint:
    """How alike two regimes are at one depth.

    Attributes:
        layer: name of the layer, in the first regime where the two differ.
        depth: the share of the trunk that lies in and below it.
        value: mean over pairs of runs.
        low, high: its 95 % interval; None without resamples.
        over: what the interval is over: `images and seeds` from `ENOUGH_SEEDS` on, `images; runs held fixed` with
            fewer, `images` where there is one pair of runs.
        n: images.
        seed_pairs: how many pairs of runs the mean is over.
        same_seed: whether the runs of a pair share a seed, thus their initialisation and order of images; None where
            networks have no seed.
    """

    layer: str
    depth: float
    value: float
    low: float | None
    high: float | None
    over: str
    n: int
    seed_pairs: int
    same_seed: bool | None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.layer:<12} {self.value:.3f}{interval}"


def profile_of(
    score: Callable[[Layer, Layer], Score | None],
    first: Sequence[Layer],
    second: Sequence[Layer],
    *,
    same_seed: bool = False,
    symmetric: bool = True,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> list[ProfilePoint]:
    """Return how alike corresponding layers of two regimes are, lowest first.

    Runs of one seed start from the same weights and see the same images in the same order, so what they share need not
    come from their rules. Pairs of different seeds are therefore kept apart from pairs of the same seed: only they can
    be held against the floor, two seeds of one regime.

    Args:
        score: of two layers.
        first, second: layers of all runs of the two regimes; the same list for a regime and itself.
        same_seed: which pairs of runs; networks without seeds count as of different ones.
        symmetric: whether both orders of a pair have one score.
        bounds: the range of scores, which no interval leaves.

    Returns:
        A point for each layer name of the first regime that has a counterpart in the second; none where there are no
        such pairs of runs.
    """
    points = []
    among_themselves = list(first) == list(second)
    for name in dict.fromkeys(layer.name for layer in first):
        pairs: dict[tuple[Layer, Layer], Score] = {}
        for a in first:
            if a.name != name:
                continue
            for b in counterparts(a, second):
                if among_themselves and (a.seed == b.seed or (symmetric and (b, a) in pairs)):
                    continue
                related = a.seed == b.seed and a.seed is not None
                if related == same_seed and (found := score(a, b)) is not None:
                    pairs[a, b] = found
        if pairs:
            points.append(_point(pairs, same_seed, bounds))
    return points


def counterparts(layer: Layer, others: Sequence[Layer]) -> list[Layer]:
    """Return the layer of each run that lies nearest in depth, of several the namesake, where it is near enough."""

    def away(other: Layer) -> tuple[float, bool]:
        return abs(other.depth - layer.depth), other.name != layer.name

    seeds = dict.fromkeys(other.seed for other in others)
    nearest = [min((other for other in others if other.seed == seed), key=away) for seed in seeds]
    return [other for other in nearest if away(other)[0] <= CORRESPOND]


def _point(pairs: dict[tuple[Layer, Layer], Score], same_seed: bool, bounds: tuple[float, float]) -> ProfilePoint:
    (a, _), *_ = pairs
    scores = list(pairs.values())
    value = float(np.mean([score.value for score in scores]))
    draws = np.stack([score.draws for score in scores])  # pairs x resamples
    low = high = None
    if draws.size:
        low, high = centred_interval(value, mean_draws(list(pairs), draws, same_seed=same_seed), *bounds)
    runs = len({frozenset(((a.regime, a.seed), (b.regime, b.seed))) for a, b in pairs})
    fixed = "images; runs held fixed" if runs > 1 else "images"
    over = "images and seeds" if enough_seeds(list(pairs)) else fixed
    unseeded = any(layer.seed is None for pair in pairs for layer in pair)
    return ProfilePoint(a.name, a.depth, value, low, high, over, scores[0].n, runs, None if unseeded else same_seed)


def mean_draws(pairs: Sequence[tuple[Layer, Layer]], draws: np.ndarray, *, same_seed: bool) -> np.ndarray:
    """Return the mean over pairs of runs `(draws,)` of `(pairs, draws)`; from `ENOUGH_SEEDS` on of runs drawn anew."""
    return over_seeds(pairs, draws, same_seed) if enough_seeds(pairs) else draws.mean(0)


def enough_seeds(pairs: Sequence[tuple[Layer, Layer]]) -> bool:
    """Return whether each regime has `ENOUGH_SEEDS` runs, or none: of a baseline or given network there is but one."""
    seeds: dict[str, set[int]] = {}
    for layer in (layer for pair in pairs for layer in pair):
        if layer.seed is not None:
            seeds.setdefault(layer.regime, set()).add(layer.seed)
    return min(map(len, seeds.values()), default=0) >= ENOUGH_SEEDS


def over_seeds(pairs: Sequence[tuple[Layer, Layer]], draws: np.ndarray, same_seed: bool) -> np.ndarray:
    """Return the mean score of every resample `(resamples,)`: of its images, and of runs drawn with replacement.

    Two runs of a seed are drawn together where pairs are of the same seed, else runs are drawn within each regime.

    Args:
        pairs: of layers of two runs.
        draws: `(pairs, resamples)` scores of each.
        same_seed: see `profile_of`.
    """
    ends = tuple(tuple(("" if same_seed else layer.regime, str(layer.seed)) for layer in pair) for pair in pairs)
    return (seed_weights(ends, draws.shape[1], same_seed) * draws).sum(0)


@lru_cache(maxsize=32)
def seed_weights(ends: tuple[tuple[tuple[str, str], ...], ...], number: int, same_seed: bool) -> np.ndarray:
    """Return the share of each pair of runs, given as (group, seed) twice, in each of `number` draws of the runs."""
    runs = sorted({run for both in ends for run in both})
    place = np.array([[runs.index(run) for run in both] for both in ends])
    groups = [
        [index for index, run in enumerate(runs) if run[0] == group] for group in sorted({run[0] for run in runs})
    ]
    shares = np.zeros((len(ends), number))
    for column in range(number):
        random = np.random.default_rng(key(0, "seeds", column))
        weights = np.zeros(len(ends))
        while not weights.any():  # of one regime's two seeds, one may be drawn twice: no pair
            counts = np.zeros(len(runs))
            for members in groups:
                counts[members] = np.bincount(random.integers(len(members), size=len(members)), minlength=len(members))
            weights = counts[place[:, 0]] * (1 if same_seed else counts[place[:, 1]])
        shares[:, column] = weights / weights.sum()
    return shares
