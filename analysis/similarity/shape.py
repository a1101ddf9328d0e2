"""Procrustes distance: how far two layers are apart once one is turned to fit the other."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from localsim.analysis.similarity.kernels import centred, coordinates, within
from localsim.analysis.similarity.measure import Array, Measure, Precision, take_rows


def procrustes_measure(*, angular: bool = False) -> Measure:
    """Return the Procrustes distance as a measure; the argument is that of `procrustes`."""
    return Measure(
        name="procrustes_angular" if angular else "procrustes",
        summary=("Angle" if angular else "Distance")
        + " between two centred layers of unit size, one of them turned or "
        "reflected to fit the other.",
        source="Williams et al. 2021, sec. 2; Ding et al. 2021",
        kind="distance",
        low=0.0,
        high=math.pi / 2 if angular else math.sqrt(2),
        symmetric=True,
        metric=True,
        bias="biased",
        invariances=frozenset({"translation", "orthogonal", "scale"}),
        represent=coordinates,
        take=take_rows,
        transform=_unit,
        compare=partial(_distance, angular=angular),
    )


def procrustes(
    x: Array,
    y: Array,
    *,
    angular: bool = False,
    device: str | torch.device | None = None,
    dtype: Precision | None = None,
) -> float:
    """Return the orthogonal Procrustes distance of two layers, in [0, sqrt 2], or the angle, in [0, pi/2].

        distance  min_Q ||X - Y Q||_F = sqrt(2 - 2 ||X'Y||_*)          root of the distance of Ding et al. 2021
        angular   arccos ||X'Y||_*                                     Williams et al. 2021, sec. 2

    where X and Y are centred over images and of Frobenius norm 1, Q is orthogonal and ||.||_* is the sum of singular
    values. Layers of different widths are compared as if the narrower one were padded with features that are 0; the
    sum of singular values is the same without the padding. Both are metrics (Williams et al. 2021). Biased:
    with many features and few images unrelated layers come near each other.

    Unchanged by an offset, a rotation or reflection and a positive factor of either layer, not by other linear maps.
    Coordinates are held in `dtype`; products and singular values are float64 throughout, since near 0 the distance
    magnifies rounding. Identical layers are at about 1e-8, not at 0.

    Args:
        x, y: features `(n, p)` and `(n, q)` of the same images.
        angular: return the angle, in radians.
        device, dtype: where and how precisely to compute.

    Raises:
        UserError: fewer than 4 images, mismatched images, constant or non-finite features.
    """
    return procrustes_measure(angular=angular)(x, y, device=device, dtype=dtype)


def _unit(rows: Tensor) -> Tensor:
    moved = centred(rows)
    return moved / torch.linalg.vector_norm(moved)


def _distance(a: Tensor, b: Tensor, *, angular: bool) -> float:
    overlap = within(float(torch.linalg.svdvals(a.T @ b).sum()), 0.0, 1.0)
    return math.acos(overlap) if angular else math.sqrt(2 - 2 * overlap)


MEASURES = (procrustes_measure(), procrustes_measure(angular=True))
