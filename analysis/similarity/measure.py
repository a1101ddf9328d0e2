"""What a measure of similarity declares, and the three steps by which it is applied to one pair of layers or to many.

    features (n, p) --represent--> one layer, by image --transform--> what pairs are compared by --compare--> a number

The first step sees the features, in chunks, and is done once per layer; its result has n x n numbers at most and can be
resampled by image. So a matrix of layers never needs the features of more than one layer at a time, and an interval
needs no features at all.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from localsim.errors import UserError, one_of

Array = np.ndarray | Tensor
Precision = str | torch.dtype | type[np.floating] | np.dtype
"""Names `float32` and `float64`, and the types of torch and numpy with these names."""

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
        self, x: Array, y: Array, *, device: str | torch.device | None = None, dtype: Precision | None = None
    ) -> float:
        """Return the measure of two layers.

        Args:
            x, y: features `(n, p)` and `(n, q)`, arrays (also memory-mapped), tensors or lists of rows.
            device: where to compute; by default where `x` is.
            dtype: `float32` or `float64`, by name or as a type; by default float64 where `x` is, else float32.

        Raises:
            UserError: fewer than 4 images, another number of images, constant or non-finite features, features that
                are no real numbers or too small to square.
        """
        x, y = as_features(x), as_features(y)
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
    def of(cls, x: Array, device: str | torch.device | None = None, dtype: Precision | None = None) -> Numerics:
        """Return the numerics asked for, or those of the features."""
        if dtype is None:
            wide = x.dtype == torch.float64 if isinstance(x, Tensor) else _native(x.dtype) == np.float64
        else:
            name = getattr(dtype, "__name__", str(dtype)).removeprefix("torch.")
            if name not in ("float32", "float64"):
                raise one_of("dtype", dtype, ("float32", "float64"))
            wide = name == "float64"
        here = device if device is not None else (x.device if isinstance(x, Tensor) else "cpu")
        return cls(torch.device(here), torch.float64 if wide else torch.float32)


def as_features(x: Any) -> Array:
    """Return features as an array (memory-mapped ones stay on disk) or as a tensor outside any graph.

    Raises:
        UserError: numbers that are not real, or no table of numbers at all.
    """
    if isinstance(x, Tensor):
        if x.is_complex():
            raise _not_real(x.dtype)
        return x.detach()
    if not isinstance(x, np.memmap):
        try:
            x = np.asarray(x)
        except ValueError as error:
            raise UserError(f"features are no array: {error}; allowed: arrays, tensors or rows of one length") from None
    if x.dtype.kind not in "fiub":
        raise _not_real(x.dtype)
    return x


def _not_real(dtype: Any) -> UserError:
    return UserError(f"features of dtype {str(dtype).removeprefix('torch.')} cannot be compared; allowed: real numbers")


def _native(dtype: np.dtype) -> np.dtype:
    """Return the dtype that torch can read: in this machine's byte order, and no wider than float64."""
    return np.dtype(np.float64) if dtype.kind == "f" and dtype.itemsize > 8 else dtype.newbyteorder("=")


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
    """Yield all rows of `x` `(n, p)` for some columns after another, on the device.

    What is memory-mapped is read chunk by chunk, so that p may be as large as a disk allows.

    Raises:
        UserError: a number that is not finite; once all are read, where the squares of even the largest underflow.
    """
    width = max(1, CHUNK // len(x))
    largest, zero = 0.0, True
    for start in range(0, x.shape[1], width):
        chunk = x[:, start : start + width]
        if not isinstance(chunk, Tensor):
            chunk = torch.from_numpy(_copy(chunk))  # torch warns of arrays that it may not write to
        given, chunk = chunk, chunk.to(numerics.device, numerics.dtype)
        low, high = map(float, torch.aminmax(chunk))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError("features hold NaN or infinite values; a comparison needs finite ones")
        largest = max(largest, -low, high)
        # numbers of a wider dtype may themselves have become 0
        zero = zero and low == high == 0 and not (given.is_floating_point() and given.any())
        yield chunk
    if not zero and largest**2 < torch.finfo(numerics.dtype).tiny:
        raise UserError(f"features are too small to square in {str(numerics.dtype)[6:]}; multiply them")


def _copy(x: np.ndarray) -> np.ndarray:
    """Return a copy in memory; of a file that is mapped to be read, no page that was read stays with this process."""
    mapped: Any = getattr(x, "_mmap", None)
    if not hasattr(mapped, "madvise") or getattr(x, "mode", None) != "r":  # Windows has none; others may hold changes
        return np.array(x, _native(x.dtype))
    made = np.empty(x.shape, _native(x.dtype))
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
    images = images.to(matrix.device)
    return matrix.index_select(0, images).index_select(1, images)


def take_rows(coordinates: Tensor, images: Tensor) -> Tensor:
    """Return rows `images` of `(n, r)` coordinates."""
    return coordinates.index_select(0, images.to(coordinates.device))
