"""Centred kernel alignment: do two layers find the same pairs of images alike?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from localsim.analysis.similarity.kernels import (
    Kernel,
    centre_,
    gram,
    grams,
    hsic,
    rbf,
    room,
    squared_distances_,
    squares,
    u_centre_,
    within,
)
from localsim.analysis.similarity.measure import (
    MIN_IMAGES,
    Array,
    Measure,
    Numerics,
    Precision,
    check_shape,
    take_square,
)
from localsim.errors import UserError, one_of
from localsim.rng import key

KERNELS = ("linear", "rbf")
FRACTION = 0.8
"""Kernel width over the median distance between images; Kornblith et al. 2019 report 0.2, 0.4 and 0.8."""
BATCH = 256
FEWER = "use cka_minibatch or fewer images"


@dataclass(frozen=True)
class Aligned:
    """Kernel matrices ready for comparison: one, or one for each batch of images, and the root of their own HSIC."""

    kernels: tuple[Kernel, ...]
    norm: float


@dataclass(frozen=True)
class Batch:
    """One batch of the images.

    Attributes:
        images: their indices `(m,)`, on the CPU.
        matrix: U-centred inner products `(m, m)`.
    """

    images: Tensor
    matrix: Tensor


def cka_measure(
    *, kernel: str = "linear", debiased: bool = False, fraction: float | None = None, batch: int | None = None
) -> Measure:
    """Return CKA as a measure; the arguments are those of `cka`."""
    _check(kernel, debiased, fraction, batch)
    name = f"cka{'_rbf' if kernel == 'rbf' else ''}{'_minibatch' if batch else '_debiased' if debiased else ''}"
    kind = "inner products of centred features"
    represent: Callable[[Array, Numerics], object]
    transform: Callable[..., Aligned]
    take: Callable[..., object] = take_square
    if kernel == "rbf":
        fraction = FRACTION if fraction is None else fraction
        kind = f"a Gaussian of their distance, of width {fraction:g} times the median distance"
        represent, transform = _distances, partial(_rbf_aligned, fraction=fraction, debiased=debiased)
    elif batch:
        kind += f", within random batches of {batch} images"
        represent, transform = partial(_batches, batch=batch), _aligned_batches
        take = _take_from_batches
    else:
        represent, transform = partial(_centred, debiased=debiased), partial(_aligned_one, debiased=debiased)
    low = -1.0 if debiased else 0.0
    source = "Kornblith et al. 2019, sec. 3"
    if debiased:
        source += "; Nguyen et al. 2021, sec. 2" if batch else "; Song et al. 2012; Szekely & Rizzo 2014"
    return Measure(
        name=name,
        summary=f"Cosine of two layers' {'U-centred' if debiased else 'centred'} matrices of how alike images are: "
        f"{kind}.",
        source=source,
        kind="similarity",
        low=low,
        high=1.0,
        symmetric=True,
        metric=False,
        bias="debiased" if debiased else "biased",
        invariances=frozenset({"translation", "orthogonal", "scale"}),
        represent=represent,
        take=take,
        transform=transform,
        compare=partial(_cosine, low=low, debiased=debiased),
    )


def cka(
    x: Array,
    y: Array,
    *,
    kernel: str = "linear",
    debiased: bool = False,
    fraction: float | None = None,
    batch: int | None = None,
    device: str | torch.device | None = None,
    dtype: Precision | None = None,
) -> float:
    """Return the centred kernel alignment of two layers, a similarity.

        CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))                     Kornblith et al. 2019, sec. 3
        linear   K_ij = x_i'x_j
        rbf      K_ij = exp(-||x_i - x_j||^2 / (2 sigma^2)),  sigma = fraction x median of ||x_i - x_j||

    Biased CKA is in [0, 1] and tends to 1 for unrelated layers where features are many and images few. Debiased CKA
    uses the unbiased HSIC (Song et al. 2012), which makes it the cosine of U-centred matrices (Szekely & Rizzo
    2014): about 0 for unrelated layers, and in [-1, 1], where both ends can be reached. A negative value is no error:
    unrelated layers scatter to both sides of 0.

    Unchanged by an offset, a rotation and a factor of either layer, not by other linear maps.

    Args:
        x, y: features `(n, p)` and `(n, q)` of the same images.
        kernel: `linear` or `rbf`.
        debiased: use the unbiased HSIC.
        fraction: width of the rbf kernel over the median distance (not squared) of different images; 0.8 by default.
        batch: average the unbiased HSIC over batches of this many images (minibatch CKA of Nguyen et al. 2021), so
            that n x batch numbers are held per layer instead of n x n. Images are dealt to batches at random, always
            the same way for n images, so that their order does not matter. Where n is no multiple, batches are larger,
            as little and as evenly as possible, so that no image is left out. Needs the linear kernel, and
            `debiased=True`, since a bias would depend on the batch. Of some of the images (`take`, for half-samples),
            each stays in its batch, so that batches shrink and none is made anew; a batch left with fewer than 4
            images is not counted. Mismatched orders of images, likewise, mismatch them within batches.
        device, dtype: where and how precisely to compute.

    Raises:
        UserError: fewer than 4 images, mismatched images, constant or non-finite features, more images than memory is
            meant for, features by which every image is as far from every other (debiased), features too small or too
            large for the squares of their inner products, or options that do not go together.
    """
    measure = cka_measure(kernel=kernel, debiased=debiased, fraction=fraction, batch=batch)
    return measure(x, y, device=device, dtype=dtype)


def _check(kernel: str, debiased: bool, fraction: float | None, batch: int | None) -> None:
    if kernel not in KERNELS:
        raise one_of("kernel", kernel, KERNELS)
    if fraction is not None and kernel != "rbf":
        raise UserError(f"fraction={fraction} is the width of the rbf kernel and has no meaning with kernel={kernel!r}")
    if fraction is not None and not (math.isfinite(fraction) and fraction > 0):
        raise UserError(f"fraction={fraction} of the median distance is no width; allowed: above 0")
    if batch is None:
        return
    if kernel != "linear":
        raise UserError(f"batch={batch} goes with kernel='linear' only: another's width needs all images")
    if not debiased:
        raise UserError(f"batch={batch} needs debiased=True: the bias of a biased CKA would depend on the batch")
    if batch < MIN_IMAGES:
        raise UserError(f"batch={batch} images are too few for the unbiased HSIC; allowed: {MIN_IMAGES} or more")


def _centred(x: Array, numerics: Numerics, *, debiased: bool) -> Tensor:
    # of a part of either matrix, centring once more gives what centring that part of the kernel itself would give
    room(len(x), numerics, FEWER)
    matrix = gram(x, numerics)
    _check_size(matrix)
    return u_centre_(matrix) if debiased else matrix


def _distances(x: Array, numerics: Numerics) -> Tensor:
    # the kernel's width is another for other images, so that distances are what a part is taken from
    room(len(x), numerics, FEWER)
    return squared_distances_(gram(x, numerics))


def _batches(x: Array, numerics: Numerics, *, batch: int) -> tuple[Batch, ...]:
    check_shape(x)
    dealt = _dealt(len(x), max(1, len(x) // batch))
    room(max(map(len, dealt)), numerics, "use smaller batches")
    matrices = grams(x, numerics, dealt if len(dealt) > 1 else None)  # one batch of all needs no reordering of features
    for matrix in matrices:
        _check_size(matrix)
    return tuple(Batch(images, u_centre_(matrix)) for images, matrix in zip(dealt, matrices, strict=True))


def _dealt(n: int, number: int) -> list[Tensor]:
    """Return the images of every batch, in ascending order; the same for every layer."""
    order = np.random.default_rng(key(0, "batches", n)).permutation(n)
    return [torch.from_numpy(np.sort(order[index::number])) for index in range(number)]


def _take_from_batches(batches: tuple[Batch, ...], images: Tensor) -> tuple[Batch, ...]:
    images = images.cpu()
    # where each image is: in which batch, and where in it
    place = torch.empty(2, sum(len(batch.images) for batch in batches), dtype=torch.long)
    for index, batch in enumerate(batches):
        place[0, batch.images] = index
        place[1, batch.images] = torch.arange(len(batch.images))
    which, within_batch = place[:, images]
    taken = []
    for index, batch in enumerate(batches):
        kept = (which == index).nonzero()[:, 0]
        taken.append(Batch(kept, take_square(batch.matrix, within_batch[kept])))
    return tuple(taken)


def _check_size(matrix: Tensor) -> None:
    """Raise UserError where the squares of even the largest inner product underflow; of too large ones, see below."""
    largest = max(abs(float(edge)) for edge in torch.aminmax(matrix))
    if largest and largest**2 < torch.finfo(matrix.dtype).tiny:
        raise UserError(
            f"features are too small: the squares of their inner products underflow {str(matrix.dtype)[6:]}; "
            "multiply them"
        )


def _aligned_batches(batches: tuple[Batch, ...]) -> Aligned:
    return _aligned(tuple(batch.matrix for batch in batches), debiased=True)


def _aligned_one(matrix: Tensor, *, debiased: bool) -> Aligned:
    return _aligned((matrix,), debiased=debiased)


def _rbf_aligned(distances: Tensor, *, fraction: float, debiased: bool) -> Aligned:
    matrix = rbf(distances, fraction)
    return _aligned_one(u_centre_(matrix) if debiased else centre_(matrix), debiased=debiased)


def _aligned(matrices: tuple[Tensor, ...], *, debiased: bool) -> Aligned:
    kernels = tuple(Kernel.of(matrix) for matrix in matrices if len(matrix) >= MIN_IMAGES)
    if not kernels:
        raise UserError(f"no batch has the {MIN_IMAGES} images that the unbiased HSIC needs; use larger batches")
    size = sum(squares(kernel.matrix) / len(kernel.matrix) ** 2 for kernel in kernels) / len(kernels)
    own = _mean_hsic(kernels, kernels, debiased)
    if not math.isfinite(own):
        raise UserError("features are so large that the squares of their inner products overflow; divide them")
    if not own > 16 * torch.finfo(kernels[0].matrix.dtype).eps * size:
        raise UserError(
            "every image is as far from every other in these features, so there is no structure to compare"
            if debiased
            else "features are constant: all images look the same to this layer, so nothing can be compared"
        )
    return Aligned(kernels, math.sqrt(own))


def _mean_hsic(a: tuple[Kernel, ...], b: tuple[Kernel, ...], debiased: bool) -> float:
    return sum(hsic(p, q, debiased=debiased) for p, q in zip(a, b, strict=True)) / len(a)


def _cosine(a: Aligned, b: Aligned, *, low: float, debiased: bool) -> float:
    return within(_mean_hsic(a.kernels, b.kernels, debiased) / (a.norm * b.norm), low, 1.0)


MEASURES = (
    cka_measure(),
    cka_measure(debiased=True),
    cka_measure(kernel="rbf"),
    cka_measure(kernel="rbf", debiased=True),
    cka_measure(debiased=True, batch=BATCH),
)
