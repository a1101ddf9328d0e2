"""How well a perfect model could score: the reliability of a recording, by Brain-Score's estimators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from localsim.analysis.brain.matrices import ranks, u_centred, upper
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.brain.splits import RANDOM_STATE

SPLITS = 10

Consistency = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Mean responses `(n, neurons)` of two halves of the trials, to their similarity: of each neuron, or one `(1,)`; NaN
where it is not defined."""


@dataclass(frozen=True)
class Ceiling:
    """What a score is divided by.

    Attributes:
        value: above 0.
        kind: how it was estimated, in words.
        lower: for rsa, the leave-one-out estimate, which is biased low.
    """

    value: float
    kind: str
    lower: float | None = None


def internal_consistency(recording: Recording, consistency: Consistency, by: str) -> Ceiling | str:
    """Return Brain-Score's `InternalConsistency`, or a sentence that says why there is none.

        r' = 2 r / (1 + r),   r the similarity of the mean responses to two random halves of the trials

    averaged over 10 halvings, of the median over neurons where `consistency` gives one value per neuron. The trials of
    all images and neurons are halved alike, by number; the mean of a half is over the trials it has. Where a half has
    no trial of an image, nothing is defined for that neuron (of `pearson`) or that halving, which is left out.

    Args:
        recording: of one region.
        consistency: such as `pearson`.
        by: what is compared, in words.
    """
    if recording.responses is None:
        return "the recording has only RDMs, which show no trials"
    if recording.trials < 2:
        return "the recording's trials were averaged, or each image was shown once"
    found = []
    for one, other in _halves(recording.responses):
        r = consistency(one, other)
        r = r[np.isfinite(r) & (r > -1)]
        if len(r):
            found.append(np.median(2 * r / (1 + r)))
    if not found:
        return "no half of the trials has a response of every neuron to every image"
    value = float(np.mean(found))
    if not value > 0:
        return f"the recording's trials do not agree with each other: their consistency is {value:.3f}"
    return Ceiling(value, f"internal consistency of {by}, Spearman-Brown, over {recording.trials} trials")


def _halves(responses: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the mean responses to half of the trials and to the others, NaN where there are none, 10 times."""
    from sklearn.model_selection import ShuffleSplit

    given = ~np.isnan(responses)
    filled = np.where(given, responses, 0)
    halving = ShuffleSplit(n_splits=SPLITS, train_size=0.5, random_state=RANDOM_STATE)
    for halves in halving.split(np.zeros(responses.shape[2])):
        with np.errstate(invalid="ignore"):  # 0 / 0 where no trial was given
            one, other = (filled[:, :, half].sum(2) / given[:, :, half].sum(2) for half in halves)
        yield one.mean(2), other.mean(2)


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Pearson's r of each column of `(n, q)` matrices; NaN where a column is constant or not given."""
    constant = (x == x[:1]).all(0) | (y == y[:1]).all(0)
    x, y = x - x.mean(0), y - y.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (x * y).sum(0) / (np.linalg.norm(x, axis=0) * np.linalg.norm(y, axis=0))
    return np.where(constant, np.nan, np.clip(r, -1, 1))


def rdm_similarity(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of two halves' RDMs; NaN where an image has none."""
    if np.isnan(x).any() or np.isnan(y).any() or any((half == half[:, :1]).all(1).any() for half in (x, y)):
        return np.array([np.nan])
    one, other = (ranks(upper(1 - np.corrcoef(half)), "half of the trials") for half in (x, y))
    return np.array([one @ other])


def cka_similarity(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the unbiased CKA of two halves' responses; NaN where a response is not given."""
    if np.isnan(x).any() or np.isnan(y).any():
        return np.array([np.nan])
    one, other = (u_centred(half @ half.T, "half of the trials") for half in (x - x.mean(0), y - y.mean(0)))
    return np.array([one @ other])


def subject_ceiling(rdms: np.ndarray, units: str) -> Ceiling | str:
    """Return Brain-Score's `RSACeiling`, or a sentence that says why there is none.

    Mean over subjects of the Spearman correlation of a subject's RDM with the mean RDM of all subjects, which no model
    can exceed on average; `lower` is that with the mean of the other subjects (Nili et al. 2014, PLoS Comput. Biol.
    10:e1003553).

    Args:
        rdms: `(subjects, n, n)`.
        units: whose they are, in words.
    """
    pairs = np.stack([upper(one) for one in rdms])
    each = [ranks(one, units) for one in pairs]
    everyone = ranks(pairs.mean(0), units)
    others = [ranks(np.delete(pairs, place, axis=0).mean(0), units) for place in range(len(pairs))]
    high = float(np.mean([one @ everyone for one in each]))
    low = float(np.mean([one @ other for one, other in zip(each, others, strict=True)]))
    if not high > 0:
        return f"the subjects do not agree with each other: their noise ceiling is {high:.3f}"
    return Ceiling(high, f"upper noise ceiling over {units}", low)
