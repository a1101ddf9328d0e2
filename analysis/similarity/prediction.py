"""How much of one layer a linear map of another explains, on images that the map was not fitted to.

Images are dealt to folds by a keyed permutation, the same for every layer; each fold is predicted by a map fitted to
the others. Everything that depends on the predictor alone (per fold the eigendecomposition of the smaller of its two
Gram matrices, features x features or images x images) is done once per layer, on first use, and serves all penalties
and all targets. It is done in float64 whatever the features are, because a Gram matrix squares their condition number:
in float32, penalties below about 1e-7 of its largest eigenvalue would be lost in rounding. In float64 that floor is
1e-16, and the smallest default penalty is at least 1e-6 / m of the largest eigenvalue, for m training images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from localsim.analysis.similarity.kernels import coordinates, finite, squares
from localsim.analysis.similarity.measure import (
    CHUNK,
    Array,
    Measure,
    Numerics,
    Precision,
    check_shape,
    column_chunks,
    take_rows,
    varies,
)
from localsim.errors import UserError, one_of
from localsim.rng import key

SCORES = ("r2", "r")
PENALTIES = tuple(float(penalty) for penalty in 10.0 ** np.arange(-6, 4.5, 0.5))
"""Ridge penalties in units of the mean eigenvalue of the training images' Gram matrix: their mean squared length."""

DUAL = 0.9
"""From this many features per training image on, images x images is decomposed: for about as many features as images
nothing is left of the targets but a difference of nearly equal sums, which the other form would have to take."""

Residuals = Iterator[tuple[Tensor, Tensor, Tensor]]
"""Per fold: its images `(t,)`, their targets `(t, q)` less the training mean, and what was predicted of that."""


def predictivity(
    x: Array,
    y: Array,
    *,
    method: Literal["ridge", "pls"] = "ridge",
    score: Literal["r2", "r"] = "r2",
    folds: int = 5,
    seed: int = 0,
    penalties: Sequence[float] | None = None,
    components: int | None = None,
    device: str | torch.device | None = None,
    dtype: Precision | None = None,
) -> float:
    """Return how well a linear map of `x` `(n, p)` predicts `y` `(n, q)` on held-out images.

        r2 = 1 - sum_i |y_i - f(x_i)|^2 / sum_i |y_i - mean|^2      in (-inf, 1]: f and mean from the other folds
        r  = mean over folds of the median over y's features of Pearson's correlation of f(x) and y      in [-1, 1]

    `r2` weighs features by their variance and does not change when x or y are rotated, shifted or scaled; it is below 0
    where the map does worse than the mean. `r` is Brain-Score's (Schrimpf et al. 2018), does not change when x is
    rotated, but does when y is: it is about y's own features. A feature that is constant over a fold is left out there;
    a constant prediction of one that varies counts as 0. Not symmetric: x predicts y.

    Ridge minimises `|Y - XB|^2 + a |B|^2`; inside each training fold of m images `a` is chosen by generalised
    cross-validation (Golub, Heath & Wahba 1979, Technometrics 21:215), for `r2` one for all of y, so that it stays
    invariant to rotations of y; for `r` one per feature, as neurons differ in how reliable they are:

        GCV(a) = (|Y - H(a) Y|^2 / m) / (1 - tr H(a) / m)^2,      H(a) the map from Y to its fit, mean included

    Partial least squares is `latent.latent_prediction`. There is no ceiling: divide by the
    reliability of y where it is known.

    Args:
        x, y: features, arrays or tensors. For `r` both are held in memory, n x p and n x q numbers; else n x n at most.
        method: `ridge` or `pls`.
        score: `r2` or `r`.
        folds: how many; each image is held out once.
        seed: which of the possible assignments of images to folds.
        penalties: of ridge, in units of the training images' mean squared length; by default 21 from 1e-6 to 1e4.
        components: of pls; by default 25, as in Brain-Score.
        device, dtype: as for every `Measure`.

    Raises:
        UserError: an unknown method or score, an option of the other method, fewer images than twice the folds, fewer
            training images or features than components, constant or non-finite features.
    """
    if method == "ridge":
        if components is not None:
            raise UserError(f"components {components} has no meaning for ridge; allowed: only with method pls")
        measure = ridge_predictivity(score, folds, seed, penalties)
    elif method == "pls":
        from localsim.analysis.similarity.latent import pls_predictivity  # which builds on this module

        if penalties is not None:
            raise UserError(f"penalties {tuple(penalties)} have no meaning for pls; allowed: only with method ridge")
        measure = pls_predictivity(score, folds, seed, components)
    else:
        raise one_of("method", method, ("ridge", "pls"))
    return measure(x, y, device=device, dtype=dtype)


def ridge_predictivity(
    score: str = "r2", folds: int = 5, seed: int = 0, penalties: Sequence[float] | None = None
) -> Measure:
    """Return the measure that `predictivity` applies with method ridge, with the same options."""
    grid = PENALTIES if penalties is None else tuple(float(penalty) for penalty in penalties)
    if not grid or not all(0 < penalty < float("inf") for penalty in grid):
        raise UserError(f"penalties {grid} are not allowed; allowed: one or more positive finite numbers")
    predict = partial(_ridge, penalties=grid, pooled=score == "r2")
    return held_out(
        predict, "predictivity", "ridge regression", "Golub, Heath & Wahba 1979, eq. 1.4 (penalty)", score, folds, seed
    )


def held_out(
    predict: Callable[[Layer, Layer], Residuals], name: str, fit: str, source: str, score: str, folds: int, seed: int
) -> Measure:
    """Return the measure of how well `predict(x, y)` does on held-out images.

    Args:
        predict: yields each fold's residuals.
        name: of the measure with score r2; with r, `_r` is added.
        fit: what is fitted, in words.
        source: where it is described.
        score, folds, seed: as for `predictivity`.
    """
    if score not in SCORES:
        raise one_of("score", score, SCORES)
    if folds < 2:
        raise UserError(f"folds {folds} leaves nothing to fit to; allowed: 2 or more")
    pooled = score == "r2"
    kept = "Variance of y explained" if pooled else "Median correlation with y's features reached"
    return Measure(
        name=name if pooled else f"{name}_r",
        summary=f"{kept} on held-out images by {fit} on x.",
        source=source if pooled else f"{source}; Schrimpf et al. 2018, Methods (score)",
        kind="similarity",
        low=float("-inf") if pooled else -1.0,
        high=1.0,
        symmetric=False,
        metric=False,
        bias="cross-validated",
        invariances=frozenset(("translation", "orthogonal", "scale") if pooled else ("translation", "scale")),
        represent=coordinates if pooled else own_features,
        take=take_rows,
        transform=partial(Layer.of, number=folds, seed=seed),
        compare=(lambda a, b: _ratio(_squares(predict(a, b), b))) if pooled else lambda a, b: _median_r(predict(a, b)),
        terms=(lambda a, b: _squares(predict(a, b), b)) if pooled else None,
    )


def own_features(x: Array, numerics: Numerics) -> Tensor:
    """Return features `(n, p)` less their mean, never rotated; UserError where all images look the same."""
    check_shape(x)
    made = torch.empty(x.shape, dtype=numerics.dtype, device=numerics.device)
    spread, size, start = 0.0, 0.0, 0
    for chunk in column_chunks(x, numerics):
        part = made[:, start : start + chunk.shape[1]]
        torch.sub(chunk, chunk.mean(0), out=part)
        spread, size, start = spread + squares(part), size + squares(chunk), start + chunk.shape[1]
    finite(size, numerics)
    varies(spread, size)
    return made


@dataclass(frozen=True)
class Layer:
    """A layer's features `(n, p)` and the images of each fold, with what predicting from it needs."""

    features: Tensor
    folds: tuple[Tensor, ...]

    @classmethod
    def of(cls, features: Tensor, number: int, seed: int) -> Layer:
        """Deal the images to folds; UserError where a fold would have fewer than 2, or all images look the same."""
        n = len(features)
        if n < 2 * number:
            raise UserError(f"{n} images are too few for {number} folds; allowed: {2 * number} images or more")
        varies(squares(features - features.mean(0)), squares(features))  # some of the images may, where all do not
        order = np.random.default_rng(key(seed, "folds", n)).permutation(n)
        tests = (np.sort(order[fold::number]) for fold in range(number))
        return cls(features, tuple(torch.from_numpy(test).to(features.device) for test in tests))

    @cached_property
    def spectra(self) -> tuple[Spectrum, ...]:
        """The decomposition that leaves each fold out."""
        x, n = self.features.double(), len(self.features)
        smallest = n - max(len(test) for test in self.folds)
        if x.shape[1] >= DUAL * smallest:
            gram = x @ x.T
            return tuple(_dual(gram, test, self.features.dtype) for test in self.folds)
        parts = [x[test].T @ x[test] for test in self.folds]
        total = sum(parts[1:], parts[0])
        return tuple(
            _primal(x, total - part, test, self.features.dtype) for part, test in zip(parts, self.folds, strict=True)
        )


@dataclass(frozen=True)
class Spectrum:
    """The decomposition of one training fold: with `G` the targets on its vectors, `scores @ (G / (values + a))` is the
    prediction of the images that were left out.

    Attributes:
        values: eigenvalues `(r,)`, float64.
        vectors: `(p, r)` of the features' Gram matrix, or `(m, r)` of the images'.
        scores: the images left out, on the vectors `(t, r)`.
        mean: mean eigenvalue of the images' Gram matrix.
        dual: whether it is of the images'.
    """

    values: Tensor
    vectors: Tensor
    scores: Tensor
    mean: float
    dual: bool

    def choose(self, on: Tensor, power: Tensor, images: int, penalties: Sequence[float]) -> Tensor:
        """Return the penalty with the least generalised cross-validation error, for each column of targets.

        Args:
            on: squares of the targets on the vectors `(r, c)`, float64.
            power: sums of squares of the centred targets `(c,)`, float64.
            images: m.
            penalties: relative to `mean`.
        """
        grid = torch.tensor(penalties, dtype=torch.float64, device=self.values.device)[:, None] * self.mean
        left = grid / (self.values + grid)  # what a penalty leaves of the targets along each vector, (penalties, r)
        if self.dual:  # the vectors span all centred targets: a sum, as the difference below would lose small residuals
            residual = left.square() @ on
        else:
            residual = power - ((1 + left) / (self.values + grid)) @ on
        freedom = left.sum(1, keepdim=True) + (images - 1 - len(self.values))
        error = residual.clamp(min=0) / freedom.square()
        return grid[error.argmin(0), 0]


def _primal(x: Tensor, square: Tensor, test: Tensor, dtype: torch.dtype) -> Spectrum:
    """Decompose the features' Gram matrix of the images other than `test`, given before centring."""
    images = len(x) - len(test)
    mean = (x.sum(0) - x[test].sum(0)) / images
    square = square - images * torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(square)
    values = values.clamp(min=0)
    return _spectrum(values, vectors, (x[test] - mean) @ vectors, images, squares(x), False, dtype)


def _dual(gram: Tensor, test: Tensor, dtype: torch.dtype) -> Spectrum:
    """Decompose the centred Gram matrix of the images other than `test`, but for the vector of ones."""
    train = others(len(gram), test)
    square, across = gram[train][:, train], gram[test][:, train]
    means = square.mean(0)
    across = across - across.mean(1, keepdim=True) - means + means.mean()
    square = square - means - means[:, None] + means.mean()
    images = len(train)
    # centring makes the ones an eigenvector of value 0, which could mix with others of that value: lift it to the top
    values, vectors = torch.linalg.eigh(square + 2 * square.trace() / images)
    values, vectors = values[:-1].clamp(min=0), vectors[:, :-1]
    return _spectrum(values, vectors, across @ vectors, images, float(gram.trace()), True, dtype)


def _spectrum(
    values: Tensor, vectors: Tensor, scores: Tensor, images: int, size: float, dual: bool, dtype: torch.dtype
) -> Spectrum:
    """Return the decomposition of a training fold; `size` is the sum of squares of all images' features."""
    total = float(values.sum())
    if not total > 1e-10 * size:
        raise UserError(f"features are constant over the {images} images of a training fold, so nothing can be fitted")
    return Spectrum(values, vectors.to(dtype), scores.to(dtype), total / images, dual)


def _ridge(a: Layer, b: Layer, *, penalties: Sequence[float], pooled: bool) -> Residuals:
    """Predict b from a with ridge regression, one penalty per fold for all targets (pooled) or one for each."""
    if pooled:
        yield from _ridge_of(a, b.features, penalties, True)
        return
    # features of y do not share a penalty: some at a time, so that wide layers need no more memory than their features
    width = max(1, CHUNK // sum(a.features.shape))
    pieces = [_ridge_of(a, part, penalties, False) for part in b.features.split(width, dim=1)]
    for parts in zip(*pieces, strict=True):
        yield parts[0][0], torch.cat([part[1] for part in parts], 1), torch.cat([part[2] for part in parts], 1)


def _ridge_of(a: Layer, y: Tensor, penalties: Sequence[float], pooled: bool) -> Residuals:
    x, n = a.features, len(y)
    total = None if a.spectra[0].dual else x.T @ y
    for test, spectrum in zip(a.folds, a.spectra, strict=True):
        train = others(n, test)
        targets = y[train]
        mean = targets.mean(0)
        targets = targets - mean
        if total is None:
            on = spectrum.vectors.T @ targets
        else:  # the product of the training images without going through them again for each fold
            product = total - x[test].T @ y[test] - torch.outer(x.sum(0) - x[test].sum(0), mean)
            on = spectrum.vectors.T @ product
        captured, power = on.double().square(), targets.square().sum(0, dtype=torch.float64)
        if pooled:
            captured, power = captured.sum(1, keepdim=True), power.sum(0, keepdim=True)
        chosen = spectrum.choose(captured, power, len(train), penalties)
        fitted = spectrum.scores @ (on / (spectrum.values[:, None] + chosen).to(on.dtype))
        yield test, y[test] - mean, fitted


def others(n: int, test: Tensor) -> Tensor:
    """Return the indices of the images that are not in a fold."""
    kept = torch.ones(n, dtype=torch.bool, device=test.device)
    kept[test] = False
    return kept.nonzero()[:, 0]


def _squares(residuals: Residuals, b: Layer) -> Tensor:
    """Return per image what was explained of its squared deviation, and that deviation `(n, 2)`, float64."""
    made = torch.empty(len(b.features), 2, dtype=torch.float64, device=b.features.device)
    for test, targets, fitted in residuals:
        made[test, 1] = targets.square().sum(1, dtype=torch.float64)
        made[test, 0] = made[test, 1] - (targets - fitted).square().sum(1, dtype=torch.float64)
    return made


def _ratio(terms: Tensor) -> float:
    explained, total = terms.sum(0).tolist()
    return explained / total


def _median_r(residuals: Residuals) -> float:
    """Return the mean over folds of the median over features of the correlation of targets and predictions."""
    medians = []
    for test, targets, fitted in residuals:
        (targets, varied), (fitted, predicted) = _unit(targets), _unit(fitted)
        r = torch.where(predicted, (targets * fitted).sum(0), 0.0)[varied]
        if not len(r):
            raise UserError(f"no feature of y varies over the {len(test)} images of a fold; allowed: fewer folds")
        medians.append(np.median(r.double().cpu().numpy()))
    return float(np.clip(np.mean(medians), -1, 1))


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return columns of mean 0 and length 1, and which of them vary."""
    away = x - x.mean(0)
    power = away.square().sum(0)
    return away / power.sqrt().clamp(min=torch.finfo(x.dtype).tiny), power > 1e-10 * x.square().sum(0)


MEASURES: tuple[Measure, ...] = tuple(ridge_predictivity(score) for score in SCORES)
"""`predictivity` and `predictivity_r`, with their default options."""
