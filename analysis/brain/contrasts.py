"""Is one regime closer to a region than another? Differences on the same images and neurons, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from localsim.analysis.profiles import counterparts, enough_seeds, mean_draws
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
        each: the difference of each pair of runs.
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
    each: tuple[float, ...]
    low: float | None
    high: float | None
    over: str
    pairs: int
    same_seed: bool | None
    n: int
    neurons: int

    def to_row(self) -> dict[str, Any]:
        """Return the fields as one line of a table."""
        return asdict(self) | {"each": " ".join(f"{one:.6g}" for one in self.each)}

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:+.3f}, {self.high:+.3f}]"
        return f"{self.value:+.3f}{interval}"


def differences(
    scores: BrainScores, regime: str, reference: str, places: Sequence[Place] | None = None
) -> list[BrainDifference]:
    """Return the difference of two regimes for every region, at every depth that both have a layer at.

        d = mean_s (score of regime, seed s - score of reference, seed s)

    Every draw of images and neurons is the same for both sides, so that what makes an image or neuron easy for both
    cancels. Runs are paired by seed where regimes share seeds, else each of one goes with each of the other.
    From `ENOUGH_SEEDS` on, on both sides, runs are drawn anew with each draw, and the interval is over seeds too; of
    fewer it says what other images and neurons would change, not what other seeds would: look at `each`. A baseline,
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
            each = tuple(a.value - b.value for a, b in both)
            value = fmean(each)
            draws = np.stack([a.draws - b.draws for a, b in both])
            low = high = None
            if draws.size:
                low, high = centred_interval(value, mean_draws(pairs, draws, same_seed=same_seed))
            (a, b), one = pairs[0], both[0][0]
            unseeded = any(layer.seed is None for pair in pairs for layer in pair)
            seeds = " and seeds" if enough_seeds(pairs) else "; runs held fixed"
            found.append(BrainDifference(
                scores.metric.name, recording, region, regime, reference, a.name, b.name, a.depth, value, each, low,
                high, f"{scores.metric.over}{seeds}", len(pairs), None if unseeded else same_seed, one.n, one.neurons,
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
