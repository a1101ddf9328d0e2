"""The fifteen common corruptions of images at five severities, made on the fly.

Source: Hendrycks & Dietterich 2019, "Benchmarking neural network robustness to common corruptions and perturbations"
(ImageNet-C), section 3 and its released code, whose constants for 32 pixels (CIFAR-10-C), 64 pixels (Tiny ImageNet-C)
and 224 pixels (ImageNet-C) are those below. Accuracies are not to be compared digit by digit with those on the released
files, for these differ:

- frost is procedural (`corruption_kernels.frost_sheet`): the released code lays photographs over the images;
- values are rounded to bytes at the end, where the released code cuts off fractions, and nothing is rounded in between;
- nothing is stored: the released images of ImageNet-C and Tiny ImageNet-C went through JPEG at quality 85;
- the zooms of zoom blur and snow are exact and centred, where the released code crops whole pixels; snow turned by 180
  degrees, not cut, falls on oblong images;
- elastic transform resamples once, not twice;
- motion blur follows ImageMagick's definition in our own arithmetic.

**Size.** At 32, 64 and 224 pixels (of the shorter side) the constants are the released ones. In between, every one is
interpolated linearly in the logarithm of the side. Below 32 and above 224 pixels, lengths in pixels shrink and grow
with the side; everything else stays as at 32 and 224.

**Draws** are keyed by seed, corruption, severity and the image's index: an image is corrupted alike in every batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from localsim import rng
from localsim.analysis import corruption_kernels as kernels
from localsim.errors import UserError, one_of

SEVERITIES = (1, 2, 3, 4, 5)
CATEGORIES = ("noise", "blur", "weather", "digital")
SMALLEST = 8
"""Shortest side of an image, in pixels, that can be corrupted: below it blurs and shifts have no meaning."""
_PIXELS_AT_ONCE = 2**20
"""Images are corrupted in portions of so many pixels, which bounds memory."""

Row = tuple[float, ...]


@dataclass(frozen=True)
class Corruption:
    """One way to corrupt images.

    Attributes:
        apply: the function of `corruption_kernels`.
        category: one of `CATEGORIES`.
        constants: its parameters by side in pixels: one row per severity, from 1.
        lengths: which of the parameters are lengths in pixels.
    """

    apply: Callable[..., np.ndarray]
    category: str
    constants: Mapping[int, tuple[Row, ...]]
    lengths: tuple[int, ...] = ()

    def parameters(self, severity: int, side: int) -> Row:
        """Return the parameters for images whose shorter side has `side` pixels; see the module for sizes between."""
        sides = sorted(self.constants)
        factor = side / min(max(side, sides[0]), sides[-1])
        rows = [self.constants[known][severity - 1] for known in sides]
        found = [float(np.interp(math.log(side), np.log(sides), column)) for column in zip(*rows, strict=True)]
        return tuple(value * factor if place in self.lengths else value for place, value in enumerate(found))


def _row(*values: float) -> tuple[Row, ...]:
    """Return the five rows of a corruption that has one parameter."""
    return tuple((value,) for value in values)


_ZOOMS = ((1.06, 0.01), (1.11, 0.01), (1.15, 0.01), (1.20, 0.01), (1.25, 0.01))
_SNOWFALL = (  # mean, deviation, flake, threshold, radius, length; the clarity follows
    (0.1, 0.2, 1, 0.6, 8, 3),
    (0.1, 0.2, 1, 0.5, 10, 4),
    (0.15, 0.3, 1.75, 0.55, 10, 4),
    (0.25, 0.3, 2.25, 0.6, 12, 6),
    (0.3, 0.3, 1.25, 0.65, 14, 12),
)


def _snow(*clarity: float) -> tuple[Row, ...]:
    return tuple((*fall, clear) for fall, clear in zip(_SNOWFALL, clarity, strict=True))


def _elastic(side: int, *shares: Row) -> tuple[Row, ...]:
    """Return strength, smoothness and shift, given as shares of a side."""
    return tuple(tuple(side * share for share in row) for row in shares)


CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "gaussian_noise": Corruption(  # deviation
            kernels.gaussian_noise,
            "noise",
            {
                32: _row(0.04, 0.06, 0.08, 0.09, 0.10),
                64: _row(0.04, 0.08, 0.12, 0.15, 0.18),
                224: _row(0.08, 0.12, 0.18, 0.26, 0.38),
            },
        ),
        "shot_noise": Corruption(  # photons
            kernels.shot_noise,
            "noise",
            {32: _row(500, 250, 100, 75, 50), 64: _row(250, 100, 50, 30, 15), 224: _row(60, 25, 12, 5, 3)},
        ),
        "impulse_noise": Corruption(  # share of values
            kernels.impulse_noise,
            "noise",
            {
                32: _row(0.01, 0.02, 0.03, 0.05, 0.07),
                64: _row(0.01, 0.02, 0.05, 0.08, 0.14),
                224: _row(0.03, 0.06, 0.09, 0.17, 0.27),
            },
        ),
        "defocus_blur": Corruption(  # radius, softening
            kernels.defocus_blur,
            "blur",
            {
                32: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
                64: ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
                224: ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
            },
            lengths=(0,),
        ),
        "glass_blur": Corruption(  # deviation, reach, passes
            kernels.glass_blur,
            "blur",
            {
                32: ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
                64: ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
                224: ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
            },
            lengths=(0, 1),
        ),
        "motion_blur": Corruption(  # radius, deviation
            kernels.motion_blur,
            "blur",
            {
                32: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
                64: ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
                224: ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
            },
            lengths=(0, 1),
        ),
        "zoom_blur": Corruption(  # highest factor, step
            kernels.zoom_blur,
            "blur",
            {32: _ZOOMS, 64: _ZOOMS, 224: ((1.11, 0.01), (1.15, 0.01), (1.20, 0.02), (1.24, 0.02), (1.30, 0.03))},
        ),
        "snow": Corruption(  # mean, deviation, flake, threshold, radius, length, clarity
            kernels.snow,
            "weather",
            {
                32: _snow(0.95, 0.9, 0.9, 0.85, 0.8),
                64: _snow(0.8, 0.8, 0.7, 0.65, 0.6),
                224: (
                    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
                    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
                    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
                    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
                    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
                ),
            },
            lengths=(2, 4, 5),
        ),
        "frost": Corruption(  # clarity, cover
            kernels.frost,
            "weather",
            {
                32: ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
                64: ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
                224: ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
            },
        ),
        "fog": Corruption(  # density, decay
            kernels.fog,
            "weather",
            {
                32: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
                64: ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
                224: ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
            },
        ),
        "brightness": Corruption(  # added value
            kernels.brightness,
            "weather",
            {
                32: _row(0.05, 0.1, 0.15, 0.2, 0.3),
                64: _row(0.1, 0.2, 0.3, 0.4, 0.5),
                224: _row(0.1, 0.2, 0.3, 0.4, 0.5),
            },
        ),
        "contrast": Corruption(  # factor
            kernels.contrast,
            "digital",
            {
                32: _row(0.75, 0.5, 0.4, 0.3, 0.15),
                64: _row(0.4, 0.3, 0.2, 0.1, 0.05),
                224: _row(0.4, 0.3, 0.2, 0.1, 0.05),
            },
        ),
        "elastic_transform": Corruption(  # strength, smoothness, shift
            kernels.elastic_transform,
            "digital",
            {
                32: _elastic(32, (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05),
                             (0.1, 0.03, 0.03)),
                64: _elastic(64, (0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03),
                             (0.16, 0.03, 0.02)),
                # the released code reckons with 244 instead of 224
                224: _elastic(244, (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02),
                              (0.12, 0.01, 0.02)),
            },
            lengths=(0, 1, 2),
        ),
        "pixelate": Corruption(  # share of the side
            kernels.pixelate,
            "digital",
            {
                32: _row(0.95, 0.9, 0.85, 0.75, 0.65),
                64: _row(0.9, 0.8, 0.7, 0.6, 0.5),
                224: _row(0.6, 0.5, 0.4, 0.3, 0.25),
            },
        ),
        "jpeg_compression": Corruption(  # quality
            kernels.jpeg_compression,
            "digital",
            {32: _row(80, 65, 58, 50, 40), 64: _row(65, 58, 50, 40, 25), 224: _row(25, 18, 15, 10, 7)},
        ),
    }
)  # fmt: skip
"""The corruptions by name, in the order of the paper's table 1.

Severity is ordered by the authors' eye, not by distance from the clean image: the first severities of elastic transform
shift the whole image, its later ones warp it locally, and so on.
"""


def corrupt(
    images: Tensor, name: str, severity: int, *, seed: int = 0, indices: np.ndarray | Tensor | Iterable[int]
) -> Tensor:
    """Return the images, corrupted.

    Args:
        images: `(n, 3, H, W)` uint8, sides of at least `SMALLEST` pixels, on any device; the work is done on the CPU.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of the draws.
        indices: `(n,)` integers that name the images: an image's draws depend on its index, not on its place here.

    Returns:
        `(n, 3, H, W)` uint8, on the images' device.

    Raises:
        UserError: a name or severity is unknown, or the images are of another type or shape or too small.
    """
    if name not in CORRUPTIONS:
        raise one_of("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES:
        raise one_of("severity", severity, SEVERITIES)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < SMALLEST:
        raise UserError(
            f"images to corrupt must be uint8 (n, 3, H, W) with sides of at least {SMALLEST} pixels, "
            f"not {str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        )
    named = [int(index) for index in indices]
    if len(named) != len(images):
        raise UserError(f"{len(images)} images need as many indices, not {len(named)}")
    corruption, (height, width) = CORRUPTIONS[name], images.shape[2:]
    parameters = corruption.parameters(severity, min(height, width))
    out = torch.empty(images.shape, dtype=torch.uint8)
    portion = max(1, _PIXELS_AT_ONCE // (height * width))
    for start in range(0, len(images), portion):
        here = slice(start, start + portion)
        x = images[here].cpu().numpy().astype(np.float32) / np.float32(255)
        draws = [np.random.default_rng(rng.key(seed, "corrupt", name, severity, index)) for index in named[here]]
        changed = corruption.apply(x, draws, *parameters)
        out[here] = torch.from_numpy((np.clip(changed, 0, 1) * 255).round().astype(np.uint8))
    return out.to(images.device)
