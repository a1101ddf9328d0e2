"""Scores of pairs of layers with their intervals and chance levels, for one pair or for all layers of many networks."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from localsim.analysis.similarity.measure import Array, Measure, Numerics, Precision, as_features, same_images
from localsim.analysis.statistics import centred_interval, half_samples, p_value, resample, shuffles
from localsim.errors import UserError

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Score:
    """How alike two layers are, as it should be printed.

    Attributes:
        value: of the measure, on all images.
        low, high: 95 % interval over images, within the measure's range, of a biased measure around the biased value;
            None without resamples.
        n: images.
        chance: mean score of mismatched images; None without permutations.
        p: share of mismatched scores at least as extreme, see `statistics.p_value`; None without permutations.
        draws: `(resamples,)` scores of the resampled images, for differences between scores.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    chance: float | None
    p: float | None
    draws: np.ndarray

    def __str__(self) -> str:
        said = f"{self.value:.3f}"
        if self.low is not None:
            said += f" [{self.low:.3f}, {self.high:.3f}]"
        if self.chance is not None:
            said += f", chance {self.chance:.3f} (p = {self.p:.2g})"
        return f"{said}, n = {self.n}"


def similarity(
    x: Array,
    y: Array,
    measure: Measure | str,
    *,
    resamples: int = 200,
    permutations: int = 0,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: Precision | None = None,
) -> Score:
    """Return the score of two layers `(n, p)` and `(n, q)` with its interval over images and its chance level.

    Args:
        x, y: features of the same images.
        measure: a name in `localsim.analysis.similarity.MEASURES`, or a `Measure`, perhaps one of your own.
        resamples: draws for the interval, 0 for none; see `score_pairs`.
        permutations: mismatched orders of y's images for the chance level, 0 for none.
        seed: of both.
        device, dtype: see `Measure`.

    Raises:
        UserError: see `Measure`; or too few resamples or images for an interval.
    """
    if isinstance(measure, str):
        from localsim.analysis.similarity import get_measure  # which is made of what builds on this module

        measure = get_measure(measure)
    x, y = as_features(x), as_features(y)
    same_images(x, y, repeats=measure.repeats)
    numerics = Numerics.of(x, device, dtype)
    layers = {0: measure.represent(x, numerics), 1: measure.represent(y, numerics)}
    n = x.shape[-2]
    (score,) = score_pairs(measure, layers, [(0, 1)], n, resamples, permutations, seed).values()
    return score


def interval_of(measure: Measure) -> str:
    """Return how intervals of a measure are made, in words; see `score_pairs`."""
    if measure.terms is None:
        return "half-samples of the images"
    return "images drawn with replacement, fits held fixed (too narrow where images are few)"


def score_pairs(
    measure: Measure,
    layers: dict[Any, Any],
    pairs: Sequence[tuple[Name, Name]],
    n: int,
    resamples: int = 0,
    permutations: int = 0,
    seed: int = 0,
    *,
    progress: bool = False,
) -> dict[tuple[Name, Name], Score]:
    """Return the score of every pair, sharing what a layer needs among all its pairs.

    Intervals come from the same half-samples of the images for all pairs, so that differences between scores have
    intervals too (`Score.draws`); a measure that is a ratio of sums over images (`Measure.terms`) is not fitted again,
    and its images are drawn with replacement instead: that interval is over images to be predicted, with the fits as
    they are, and narrower than one over images to fit, too. Chance levels come from the same orders for all pairs.

    Args:
        measure: of similarity.
        layers: what `measure.represent` made of each layer; emptied where neither resamples nor permutations are
            asked for, as the comparison then needs each only once.
        pairs: keys of `layers`, the first the predictor where the measure is not symmetric.
        n: images.
        resamples, permutations, seed: see `similarity`.
        progress: show bars of resamples and permutations on a terminal.
    """
    hidden = None if progress else True  # None: shown on a terminal only
    once = not resamples and not permutations
    values: dict[tuple[Name, Name], float] = {}
    draws: dict[tuple[Name, Name], np.ndarray] = {}
    weights = None
    if measure.terms is not None and resamples:
        drawn = list(resample(n, resamples, seed))
        weights = torch.from_numpy(np.stack([np.bincount(images, minlength=n) for images in drawn]).astype(np.float64))
    ready = {name: measure.transform(layers.pop(name) if once else layers[name]) for name in _named(pairs)}
    for a, b in pairs:
        values[a, b] = measure.compare(ready[a], ready[b])
        if weights is not None and measure.terms is not None:
            sums = weights @ measure.terms(ready[a], ready[b]).to("cpu", torch.float64)
            draws[a, b] = (sums[:, 0] / sums[:, 1]).numpy()
    if resamples and weights is None:
        halves = (_half(measure, layers, pairs, images, n) for images in half_samples(n, resamples, seed))
        shown = tqdm(halves, desc="half samples", total=resamples, disable=hidden)
        draws = _stacked(_compared(measure, half, half, pairs) for half in shown)
    null: dict[tuple[Name, Name], np.ndarray] = {}
    if permutations:
        moved = (
            _taken(measure, layers, [(b, b) for _, b in pairs], order) for order in shuffles(n, permutations, seed)
        )
        shown = tqdm(moved, desc="permutations", total=permutations, disable=hidden)
        null = _stacked(_compared(measure, ready, mismatched, pairs) for mismatched in shown)
    return {pair: _score(measure, value, draws.get(pair), null.get(pair), n) for pair, value in values.items()}


def _named(pairs: Iterable[tuple[Name, Name]]) -> list[Name]:
    return list(dict.fromkeys(itertools.chain.from_iterable(pairs)))


def _taken(
    measure: Measure, layers: Mapping[Any, Any], pairs: Iterable[tuple[Name, Name]], images: np.ndarray
) -> dict[Any, Any]:
    index = torch.from_numpy(images)
    return {name: measure.transform(measure.take(layers[name], index)) for name in _named(pairs)}


def _half(
    measure: Measure, layers: Mapping[Any, Any], pairs: Iterable[tuple[Name, Name]], images: np.ndarray, n: int
) -> dict[Any, Any]:
    try:
        return _taken(measure, layers, pairs, images)
    except UserError as error:
        raise UserError(
            f"an interval takes half of the {n} images at a time, and of these: {error}; give more images, or "
            "resamples=0"
        ) from None


def _compared(
    measure: Measure, first: Mapping[Any, Any], second: Mapping[Any, Any], pairs: Sequence[tuple[Name, Name]]
) -> dict[tuple[Name, Name], float]:
    return {(a, b): measure.compare(first[a], second[b]) for a, b in pairs}


def _stacked(scores: Iterable[Mapping[tuple[Name, Name], float]]) -> dict[tuple[Name, Name], np.ndarray]:
    each = list(scores)
    return {pair: np.array([one[pair] for one in each]) for pair in each[0]}


def _score(measure: Measure, value: float, draws: np.ndarray | None, null: np.ndarray | None, n: int) -> Score:
    low, high = (None, None) if draws is None else centred_interval(value, draws, measure.low, measure.high)
    chance = p = None
    if null is not None:
        chance, p = float(null.mean()), p_value(value, null, larger=measure.kind == "similarity")
    return Score(value, low, high, n, chance, p, np.empty(0) if draws is None else draws)
