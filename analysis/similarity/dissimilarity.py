"""Representational dissimilarity matrices: how different a layer finds every two of n images.

A matrix is kept as its n (n - 1) / 2 pairs above the diagonal, row after row as in `scipy.spatial.distance.pdist`. The
features are read once, in chunks of columns, so that p may be as large as a disk allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from localsim.analysis.similarity.measure import (
    Array,
    Numerics,
    Precision,
    as_features,
    check_shape,
    column_chunks,
    varies,
)
from localsim.errors import UserError, one_of

REPEATED = ("mahalanobis", "crossnobis")
"""Kinds that measure differences in units of noise, and so need repeated measurements."""
KINDS = ("correlation", "euclidean", "sqeuclidean", "cosine", *REPEATED)

_ROWS = 512  # of a Gram matrix at a time: what lies below the diagonal blocks is not computed


def rdm(
    x: Array, kind: str = "correlation", *, device: str | torch.device | None = None, dtype: Precision | None = None
) -> np.ndarray:
    """Return the representational dissimilarity matrix `(n, n)` of features `(n, p)`, with zeros on the diagonal.

        correlation    1 - r(x_i, x_j), r Pearson's over features
        cosine         1 - <x_i, x_j> / (|x_i| |x_j|)
        euclidean      |x_i - x_j|
        sqeuclidean    |x_i - x_j|^2
        mahalanobis    (m_i - m_j)' S^-1 (m_i - m_j)
        crossnobis     mean over repeats r != s of (x_ri - x_rj)' S^-1 (x_si - x_sj)

    Kriegeskorte, Mur & Bandettini 2008, Front. Syst. Neurosci. 2:4; the last two as in Walther et al. 2016, NeuroImage
    137:188. These two take repeated measurements `(repeats, n, p)`; m_i is the mean over repeats, and S the covariance
    of one measurement's noise, from the residuals about m_i, shrunk towards a multiple of the identity (Ledoit & Wolf
    2004, J. Multivar. Anal. 88:365; `shrinkage_eye` in rsatoolbox). The Mahalanobis distance is squared; noise makes it
    larger. The cross-validated one is about 0 on average for images that do not differ, and so may be negative. Only
    about, because S is estimated from the same repeats, and so fits their noise. What is left is positive and grows
    with p / (n (repeats - 1)), features per residual degree of freedom: of noise alone, independent between features,
    .04 of the mean Mahalanobis distance with 4 repeats, n = 100 and p = 50. Both are computed in float64. rsatoolbox
    divides all squared distances by p; here they are as they stand, which no comparison of RDMs notices.

    Args:
        x: features `(n, p)`, or `(repeats, n, p)`; an array (also memory-mapped), a tensor or a list of rows.
        kind: one of `KINDS`.
        device: where to compute; by default where `x` is.
        dtype: `float32` or `float64`, by name or as a type; by default float64 where `x` is, else float32.

    Raises:
        UserError: unknown kind; fewer than 4 images; non-finite or constant features; an image whose features are all
            equal (correlation) or zero (cosine); repeats without noise, or fewer than 2.
    """
    if kind not in KINDS:
        raise one_of("kind of RDM", kind, KINDS)
    x = as_features(x)
    check_shape(x, repeats=kind in REPEATED)
    return square(pairs_of(x, Numerics.of(x, device, dtype), kind)).cpu().numpy()


def pairs_of(x: Array, numerics: Numerics, kind: str) -> Tensor:
    """Return the RDM of features as its pairs `(n (n - 1) / 2,)`; see `rdm`."""
    if kind in REPEATED:
        return _noise_normalised(x, numerics, kind)
    return _plain(x, numerics, kind)


def square(pairs: Tensor) -> Tensor:
    """Return the `(n, n)` matrix of pairs."""
    n = image_count(pairs)
    matrix = pairs.new_zeros(n, n)
    for i, row in rows(pairs):
        matrix[i, i + 1 :] = matrix[i + 1 :, i] = row
    return matrix


def take_pairs(pairs: Tensor, images: Tensor) -> Tensor:
    """Return the pairs among some images, given their indices, no image twice.

    A distance belongs to its two images, so this is the RDM of those images; only the noise covariance of `mahalanobis`
    and `crossnobis` stays that of all images.
    """
    n, (ordered, order) = image_count(pairs), images.to(pairs.device).sort()
    taken = pairs.new_empty(math.comb(len(images), 2))
    start = ordered * (2 * n - ordered - 3) // 2 - 1  # pair (i, j), i < j, lies at start[i] + j
    for k, row in rows(taken):
        row.copy_(pairs[start[k] + ordered[k + 1 :]])
    if (order[1:] < order[:-1]).any():  # by way of the matrix, since pairs of one image lie far apart among pairs
        matrix, place = square(taken), order.argsort()
        for (k, row), image in zip(rows(taken), place.tolist(), strict=False):
            torch.index_select(matrix[image], 0, place[k + 1 :], out=row)
    return taken


def rows(pairs: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield every image but the last, with a view of its pairs with the images after it."""
    n, start = image_count(pairs), 0
    for i in range(n - 1):
        yield i, pairs[start : start + n - 1 - i]
        start += n - 1 - i


def image_count(pairs: Tensor) -> int:
    """Return n, given n (n - 1) / 2 pairs."""
    return (1 + math.isqrt(1 + 8 * len(pairs))) // 2


def _plain(x: Array, numerics: Numerics, kind: str) -> Tensor:
    """Return the pairs of a kind that needs no repeats.

    All kinds follow from |x_i - x_j|, and that from the Gram matrix of features which are centred over images: without
    centring a mean pattern that all images share, as behind a ReLU, would cost the distances most of float32's digits.
    With c_i the features less their mean over features (`correlation`) or as they are (`cosine`),

        1 - <c_i, c_j> / (|c_i| |c_j|) = (|c_i - c_j|^2 - (|c_i| - |c_j|)^2) / (2 |c_i| |c_j|)
    """
    n, p = x.shape
    angle = kind in ("correlation", "cosine")
    gram = torch.zeros(n, n, device=numerics.device, dtype=numerics.dtype)
    totals, centred_totals, squares = torch.zeros(3, n, device=numerics.device, dtype=torch.float64)
    level, spread = None, 0.0
    for chunk in column_chunks(x, numerics):
        if kind == "correlation":
            if level is None:
                level = _level(chunk, 1)
            chunk = chunk - level
            totals += chunk.sum(1, dtype=torch.float64)
        squares += torch.linalg.vector_norm(chunk, dim=1).double().square()
        chunk = chunk - _level(chunk, 0)
        spread += float(torch.linalg.vector_norm(chunk)) ** 2 - n * float(torch.linalg.vector_norm(chunk.mean(0))) ** 2
        if kind == "correlation":
            centred_totals += chunk.sum(1, dtype=torch.float64)
        for i in range(0, n, _ROWS):
            gram[i : i + _ROWS, i:].addmm_(chunk[i : i + _ROWS], chunk[i:].T)
    if not math.isfinite(float(squares.sum())):
        raise UserError(f"features are so large that their squares overflow {gram.dtype}; allowed: smaller ones")
    lengths = (squares - totals.square() / p).clamp(min=0).sqrt()
    if angle:
        _check_lengths(lengths, squares if level is None else squares + p * level.flatten().double().square(), kind)
    varies(spread, float(squares.sum()))
    diagonal, rounding = gram.diagonal().double(), 4 * torch.finfo(numerics.dtype).eps

    def distances(i: int, gram_row: Tensor) -> Tensor:
        scale = diagonal[i] + diagonal[i + 1 :]
        squared = scale - 2 * gram_row
        squared.masked_fill_(squared < rounding * scale, 0)  # what is left of images that are equal
        if angle:
            squared -= (centred_totals[i] - centred_totals[i + 1 :]).square() / p
            squared -= (lengths[i] - lengths[i + 1 :]).square()
            return (squared / (2 * lengths[i] * lengths[i + 1 :])).clamp(0, 2)
        return squared.sqrt() if kind == "euclidean" else squared

    pairs = _fill(gram, numerics, distances)
    if angle and not float(pairs.mean()) > 8 * torch.finfo(numerics.dtype).eps:
        raise UserError(
            f"all images have the same pattern of features up to its size: every {kind} distance is 0, so nothing can "
            "be compared"
        )
    return pairs


def _level(x: Tensor, dim: int) -> Tensor:
    """Return about the mean over `dim`: the nearest multiple of a power of two that is about the standard deviation.

    To subtract it conditions the distances as well as the mean does, and is exact for features of few digits, such as
    counts and one-hot labels; equal distances stay equal, and tied ranks tied.
    """
    mean = x.mean(dim, keepdim=True)
    spread = torch.linalg.vector_norm(x - mean, dim=dim, keepdim=True) / math.sqrt(x.shape[dim])
    spread = torch.maximum(spread, torch.finfo(x.dtype).eps * mean.abs())
    grid = spread / torch.frexp(spread).mantissa
    return torch.where(spread > 0, (mean / grid).round() * grid, mean)


def _check_lengths(lengths: Tensor, sizes: Tensor, kind: str) -> None:
    """Raise UserError, with the index, where an image's pattern has no length and so no angle with another."""
    empty = ~(lengths.square() > 1e-10 * sizes)
    if empty.any():
        same = "equal" if kind == "correlation" else "zero"
        raise UserError(
            f"image {int(empty.nonzero()[0])} has no {kind} distance: its features are all {same}; "
            "allowed: other images, or a euclidean RDM"
        )


def _fill(gram: Tensor, numerics: Numerics, distances: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return pairs, row by row, from `distances(i, gram[i, i + 1 :])`."""
    pairs = torch.empty(math.comb(len(gram), 2), device=numerics.device, dtype=numerics.dtype)
    for i, row in rows(pairs):
        row.copy_(distances(i, gram[i, i + 1 :]))
    return pairs


def _noise_normalised(x: Array, numerics: Numerics, kind: str) -> Tensor:
    """Return the pairs of a kind that needs repeats, from features `(repeats, n, p)`."""
    repeats, n, p = x.shape
    if repeats < 2:
        raise UserError(f"{repeats} measurement of every image shows no noise; a {kind} RDM needs 2 repeats or more")
    z = _coordinates(x.reshape(repeats * n, p), numerics).reshape(repeats, n, -1)
    # no factor changes the distances: this one, a power of two, keeps the fourth powers of shrinkage in range
    z = z * 2.0 ** -math.frexp(float(z.abs().max()))[1]
    mean = z.mean(0)
    noise = (z - mean).flatten(0, 1)
    if not noise.square().sum() > 1e-20 * z.square().sum():
        raise UserError(f"the repeats of every image are equal: a {kind} RDM needs their noise")
    factor, singular = torch.linalg.cholesky_ex(_shrunk_covariance(noise, p, dof=len(noise) - n))
    if singular:
        raise UserError("all noise lies along one direction, so its covariance has no inverse; allowed: more repeats")
    white = torch.linalg.solve_triangular(factor, z.flatten(0, 1).T, upper=False).T.reshape(repeats, n, -1)
    mean = white.mean(0)
    gram = mean @ mean.T
    if kind == "crossnobis":  # products of two repeats: those of all pairs of repeats, less those of each with itself
        each = white.transpose(0, 1).flatten(1)
        gram = (repeats * gram - each @ each.T / repeats) / (repeats - 1)
    diagonal = gram.diagonal()

    def distances(i: int, gram_row: Tensor) -> Tensor:
        squared = diagonal[i] + diagonal[i + 1 :] - 2 * gram_row
        return squared if kind == "crossnobis" else squared.clamp(min=0)

    return _fill(gram, numerics, distances)


def _coordinates(x: Array, numerics: Numerics) -> Tensor:
    """Return features `(m, p)`, centred, in float64; where p > m in a basis of the at most m dimensions they fill.

    The shrunk covariance turns with the features, so distances are the same in any basis.
    """
    wide = Numerics(numerics.device, torch.float64)
    chunks = (chunk - chunk.mean(0) for chunk in column_chunks(x, wide))
    if x.shape[1] <= len(x):
        return torch.cat(list(chunks), 1)
    gram = torch.zeros(len(x), len(x), device=numerics.device, dtype=torch.float64)
    for chunk in chunks:
        gram.addmm_(chunk, chunk.T)
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()


def _shrunk_covariance(noise: Tensor, p: int, dof: int) -> Tensor:
    """Return the covariance `(r, r)` of residuals `(m, r)`, shrunk towards a multiple of the identity.

    Ledoit & Wolf 2004, section 3, with their m, d^2 and b^2; p is the number of features, of which residuals fill r
    dimensions, and dof what is left of the m residuals once means were subtracted.
    """
    m = len(noise)
    covariance = noise.T @ noise / m
    size = covariance.square().sum()
    variance = covariance.trace() / p
    distance = (size - p * variance.square()).clamp(min=0)
    error = torch.minimum((noise.square().sum(1).square().mean() - size).clamp(min=0) / m, distance)
    weight = error / distance if distance > 0 else torch.ones_like(distance)
    shrunk = (1 - weight) * covariance
    shrunk.diagonal().add_(weight * variance)
    return shrunk * m / dof
