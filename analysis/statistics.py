"""Intervals over images and chance levels, for scores that are made of pairs of images.

Drawing images with replacement, the usual bootstrap, meets two of the same image: a pair at distance zero that no
experiment has, which pulls every pairwise score up, and a test image that was trained on. Half of the images, drawn
without replacement, have no such pairs, and to first order their scores spread around their mean as scores of as many
new images would spread around the truth: the delete-half jackknife (Shao & Wu 1989, Ann. Statist. 17:1176), or repeated
half-sample bootstrap (Saigo, Shao & Sitter 2001, Surv. Methodol. 27:189).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from localsim.errors import UserError
from localsim.rng import key

COVERAGE = 0.95


def check_resamples(n: int, resamples: int) -> None:
    """Raise UserError for fewer than 8 images, of which a half would be too few to compare, or 1 to 19 resamples."""
    if resamples and n < 8:
        raise UserError(f"an interval over {n} images is not possible; allowed: 8 images or more, or resamples=0")
    if resamples and resamples < 20:
        raise UserError(f"{resamples} resamples are too few for an interval; allowed: 0 (none), or 20 or more")


def half_samples(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `resamples` times the sorted indices of half of n images, drawn without replacement.

    A half and the other half come in turn, so that over an even number of draws every image counts equally often
    (of an odd number of images, one is left out of each two draws).

    Raises:
        UserError: see `check_resamples`.
    """
    check_resamples(n, resamples)
    for number in range(resamples):
        order = np.random.default_rng(key(seed, "halves", number // 2)).permutation(n)
        yield np.sort(order[: n // 2] if number % 2 == 0 else order[n - n // 2 :])


def resample(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `resamples` times n indices drawn with replacement: for sums over images, where a repeat does no harm."""
    for number in range(resamples):
        yield np.random.default_rng(key(seed, "resample", number)).integers(n, size=n)


def centred_interval(
    estimate: float, draws: ArrayLike, lowest: float = -np.inf, highest: float = np.inf
) -> tuple[float, float]:
    """Return the 95 % interval of `estimate` from `draws`, its `(r,)` resamples, cut to between `lowest` and `highest`.

    The draws' spread about their own mean is laid around the estimate: half the images give a biased score another
    bias, which belongs to the half and not to the estimate.
    """
    draws = np.asarray(draws, dtype=np.float64)
    low, high = np.quantile(draws - draws.mean(), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return max(float(estimate + low), lowest), min(float(estimate + high), highest)


def shuffles(n: int, number: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `number` orders of n images, for the chance level of a score: what is left when images are mismatched.

    Raises:
        UserError: a negative number.
    """
    if number < 0:
        raise UserError(f"{number} permutations are not possible; allowed: 0 (none), or more")
    for index in range(number):
        yield np.random.default_rng(key(seed, "permutation", index)).permutation(n)


def p_value(value: float, null: ArrayLike, *, larger: bool = True) -> float:
    """Return the share of chance scores at least as extreme as `value`, itself counted among them (never 0).

        p = (1 + #{null >= value}) / (1 + number)          Phipson & Smyth 2010, eq. 2

    Args:
        value: the score.
        null: scores of mismatched images `(r,)`.
        larger: whether extreme means large; for distances it means small.
    """
    null = np.asarray(null, dtype=np.float64)
    beaten = null >= value if larger else null <= value
    return float((1 + beaten.sum()) / (1 + null.size))
