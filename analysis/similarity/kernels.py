"""Gram matrices of layers, how they are centred, and coordinates with the same Gram matrix.

The features are read in chunks of columns, so that what is held is n x n, or n x p where p is no larger than n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localsim.analysis.similarity.measure import Array, Numerics, check_shape, column_chunks, varies
from localsim.errors import UserError

MATRIX_BYTES = 2**31
"""Largest n x n matrix of one layer: 23,170 images in float32, 16,384 in float64."""

BLOCK = 128
"""Rows that are multiplied at a time: only the blocks on and above the diagonal of a Gram matrix are computed."""

ENTRIES = 2**20
"""Products that are summed at a time, in the matrix's own precision; their sums are added in float64."""


def room(n: int, numerics: Numerics, instead: str = "use fewer images") -> None:
    """Raise UserError where the n x n matrix of one layer would be larger than `MATRIX_BYTES`."""
    size = n * n * numerics.dtype.itemsize
    if size > MATRIX_BYTES:
        most = math.isqrt(MATRIX_BYTES // numerics.dtype.itemsize)
        raise UserError(
            f"{n} images need a matrix of {size / 1e9:.1f} GB per layer; allowed: {most} images or fewer; {instead}"
        )


def gram(x: Array, numerics: Numerics, *, centre: bool = True) -> Tensor:
    """Return the inner products of images `(n, n)`, of features with (by default) their mean over images removed.

    Removing the mean from the features, not from the matrix, loses nothing to rounding where the mean is large.

    Raises:
        UserError: constant or non-finite features, or features whose squares overflow.
    """
    (matrix,) = grams(x, numerics, None, centre=centre)
    return matrix


def grams(x: Array, numerics: Numerics, batches: Sequence[Tensor] | None, *, centre: bool = True) -> list[Tensor]:
    """Return the inner products of images within batches, given by their indices, in one pass over the features.

    Without batches, all images are one.
    """
    check_shape(x)
    sizes = [len(x)] if batches is None else [len(batch) for batch in batches]
    made = [torch.zeros(size, size, device=numerics.device, dtype=numerics.dtype) for size in sizes]
    chosen = [slice(None)] if batches is None else [batch.to(numerics.device) for batch in batches]
    spread = size = 0.0
    for chunk in column_chunks(x, numerics):
        size += squares(chunk)
        moved = _less_mean(chunk)
        spread += squares(moved)
        for matrix, batch in zip(made, chosen, strict=True):
            _add_products(matrix, (moved if centre else chunk)[batch])
    finite(size, numerics)
    varies(spread, size)
    for matrix in made:
        _mirror(matrix)
    return made


def coordinates(x: Array, numerics: Numerics) -> Tensor:
    """Return coordinates of images `(n, r)`, r = min(n, p) or less, whose inner products are those of the centred `x`.

    Where p <= n they are the centred features. Where p > n they come from the eigenvectors of the Gram matrix, both in
    float64; directions with an eigenvalue below n times float64's rounding unit times the largest one are left out.
    """
    check_shape(x)
    n, p = x.shape
    if p <= n:
        rows = torch.cat(list(column_chunks(x, numerics)), dim=1)
        size = squares(rows)
        finite(size, numerics)
        rows = _less_mean(rows)
        varies(squares(rows), size)
        return rows
    wide = Numerics(numerics.device, torch.float64)
    room(n, wide)
    values, vectors = torch.linalg.eigh(gram(x, wide))
    kept = values > n * torch.finfo(torch.float64).eps * values[-1]
    return (vectors[:, kept] * values[kept].sqrt()).to(numerics.dtype)


def centred(rows: Tensor) -> Tensor:
    """Return coordinates `(n, r)` in float64 with their mean over these images removed; UserError where none vary."""
    rows = rows.double()
    moved = rows - rows.mean(0)
    varies(squares(moved), squares(rows))
    return moved


def squares(values: Tensor) -> float:
    """Return the sum of squares."""
    return float(torch.linalg.vector_norm(values)) ** 2


def squared_distances_(matrix: Tensor) -> Tensor:
    """Turn inner products `(n, n)` in place into squared distances between images."""
    lengths = matrix.diagonal().clone()
    return matrix.mul_(-2).add_(lengths[:, None]).add_(lengths).clamp_(min=0).fill_diagonal_(0)


def rbf(distances: Tensor, fraction: float) -> Tensor:
    """Return the kernel exp(-d^2 / (2 sigma^2)) of squared distances `(n, n)`, sigma = fraction x median distance.

    The median is over pairs of different images; of an even number of pairs it is the lower middle one.

    Raises:
        UserError: the median is 0.
    """
    pairs = torch.cat([row[i + 1 :] for i, row in enumerate(distances[:-1])])
    median = float(pairs.median())
    if not median > 0:
        raise UserError(
            "at least half of the pairs of images look the same to this layer, so that the kernel's width, a fraction "
            "of the median distance, would be 0; use kernel='linear'"
        )
    return torch.exp(distances * (-1 / (2 * fraction**2 * median)))


def centre_(matrix: Tensor) -> Tensor:
    """Centre a kernel matrix `(n, n)` in place: rows and columns then sum to 0."""
    means = matrix.mean(1)
    return matrix.sub_(means[:, None]).sub_(means - means.mean())


def u_centre_(matrix: Tensor) -> Tensor:
    """U-centre a kernel matrix `(n, n)` in place, n >= 4 (Szekely & Rizzo 2014, Ann. Statist. 42:2382).

    The diagonal is 0, and so are the sums of rows and columns. Where every image is as far from every other, all that
    is left is rounding, and the matrix becomes 0.
    """
    n = len(matrix)
    scale = float(matrix.diagonal().mean())
    matrix.fill_diagonal_(0)
    sums = matrix.sum(1)
    shares = sums / (n - 2)
    matrix.sub_(shares[:, None]).sub_(shares - sums.sum() / ((n - 1) * (n - 2))).fill_diagonal_(0)
    left = math.sqrt(squares(matrix) / (n * (n - 1)))
    return matrix if left > 32 * torch.finfo(matrix.dtype).eps * scale else matrix.zero_()


@dataclass(frozen=True)
class Kernel:
    """A kernel matrix with its row sums, by which it is centred without a copy of it.

    Attributes:
        matrix: `(n, n)`; with a zero diagonal where it is for the unbiased HSIC.
        sums: of its rows, float64 `(n,)`.
    """

    matrix: Tensor
    sums: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Kernel:
        return cls(matrix, matrix.sum(1).double())


def hsic(a: Kernel, b: Kernel, *, debiased: bool) -> float:
    """Return the Hilbert-Schmidt independence criterion of two kernel matrices.

        biased    tr(A H B H) / (n - 1)^2,  H = I - 11'/n            Gretton et al. 2005
        unbiased  (tr(A B) + 1'A1 1'B1 / ((n - 1)(n - 2)) - 2 1'AB1 / (n - 2)) / (n (n - 3)),
                  A and B with a zero diagonal                       Song et al. 2012, J. Mach. Learn. Res. 13:1393

    The second is the inner product of the U-centred matrices, over n (n - 3) (Szekely & Rizzo 2014).
    """
    n = len(a.matrix)
    together = dot(a.matrix, b.matrix)
    rows = float(a.sums @ b.sums)
    totals = float(a.sums.sum() * b.sums.sum())
    if debiased:
        return (together + totals / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))
    return (together + totals / n**2 - 2 * rows / n) / (n - 1) ** 2


def dot(a: Tensor, b: Tensor) -> float:
    """Return the sum of products of two matrices' entries, to about the rounding of one entry also in float32."""
    height = max(1, ENTRIES // a.shape[1])
    parts = [(p * q).sum() for p, q in zip(a.split(height), b.split(height), strict=True)]
    return float(torch.stack(parts).double().sum())


def within(value: float, low: float, high: float, slack: float = 1e-6) -> float:
    """Return a value that rounding alone (`slack`) pushed outside its range at the end of the range, others as is."""
    return min(max(value, low), high) if low - slack <= value <= high + slack else value


def _less_mean(rows: Tensor) -> Tensor:
    moved = rows - rows.mean(0)
    return moved.sub_(moved.mean(0))  # twice: the first mean's own rounding may be large beside what varies


def _add_products(matrix: Tensor, rows: Tensor) -> None:
    for start in range(0, len(rows), BLOCK):
        matrix[start : start + BLOCK, start:].addmm_(rows[start : start + BLOCK], rows[start:].T)


def _mirror(matrix: Tensor) -> None:
    for start in range(0, len(matrix), BLOCK):
        stop = start + BLOCK
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T


def finite(size: float, numerics: Numerics) -> None:
    if not math.isfinite(size):
        raise UserError(f"features are so large that their squares overflow {str(numerics.dtype)[6:]}; divide them")
