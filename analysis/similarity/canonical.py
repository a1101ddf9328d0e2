"""Canonical correlations: how much of what one layer can say linearly can the other say too?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from localsim.analysis.similarity.kernels import centred, coordinates, within
from localsim.analysis.similarity.measure import Array, Measure, Numerics, Precision, check_shape, take_rows
from localsim.errors import UserError

VARIANCE = 0.99
"""Share of a layer's variance that SVCCA keeps (Raghu et al. 2017)."""

NEGLIGIBLE = 1e-5
"""Singular values below this share of the largest one are those of rounding.

Whatever the precision computed with: networks make float32 features, whose rounding float64 would take for directions.
"""


@dataclass(frozen=True)
class Subspace:
    """What a layer spans over images.

    Attributes:
        basis: orthonormal `(n, r)`, float64.
        loadings: of the centred features on it `(r, p)`: features = basis @ loadings.
    """

    basis: Tensor
    loadings: Tensor


def cca_measure() -> Measure:
    """Return the mean canonical correlation as a measure."""
    return _measure(
        "cca", "Mean canonical correlation of two layers.", "Raghu et al. 2017, sec. 2", {"orthogonal", "linear"}
    )


def svcca_measure(*, variance: float = VARIANCE) -> Measure:
    """Return SVCCA as a measure; the argument is that of `svcca`."""
    if not 0 < variance < 1:
        raise UserError(f"variance={variance} is no share of variance to keep; allowed: above 0 and below 1")
    return _measure(
        "svcca",
        f"Mean canonical correlation of the directions that hold {variance:.0%} of each layer's variance.",
        "Raghu et al. 2017, sec. 2",
        {"orthogonal"},
        variance=variance,
    )


def pwcca_measure() -> Measure:
    """Return PWCCA as a measure."""
    return _measure(
        "pwcca",
        "Canonical correlations of two layers, weighted by how much of the first layer's features each accounts for.",
        "Morcos et al. 2018",
        set(),
        weighted=True,
    )


def cca(x: Array, y: Array, *, device: str | torch.device | None = None, dtype: Precision | None = None) -> float:
    """Return the mean canonical correlation of two layers, a similarity in [0, 1].

        mean over min(rank X, rank Y) of rho_i, the singular values of Qx'Qy        Raghu et al. 2017

    with Qx and Qy orthonormal bases of the centred features. It is the mean of rho, not of rho^2. Directions with a
    singular value below 1e-5 of the largest one are left out (`NEGLIGIBLE`), so that features that never vary, or that
    others determine linearly, do not count. Unchanged by an offset and any invertible linear map of either layer, as
    long as its condition leaves no direction negligible. Biased: unrelated layers of p features each score about
    8 / (3 pi) sqrt(p / n) where n is much larger (the singular values' quarter-circle law).

    Args:
        x, y: features `(n, p)` and `(n, q)` of the same images, p and q below n - 1.
        device, dtype: where and how precisely to hold features; decompositions are float64.

    Raises:
        UserError: as many features as images (then it is 1 by construction), fewer than 4 images, mismatched images,
            constant or non-finite features.
    """
    return cca_measure()(x, y, device=device, dtype=dtype)


def svcca(
    x: Array,
    y: Array,
    *,
    variance: float = VARIANCE,
    device: str | torch.device | None = None,
    dtype: Precision | None = None,
) -> float:
    """Return the singular-vector canonical correlation of two layers, a similarity in [0, 1] (Raghu et al. 2017).

    Of each layer the fewest principal directions are kept that hold `variance` of its variance; then as `cca`. There
    may be more features than images. Unchanged by an offset, a rotation and a factor of either layer, not by other
    linear maps, which change what the principal directions are.

    Args:
        x, y: features `(n, p)` and `(n, q)` of the same images.
        variance: share of variance to keep.
        device, dtype: where and how precisely to hold features; decompositions are float64.

    Raises:
        UserError: so many directions kept that it is 1 by construction, fewer than 4 images, mismatched images,
            constant or non-finite features.
    """
    return svcca_measure(variance=variance)(x, y, device=device, dtype=dtype)


def pwcca(x: Array, y: Array, *, device: str | torch.device | None = None, dtype: Precision | None = None) -> float:
    """Return the projection-weighted canonical correlation of two layers, a similarity in [0, 1] (Morcos et al. 2018).

        sum_i a_i rho_i / sum_i a_i,   a_i = sum_j |<h_i, x_j>|

    with h_i the canonical variates of x, of unit length, and x_j its centred features. The weights are those of x, so
    that `pwcca(x, y)` is not `pwcca(y, x)`. Unchanged by an offset and a factor of either layer and by any invertible
    linear map of y; a rotation of x changes its features and so the weights.

    Args, Raises: as for `cca`.
    """
    return pwcca_measure()(x, y, device=device, dtype=dtype)


def _measure(
    name: str,
    summary: str,
    source: str,
    invariances: set[str],
    *,
    variance: float | None = None,
    weighted: bool = False,
) -> Measure:
    return Measure(
        name=name,
        summary=summary,
        source=source,
        kind="similarity",
        low=0.0,
        high=1.0,
        symmetric=not weighted,
        metric=False,
        bias="biased",
        invariances=frozenset({"translation", "scale"} | invariances),
        represent=_narrow if variance is None else coordinates,
        take=take_rows,
        transform=partial(_subspace, variance=variance),
        compare=_weighted if weighted else _mean,
    )


def _narrow(x: Array, numerics: Numerics) -> Tensor:
    check_shape(x)
    n, p = x.shape
    if p >= n:
        raise UserError(
            f"p = {p} features of n = {n} images: canonical correlations would be 1 by construction; use svcca, "
            f"or more than {p + 1} images"
        )
    return coordinates(x, numerics)


def _subspace(rows: Tensor, *, variance: float | None) -> Subspace:
    moved = centred(rows)
    n = len(moved)
    left, sizes, right = torch.linalg.svd(moved, full_matrices=False)
    rank = int((sizes > NEGLIGIBLE * sizes[0]).sum())
    if variance is not None:
        held = sizes.square().cumsum(0) / sizes.square().sum()
        # the slack keeps k equal directions of k + 1 at k where their shares add up to the limit but for rounding
        rank = min(rank, 1 + int((held < variance - 1e-12).sum()))
    if rank >= n - 1:
        raise UserError(
            f"a layer of p = {rows.shape[1]} dimensions spans all {n - 1} that n = {n} images have: canonical "
            "correlations would be 1 by construction; use "
            + ("svcca, or more images" if variance is None else "a smaller variance, or more images")
        )
    return Subspace(left[:, :rank], sizes[:rank, None] * right[:rank])


def _mean(a: Subspace, b: Subspace) -> float:
    return within(float(torch.linalg.svdvals(a.basis.T @ b.basis).mean()), 0.0, 1.0)


def _weighted(a: Subspace, b: Subspace) -> float:
    turn, correlations, _ = torch.linalg.svd(a.basis.T @ b.basis, full_matrices=False)
    weights = (turn.T @ a.loadings).abs().sum(1)
    return within(float((weights * correlations).sum() / weights.sum()), 0.0, 1.0)


MEASURES = (cca_measure(), svcca_measure(), pwcca_measure())
