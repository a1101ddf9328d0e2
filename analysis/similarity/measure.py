"""What a measure of similarity declares, and the three steps by which it is applied to one pair of layers or to many.

    features (n, p) --represent--> one layer, by image --transform--> what pairs are compared by --compare--> a number

The first step sees the features, in chunks, and is done once per layer; its result has n x n numbers at most and can be
resampled by image. So a matrix of layers never needs the features of more than one layer at a time, and an interval
needs no features at all.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from localsim.errors import UserError, one_of

Array = np.ndarray | Tensor

INVARIANCES = ("translation", "orthogonal", "scale", "linear")
"""Of features: an offset added to every image; a rotation or reflection; one positive factor; any invertible map."""

MIN_IMAGES = 4
CHUNK = 2**22
"""Numbers of a layer that are on the device at a time."""

MAPPED_ROWS = 64
"""Rows of a file that are mapped at a time: with every page that is read, Linux maps those around it."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A measure of how alike two layers are, with what has to be known to read its numbers.

    `measure(x, y)` takes features `(n, p)` and `(n, q)` of the same n images, in the same order, and returns a float.

    Attributes:
        name: in tables and on the command line.
        summary: one sentence.
        source: paper and section.
        kind: whether larger means more alike.
        low, high: the range of its values; may be infinite.
        symmetric: whether `m(x, y) = m(y, x)`.
        metric: whether it is a distance that obeys the triangle inequality.
        bias: `biased` (grows or shrinks with n and p where there is no relation), `debiased` (then 0 on average),
            `cross-validated` (scored on images that nothing was fitted to), or `none` (no such notion).
        invariances: which of `INVARIANCES` leave it unchanged when applied to either argument.
        repeats: whether it takes features with repeated measurements, `(repeats, n, p)`.
        represent: features and numerics to what stands for a layer.
        take: that of some of the images, given their indices.
        transform: that, made ready for comparison.
        compare: two of those to a number.
        terms: where the value is a ratio of sums over images, `(n, 2)` with the terms of both sums, so that images can
            be resampled without fitting again; else None.
    """

    name: str
    summary: str
    source: str
    kind: Literal["similarity", "distance"]
    low: float
    high: float
    symmetric: bool
    metric: bool
    bias: Literal["biased", "debiased", "cross-validated", "none"]
    invariances: frozenset[str]
    represent: Callable[[Array, Numerics], Any]
    take: Callable[[Any, Tensor], Any]
    transform: Callable[[Any], Any]
    compare: Callable[[Any, Any], float]
    terms: Callable[[Any, Any], Tensor] | None = None
    repeats: bool = False

    def __call__(
        self, x: Array, y: Array, *, device: str | torch.device | None = None, dtype: str | None = None
    ) -> float:
        """Return the measure of two layers.

        Args:
            x, y: features `(n, p)` and `(n, q)`, arrays (also memory-mapped) or tensors.
            device: where to compute; by default where `x` is.
            dtype: `float32` or `float64`; by default float64 where `x` is, else float32.

        Raises:
            UserError: fewer than 4 images, another number of images, constant or non-finite features.
        """
        numerics = Numerics.of(x, device, dtype)
        same_images(x, y, repeats=self.repeats)
        a, b = (self.transform(self.represent(features, numerics)) for features in (x, y))
        return self.compare(a, b)


@dataclass(frozen=True)
class Numerics:
    """Where and how precisely to compute."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Array, device: str | torch.device | None = None, dtype: str | None = None) -> Numerics:
        """Return the numerics asked for, or those of the features."""
        if dtype not in (None, "float32", "float64"):
            raise one_of("dtype", dtype, ("float32", "float64"))
        wide = x.dtype in (np.float64, torch.float64) if dtype is None else dtype == "float64"
        here = device if device is not None else (x.device if isinstance(x, Tensor) else "cpu")
        return cls(torch.device(here), torch.float64 if wide else torch.float32)


def same_images(x: Array, y: Array, *, repeats: bool = False) -> None:
    """Raise UserError unless both are features of the same number of images, at least 4."""
    for features in (x, y):
        check_shape(features, repeats=repeats)
    axis = 1 if repeats else 0
    if x.shape[axis] != y.shape[axis]:
        raise UserError(
            f"the layers have {x.shape[axis]} and {y.shape[axis]} images; a comparison needs the same images in the "
            "same order"
        )


def check_shape(x: Array, *, repeats: bool = False) -> None:
    """Raise UserError unless `x` is `(n, p)`, with repeats `(repeats, n, p)`, of at least 4 images."""
    wanted = "(repeats, n, p)" if repeats else "(n, p)"
    if x.ndim != 2 + repeats or 0 in x.shape:
        raise UserError(f"features must be {wanted}, images by features, not of shape {tuple(x.shape)}")
    if x.shape[-2] < MIN_IMAGES:
        raise UserError(f"{x.shape[-2]} images are too few to compare layers; allowed: {MIN_IMAGES} or more")


def column_chunks(x: Array, numerics: Numerics) -> Iterator[Tensor]:
    """Yield all rows of `x` `(n, p)` for some columns after another, on the device; UserError where one is not finite.

    What is memory-mapped is read chunk by chunk, so that p may be as large as a disk allows.
    """
    width = max(1, CHUNK // len(x))
    for start in range(0, x.shape[1], width):
        chunk = x[:, start : start + width]
        if not isinstance(chunk, Tensor):
            chunk = torch.from_numpy(_copy(chunk))  # torch warns of arrays that it may not write to
        chunk = chunk.to(numerics.device, numerics.dtype)
        if not all(edge.isfinite() for edge in torch.aminmax(chunk)):
            raise UserError("features hold NaN or infinite values; a comparison needs finite ones")
        yield chunk


def _copy(x: np.ndarray) -> np.ndarray:
    """Return a copy in memory; of a file that is mapped to be read, no page that was read stays with this process."""
    mapped: Any = getattr(x, "_mmap", None)
    if not hasattr(mapped, "madvise") or getattr(x, "mode", None) != "r":  # Windows has none; others may hold changes
        return np.array(x)
    made = np.empty_like(x, subok=False)
    for start in range(0, len(x), MAPPED_ROWS):
        made[start : start + MAPPED_ROWS] = x[start : start + MAPPED_ROWS]
        mapped.madvise(mmap.MADV_DONTNEED)
    return made


def varies(spread: float, size: float) -> None:
    """Raise UserError where what is left of the features after centring is rounding: all images look the same.

    Args:
        spread: sum of squares after centring.
        size: sum of squares before.
    """
    if not spread > 1e-10 * size:
        raise UserError("features are constant: all images look the same to this layer, so nothing can be compared")


def take_square(matrix: Tensor, images: Tensor) -> Tensor:
    """Return rows and columns `images` of an `(n, n)` matrix."""
    return matrix.index_select(0, images).index_select(1, images)


def take_rows(coordinates: Tensor, images: Tensor) -> Tensor:
    """Return rows `images` of `(n, r)` coordinates."""
    return coordinates.index_select(0, images)
