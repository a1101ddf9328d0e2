"""Regression on a few latent directions (partial least squares), the map that Brain-Score fits by default.

Each component is the direction of the predictors whose product with the targets is largest, found after what earlier
components carry has been taken out (Wold 1975). The kernel form below never changes the predictors themselves, only
the small product with the targets (Dayal & MacGregor 1997, J. Chemometrics 11:73, algorithm 1).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from localsim.analysis.similarity.measure import Measure
from localsim.analysis.similarity.prediction import SCORES, Layer, Residuals, held_out, others
from localsim.errors import UserError
from localsim.rng import generator

COMPONENTS = 25
"""As many as Brain-Score fits."""

BLOCK = 16
"""Singular vectors followed at once: the next components are nearly found with the first."""
ITERATIONS = 1000


def pls_predictivity(score: str = "r2", folds: int = 5, seed: int = 0, components: int | None = None) -> Measure:
    """Return the measure that `predictivity` applies with method pls, with the same options."""
    number = COMPONENTS if components is None else components
    if number < 1:
        raise UserError(f"components {number} predict nothing; allowed: 1 or more")
    fit = f"partial least squares with {number} components"
    source = "Dayal & MacGregor 1997, algorithm 1"
    return held_out(partial(_latent, components=number), "predictivity_pls", fit, source, score, folds, seed)


def _latent(a: Layer, b: Layer, *, components: int) -> Residuals:
    """Predict b from a with partial least squares."""
    x, y = a.features, b.features
    for test in a.folds:
        train = others(len(x), test)
        left, right = x[train].mean(0), y[train].mean(0)
        fitted = latent_prediction(x[train] - left, y[train] - right, x[test] - left, components)
        yield test, y[test] - right, fitted


def latent_prediction(x: Tensor, y: Tensor, new: Tensor, components: int) -> Tensor:
    """Return what partial least squares fitted to `x`, `y` predicts from `new`, all centred by the means of x and y.

        w = leading left singular vector of S = X^T Y,   r = w - sum_j (p_j . w) r_j,   t = X r,
        p = X^T t / t.t,   q = S^T r / t.t,   S <- S - (t.t) p q^T;      prediction = X_new sum_j r_j q_j^T

    It stops early where nothing of the targets is left that the predictors vary with: more components change nothing.

    Args:
        x: predictors `(m, p)`.
        y: targets `(m, q)`.
        new: predictors of other images `(t, p)`.
        components: how many directions.

    Returns:
        `(t, q)`

    Raises:
        UserError: fewer images or features than components.
    """
    images, features = x.shape
    most = min(images - 1, features)
    if components > most:
        few = f"{images} training images" if images - 1 <= features else f"{features} features"
        raise UserError(f"{components} components cannot be fitted to {few}; allowed: up to {most} components")
    rotations, loadings = x.new_zeros(2, features, components)
    weights = x.new_zeros(y.shape[1], components)
    product, right, first = x.T @ y, None, 0.0
    for number in range(components):
        left, right, size = leading(product, right)
        first = first or size
        if size <= 100 * torch.finfo(x.dtype).eps * first:
            break
        rotation = left - rotations[:, :number] @ (loadings[:, :number].T @ left)
        latent = x @ rotation
        power = latent @ latent
        loadings[:, number] = x.T @ latent / power
        weights[:, number] = product.T @ rotation / power
        rotations[:, number] = rotation
        product = product - power * torch.outer(loadings[:, number], weights[:, number])
    return (new @ rotations) @ weights.T


def leading(matrix: Tensor, right: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Return the first left singular vector of a matrix `(p, q)`, a block of right ones, and the first singular value.

    Subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4) until `|S v - s u| <= tolerance s`: components
    need one vector each, for which a full decomposition would be `p` times the work.

    Args:
        right: orthonormal `(q, b)` to start from, such as the block of the component before.
    """
    tolerance = 1e-10 if matrix.dtype == torch.float64 else 1e-6
    block: Tensor = _start(matrix) if right is None else right
    image, left, size = matrix @ block, matrix.new_zeros(len(matrix)), 0.0
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(image)[0]
        other, triangle = torch.linalg.qr(matrix.T @ basis)
        inner, sizes, outer = torch.linalg.svd(triangle)
        block, left, size = other @ inner, basis @ outer[0], float(sizes[0])
        image = matrix @ block
        if float((image[:, 0] - size * left).norm()) <= tolerance * size:
            break
    return left, block, size


def _start(matrix: Tensor) -> Tensor:
    """Return random orthonormal columns, as many as singular vectors are followed; the same for every matrix."""
    width = min(BLOCK, *matrix.shape)
    draws = torch.randn(matrix.shape[1], width, generator=generator("leading"), dtype=torch.float64)
    return torch.linalg.qr(draws.to(matrix))[0]


MEASURES: tuple[Measure, ...] = tuple(pls_predictivity(score) for score in SCORES)
"""`predictivity_pls` and `predictivity_pls_r`, with their default options."""
