"""Is one regime closer to a region than another? Differences on the same images and neurons, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from localsim.analysis.profiles import counterparts, over_seeds
from localsim.analysis.regimes import Layer
from localsim.analysis.statistics import centred_interval
from localsim.errors import UserError

if TYPE_CHECKING:
    from localsim.analysis.brain.scores import BrainScores, Place


@dataclass(frozen=True)
class BrainDifference:
    """The score of one regime less that of another, at one depth, for one region.

    Attributes:
        metric, recording, region: of the scores.
        regime, reference: the two regimes.
        layer, reference_layer: the two layers.
        depth: of the first.
        value: mean over seeds of `regime - reference`, raw scores.
        low, high: its 95 % interval; None without resamples.
        over: what the interval is over.
        pairs: how many pairs of networks.
        same_seed: whether the networks of a pair share their seed; None where a side has none.
        n, neurons: images and neurons.
    """

    metric: str
    recording: str
    region: str
    regime: str
    reference: str
    layer: str
    reference_layer: str
    depth: float
    value: float
    low: float | None
    high: float | None
    over: str
    pairs: int
    same_seed: bool | None
    n: int
    neurons: int

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.value:+.3f}{interval}"


def differences(
    scores: BrainScores, regime: str, reference: str, places: Sequence[Place] | None = None
) -> list[BrainDifference]:
    """Return the difference of two regimes for every region, at every depth that both have a layer at.

        d = mean_s (score of regime, seed s - score of reference, seed s)

    Every draw of images and neurons is the same for both sides, so that what makes an image or neuron easy for both
    cancels. Runs are paired by seed where regimes share seeds, else every run of one goes with every run of the other;
    where there are several pairs, they are drawn anew with each draw, and the interval is over seeds too. A baseline,
    which has no depth, is held against every layer.

    Args:
        scores: what `brain.score` returned.
        regime, reference: of `scores.regimes`.
        places: recordings and regions; by default all.

    Raises:
        UserError: there is no such regime, or a baseline is to be held against a network and not the other way round.
    """
    found = []
    first, second = scores.finished(regime), scores.finished(reference)
    if any(layer.depth == 0 for layer in first) and any(layer.depth > 0 for layer in second):
        raise UserError(f"{regime} is a baseline, which has no layers; ask for {reference} minus {regime}")
    for recording, region in scores.places if places is None else places:
        for name in dict.fromkeys(layer.name for layer in first):
            pairs = _pairs([layer for layer in first if layer.name == name], second)
            if not pairs:
                continue
            same_seed = all(a.seed == b.seed for a, b in pairs)
            both = [tuple(scores.score(recording, region, layer) for layer in pair) for pair in pairs]
            value = fmean(a.value - b.value for a, b in both)
            draws = np.stack([a.draws - b.draws for a, b in both])
            low = high = None
            if draws.size:
                low, high = centred_interval(value, over_seeds(pairs, draws, same_seed))
            (a, b), one = pairs[0], both[0][0]
            unseeded = any(layer.seed is None for pair in pairs for layer in pair)
            seeds = " and seeds" if len(pairs) > 1 else ""
            found.append(BrainDifference(
                scores.metric.name, recording, region, regime, reference, a.name, b.name, a.depth, value, low, high,
                f"{scores.metric.over}{seeds}", len(pairs),
                None if unseeded else same_seed, one.n, one.neurons,
            ))  # fmt: skip
    return found


def references_of(scores: BrainScores, regime: str) -> list[str]:
    """Return what a regime is held against: its untrained network, and every end-to-end regime."""
    candidates = [scores.untrained.get(regime), *scores.record["end_to_end"]]
    return [one for one in dict.fromkeys(candidates) if one is not None and one != regime]


def all_differences(scores: BrainScores) -> list[BrainDifference]:
    """Return the differences of every regime that is no control from all its references."""
    return [
        one
        for regime in scores.regimes
        if regime in scores.untrained
        for reference in references_of(scores, regime)
        for one in differences(scores, regime, reference)
    ]


def _pairs(first: Sequence[Layer], second: Sequence[Layer]) -> list[tuple[Layer, Layer]]:
    """Return each run's layer with its counterparts in runs of the same seed, or in all where no seed is shared."""
    shared = {layer.seed for layer in first} & {layer.seed for layer in second}
    if shared:
        first, second = ([layer for layer in side if layer.seed in shared] for side in (first, second))
    pairs = []
    for layer in first:
        own = [other for other in second if not shared or other.seed == layer.seed]
        found = own if all(other.depth == 0 for other in own) else counterparts(layer, own)
        pairs += [(layer, other) for other in found]
    return pairs
