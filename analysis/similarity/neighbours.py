"""Shared nearest neighbours: does an image have the same images near it in both layers?"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from localsim.analysis.similarity.kernels import gram, room, squared_distances_
from localsim.analysis.similarity.measure import Array, Measure, Numerics, Precision, take_square
from localsim.errors import UserError, one_of

NEAREST = 10
NEARNESS = ("cosine", "euclidean")


def mutual_knn_measure(*, k: int = NEAREST, nearness: str = "cosine") -> Measure:
    """Return the share of common neighbours as a measure; the arguments are those of `mutual_knn`."""
    if nearness not in NEARNESS:
        raise one_of("nearness", nearness, NEARNESS)
    if k < 1:
        raise UserError(f"k={k} neighbours cannot be compared; allowed: 1 or more")
    return Measure(
        name="mutual_knn" if nearness == "cosine" else "mutual_knn_euclidean",
        summary=f"Mean share of the {k} nearest images ({nearness}) that an image has in common in both layers; "
        f"{k} / (n - 1) by chance.",
        source="Huh et al. 2024, sec. 2 and app. A",
        kind="similarity",
        low=0.0,
        high=1.0,
        symmetric=True,
        metric=False,
        bias="biased",
        invariances=frozenset({"orthogonal", "scale"} | ({"translation"} if nearness == "euclidean" else set())),
        represent=_cosines if nearness == "cosine" else _negated_distances,
        take=take_square,
        transform=partial(_nearest, k=k),
        compare=_share,
    )


def mutual_knn(
    x: Array,
    y: Array,
    *,
    k: int = NEAREST,
    nearness: str = "cosine",
    device: str | torch.device | None = None,
    dtype: Precision | None = None,
) -> float:
    """Return the mean share of nearest neighbours that images have in common in two layers, a similarity in [0, 1].

        mean over i of |N_x(i) n N_y(i)| / k             Huh et al. 2024 (the platonic representation), app. A

    with N(i) the k images nearest to image i, itself not counted. Unrelated layers score k / (n - 1) on average. As in
    the paper, nearest means by default the largest cosine of the features as they are: unchanged by a rotation and a
    factor of either layer, but not by an offset. `nearness="euclidean"` takes the smallest distance and is unchanged by
    an offset too. Where several images are equally near, which of them count is not defined.

    Args:
        x, y: features `(n, p)` and `(n, q)` of the same images.
        k: neighbours of an image, at most n - 2: with n - 1, everyone is everyone's neighbour.
        nearness: `cosine` or `euclidean`.
        device, dtype: where and how precisely to compute.

    Raises:
        UserError: k too large for n, an image whose features are all 0 (cosine), fewer than 4 images, mismatched
            images, constant or non-finite features.
    """
    return mutual_knn_measure(k=k, nearness=nearness)(x, y, device=device, dtype=dtype)


def _cosines(x: Array, numerics: Numerics) -> Tensor:
    room(len(x), numerics)
    matrix = gram(x, numerics, centre=False)
    lengths = matrix.diagonal().sqrt()
    if not (lengths > 0).all():
        raise UserError(
            f"the features of image {int(lengths.argmin())} are all 0, so it has no direction; use nearness='euclidean'"
        )
    return matrix.div_(lengths[:, None]).div_(lengths)


def _negated_distances(x: Array, numerics: Numerics) -> Tensor:
    room(len(x), numerics)
    return squared_distances_(gram(x, numerics)).neg_()


def _nearest(nearness: Tensor, *, k: int) -> Tensor:
    n = len(nearness)
    if k > n - 2:
        raise UserError(f"k={k} neighbours of n = {n} images are all there are; allowed: k up to {n - 2}")
    others = nearness.clone().fill_diagonal_(-torch.inf)
    return others.topk(k, dim=1, sorted=False).indices


def _share(a: Tensor, b: Tensor) -> float:
    # no image is twice among the neighbours of one layer, so equal ones side by side are one from either
    both = torch.cat([a, b], dim=1).sort(dim=1).values
    return int((both[:, 1:] == both[:, :-1]).sum()) / a.numel()


MEASURES = (mutual_knn_measure(), mutual_knn_measure(nearness="euclidean"))
