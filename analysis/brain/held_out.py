"""Regressions scored on images that they were not fitted to, and resampled without fitting again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from localsim.analysis.brain import regression
from localsim.analysis.brain.recordings import Recording, Seeds
from localsim.analysis.brain.regression import Layer
from localsim.analysis.brain.splits import Folds, cross_validation
from localsim.analysis.statistics import resample
from localsim.errors import UserError
from localsim.rng import key

_ROUNDING = 1e-12  # share of a variance that is none


@dataclass(frozen=True)
class Regression:
    """Which regression.

    Attributes:
        method: `pls`, `ridge` (penalty 1) or `ridgecv`.
        components: of pls.
    """

    method: Literal["pls", "ridge", "ridgecv"]
    components: int = 25

    def check(self, train: int, features: int) -> None:
        """Raise UserError where PLS cannot have that many components."""
        if self.method == "pls":
            regression.check_components(self.components, train, features)

    def predict(self, layer: Layer, targets: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        """Return predictions `(n_test, q)` of what was fitted to `targets` `(n, q)` of the images `train`."""
        kernel, across = layer.fold(train, test)
        means = targets[train].mean(0)
        centred = targets[train] - means
        if self.method == "pls":
            dual = regression.pls(kernel, centred, self.components)
        elif self.method == "ridge":
            dual = regression.ridge(kernel, centred)
        else:
            dual, _ = regression.ridgecv(*regression.decomposed(layer, train, kernel), centred)
        return across @ dual + means


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Neurons of one region, with the splits and resamples by which every layer is scored.

    Attributes:
        fit: the regression.
        targets: `(n, q)`.
        folds: images to fit and to test of every split.
        counts: how often each resample has each image, `(draws, n)`.
        neurons: which neurons each resample has, `(draws, q)`.
    """

    fit: Regression
    targets: np.ndarray
    folds: Folds
    counts: np.ndarray
    neurons: np.ndarray

    @classmethod
    def of(
        cls, recording: Recording, fit: Regression, splits: int, train_size: float, draws: int, seeds: Seeds
    ) -> HeldOut:
        """Return the neurons of one region.

        Raises:
            UserError: too few images, groups that cannot be stratified, or a neuron that never varies.
        """
        targets = recording.means()
        n, q = targets.shape
        constant = np.flatnonzero((targets == targets[0]).all(0))
        if len(constant):
            raise UserError(
                f"neuron {recording.names[constant[0]]} of {recording.name} gives the same response to every image, "
                f"which nothing can be correlated with; leave out {len(constant)} such of {q} neurons"
            )
        folds = cross_validation(n, recording.groups, splits, train_size)
        fit.check(len(folds[0][0]), len(folds[0][0]))  # what the layers' features allow is known later
        neurons = np.array(list(resample(q, draws, key(seeds.units, "neurons"))), dtype=np.int64).reshape(draws, q)
        return cls(fit, targets, folds, _image_counts(folds, n, draws, seeds.images), neurons)

    def scores(self, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
        """Return Pearson's r of held-out predictions `(splits, q)`, and the score of every resample `(draws,)`.

        As many splits at a time as torch has threads; their number changes no bit.

        r is NaN, and the neuron left out of that split as in Brain-Score, where its responses are constant over the
        images fitted or tested. A resample weights the tested images of a split by how often it has them; one in which
        these are fewer than two different images has no score for that split.

        Raises:
            UserError: too many components, or a split in which no neuron varies.
        """
        from threadpoolctl import threadpool_limits

        # a split a thread: threads inside a product of a thousand images mostly wait for each other
        with threadpool_limits(1), ThreadPoolExecutor(min(torch.get_num_threads(), len(self.folds))) as pool:
            made = list(pool.map(lambda place: self._fold(layer, place), range(len(self.folds))))
        draws = mean(np.stack([medians for _, medians in made]))
        if np.isnan(draws).any():
            raise UserError("too few images are tested for an interval; allowed: more images or splits, or draws=0")
        return np.stack([r for r, _ in made]), draws

    def _fold(self, layer: Layer, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Return r `(q,)` of one split, and the median over neurons of every resample `(draws,)`."""
        train, test = self.folds[place]
        self.fit.check(len(train), layer.features)
        predicted = self.fit.predict(layer, self.targets, train, test)
        constant = (self.targets[train] == self.targets[train[0]]).all(0)
        predicted[:, constant] = 0
        r = weighted_correlation(np.ones((1, len(test))), predicted, self.targets[test])[0]
        if np.isnan(r).all():
            raise UserError(f"no neuron varies over both the fitted and the tested images of split {place + 1}")
        drawn = weighted_correlation(self.counts[:, test], predicted, self.targets[test])
        return r, median(np.take_along_axis(drawn, self.neurons, axis=1))


def weighted_correlation(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Pearson's r of each column of x and y `(m, q)`, with weights `(draws, m)` of the rows: `(draws, q)`.

    NaN where a column is constant over the rows that have a weight.
    """
    x, y = x - x.mean(0), y - y.mean(0)  # weighted sums of squares then lose nothing to a large mean
    sums = weights @ np.hstack([x, y, x * x, y * y, x * y])
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_x, mean_y, xx, yy, xy = np.split(sums / weights.sum(1, keepdims=True), 5, axis=1)
        spread_x, spread_y = xx - mean_x**2, yy - mean_y**2
        r = (xy - mean_x * mean_y) / np.sqrt(spread_x * spread_y)
    varies = (spread_x > _ROUNDING * xx) & (spread_y > _ROUNDING * yy)
    return np.where(varies, np.clip(r, -1, 1), np.nan)


def median(r: np.ndarray) -> np.ndarray:
    """Return the median over neurons `(m,)` of r `(m, q)`, over those that are not NaN; NaN where all are."""
    if not np.isnan(r).any():
        return np.median(r, axis=1)
    found, given = np.full(len(r), np.nan), ~np.isnan(r).all(1)
    if given.any():
        found[given] = np.nanmedian(r[given], axis=1)  # would warn of the others, and filters are shared by threads
    return found


def mean(r: np.ndarray) -> np.ndarray:
    """Return the mean over splits `(q,)` of r `(splits, q)`, over those that are not NaN; NaN where all are."""
    given = ~np.isnan(r)
    with np.errstate(invalid="ignore"):
        return np.where(given, r, 0).sum(0) / given.sum(0)


def _image_counts(folds: Folds, n: int, draws: int, seed: int) -> np.ndarray:
    """Return how often each of n images is drawn `(draws, n)`; in each draw some split has two images to test."""
    tested = np.zeros((len(folds), n))
    for row, (_, test) in zip(tested, folds, strict=True):
        row[test] = 1
    counts = np.zeros((draws, n))
    for number, row in enumerate(counts):
        rng = np.random.default_rng(key(seed, "images", number))
        while (tested @ (row > 0)).max() < 2:
            row[:] = np.bincount(rng.integers(n, size=n), minlength=n)
    return counts
