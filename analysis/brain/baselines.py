"""What networks are compared with: the pixels of an image, and a fixed bank of Gabor filters like cells of area V1.

    >>> from localsim.analysis import features
    >>> from localsim.analysis.brain.baselines import BASELINES
    >>> bar = BASELINES["gabor"]
    >>> found = features(bar.source, images, modules=bar.modules, spatial=bar.spatial)  # doctest: +SKIP

A score that pixels reach says nothing of a network, and one that the bank reaches nothing beyond V1. Both see the whole
image (of one that is not square the central square), where networks are often shown a crop of it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localsim.analysis.sources import Source
from localsim.data.augment import without_colour
from localsim.errors import UserError

OCTAVES = 1.4
"""Full width at half height of tuning to spatial frequency: foveal V1, mean (Foster et al. 1985, J Physiol 365:331)."""
DEGREES = 40.0
"""Full width at half height of tuning to orientation: V1, median (De Valois et al. 1982, Vision Res 22:531)."""
CELLS = ("even", "odd", "minus even", "minus odd", "complex")
"""The cells of one frequency and orientation: four simple ones, a quarter of a cycle apart, and a complex one."""
PIXELS_PER_CYCLE = 3
"""Fewer than this, and an image does not hold most of the frequencies that a filter passes."""
_SAMPLES_PER_CYCLE = 5  # at half of this many times its frequency a filter passes less than 0.05 %


@dataclass(frozen=True)
class Baseline:
    """A control without learning, and how its features are to be taken.

    Attributes:
        source: the control.
        modules: its layer, for `features(..., modules=)`.
        spatial: the reduction that fits it; `mean` would leave three numbers of the pixels.
    """

    source: Source
    modules: tuple[str, ...]
    spatial: str


class GaborBank(nn.Module):
    """V1-like cells: Gabor filters of several frequencies f and orientations on luminance, rectified or as energies.

    A filter has the transfer function, at u cycles per image along its orientation's normal and v across it,

        T(u, v) = 2 [exp(-(u - f)^2 / 2 s^2) - exp(-f^2 / 2 s^2) exp(-u^2 / 2 s^2)] exp(-v^2 / 2 t^2)

    which is a Gabor function (Jones & Palmer 1987, J Neurophysiol 58:1233) whose mean is taken out. The real and the
    imaginary part of its response z are the even and the odd filter of a quadrature pair. Simple cells give max(0, x)
    for x = Re z, Im z, -Re z, -Im z, and complex cells sqrt((Re z)^2 + (Im z)^2) (the energy model: Adelson & Bergen
    1985, J Opt Soc Am A 2:284; with the root as in the VOneBlock of Dapello et al. 2020, NeurIPS 33). The widths s and
    t follow from `OCTAVES` and `DEGREES`, see `widths`, and grow with f: receptive fields of all frequencies have one
    shape. All filters pass their best grating with gain 1, which gives bands an octave apart about equal responses to
    natural images (Field 1987, J Opt Soc Am A 4:2379). Orientation i of m is a modulation along i / m of half a turn
    from the x axis to the y axis (down); i = 0 prefers vertical bars. There are no learned or drawn numbers, no
    normalisation across cells and no noise.

    Frequencies being in cycles per image, responses to a scene are the same at all resolutions that hold what a filter
    passes. Beyond its edges an image is continued as in a mirror. Maps are means over the cells in each of `grid` x
    `grid` fields (the V1-like model of Pinto, Cox & DiCarlo 2008, PLoS Comput Biol 4:e27, pools too).

    Attributes:
        frequencies: in cycles per image.
        orientations: how many.
        grid: fields along a side.
    """

    def __init__(self, frequencies: Sequence[float], orientations: int, grid: int) -> None:
        super().__init__()
        self.frequencies, self.orientations, self.grid = tuple(map(float, frequencies)), orientations, grid
        self.octaves, self.degrees = OCTAVES, DEGREES  # so that they are part of `Source.weights_hash`

    @property
    def channels(self) -> list[tuple[float, float, str]]:
        """Frequency in cycles per image, angle in degrees and kind of cell of each channel."""
        angles = [180 * i / self.orientations for i in range(self.orientations)]
        return [(f, angle, cell) for f in self.frequencies for angle in angles for cell in CELLS]

    @property
    def least(self) -> int:
        """Pixels along a side that an image must have for the highest frequency and the grid."""
        return max(self.grid, math.ceil(PIXELS_PER_CYCLE * max(self.frequencies)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the responses `(n, frequencies * orientations * 5, grid, grid)` to images `(n, 3, side, side)`.

        Raises:
            UserError: the images are not square, or too small for the highest frequency or the grid.
        """
        side = x.shape[-1]
        if x.shape[-2] != side or side < self.least:
            raise UserError(
                f"the Gabor bank is shown images of {x.shape[-2]}x{side} pixels; allowed: squares of {self.least} or "
                f"more, for {max(self.frequencies):g} cycles per image and a grid of {self.grid}"
            )
        light = without_colour(x.float())[:, 0]
        light = torch.cat([light, light.flip(-1)], -1)
        spectrum = torch.fft.fft2(torch.cat([light, light.flip(-2)], -2))
        found = []
        for frequency in self.frequencies:
            # the part of the spectrum that the filters pass, as if the image had that few pixels
            samples = min(self.grid * math.ceil(_SAMPLES_PER_CYCLE * frequency / self.grid), side)
            # half cycles per image, of the mirrored one whole cycles, in the order of the FFT
            k = (torch.arange(2 * samples, device=x.device) + samples) % (2 * samples) - samples
            part = spectrum[:, k][:, :, k] * (samples / side) ** 2
            # its first pixel's centre lies half a pixel from the edge, and pixels are larger now
            shift = torch.exp(1j * torch.pi * (k / 2) * (1 / samples - 1 / side))
            part = part * shift[:, None] * shift
            for i in range(self.orientations):
                passed = part * transfer(k[None] / 2, k[:, None] / 2, frequency, torch.pi * i / self.orientations)
                # of the mirrored image only the image itself is needed
                z = torch.fft.ifft(torch.fft.ifft(passed, dim=-1)[..., :samples], dim=-2)[..., :samples, :]
                cells = torch.stack([z.real, z.imag, -z.real, -z.imag, z.abs()], 1).relu()
                found.append(F.adaptive_avg_pool2d(cells, self.grid))
        return torch.cat(found, 1)


def widths(frequency: float) -> tuple[float, float]:
    """Return the standard deviations s and t of a Gabor filter's transfer function, in cycles per image.

    Half height is at a = sqrt(2 ln 2) standard deviations. A full width of b octaves puts it at f - a s and
    f + a s = 2^b (f - a s), so s = f (2^b - 1) / (a (2^b + 1)). A full width of w degrees puts it at the angle
    h = w / 2 on the circle of radius f: (1 - cos h)^2 / s^2 + sin^2 h / t^2 = a^2 / f^2.
    """
    half, ratio, angle = math.sqrt(2 * math.log(2)), 2**OCTAVES, math.radians(DEGREES / 2)
    s = (ratio - 1) / (ratio + 1) / half
    t = math.sin(angle) / math.sqrt(half**2 - ((1 - math.cos(angle)) / s) ** 2)
    return frequency * s, frequency * t


def transfer(x: Tensor, y: Tensor, frequency: float, angle: float) -> Tensor:
    """Return a filter's transfer function T at `x`, `y` cycles per image, see `GaborBank`; `angle` is in radians."""
    s, t = widths(frequency)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    balance = math.exp(-(frequency**2) / (2 * s**2))
    tuned = torch.exp(-((u - frequency) ** 2) / (2 * s**2)) - balance * torch.exp(-(u**2) / (2 * s**2))
    return 2 * tuned * torch.exp(-(v**2) / (2 * t**2))


def pixels(size: int = 32) -> Source:
    """Return the image itself, in colour, as a Source with the module `pixels`: maps `(n, 3, size, size)`.

    Images are resized as for networks (bilinear, antialiased), from 0 to 1.

    Raises:
        UserError: `size` is not a whole number from 1.
    """
    _whole("size", size)
    return Source("pixels", nn.Sequential(OrderedDict(pixels=nn.Identity())), size=size, crop=1.0)


def gabor(
    size: int = 112,
    *,
    frequencies: Sequence[float] = (2, 4, 8, 16, 32),
    orientations: int = 8,
    grid: int = 16,
) -> Source:
    """Return V1-like cells as a Source with the module `gabor`: maps `(n, c, grid, grid)`, see `GaborBank`.

    Args:
        size: pixels along a side to which images are resized.
        frequencies: in cycles per image. Of an image seen at 11.2 degrees of visual angle (Cowley et al. 2026) those
            given here are 0.18 to 2.9 cycles per degree.
        orientations: how many, evenly spaced.
        grid: fields along a side.

    Raises:
        UserError: a number is out of range, or `size` is too small for the highest frequency or the grid.
    """
    for name, value in {"size": size, "orientations": orientations, "grid": grid}.items():
        _whole(name, value)
    if not frequencies or not all(0 < frequency < math.inf for frequency in frequencies):
        raise UserError(f"frequencies are {tuple(frequencies)}; allowed: one or more above 0, in cycles per image")
    bank = GaborBank(frequencies, orientations, grid)
    if size < bank.least:
        raise UserError(
            f"size is {size}; allowed: {bank.least} pixels or more, for {max(frequencies):g} cycles per image and a "
            f"grid of {grid}"
        )
    return Source("gabor", nn.Sequential(OrderedDict(gabor=bank)), size=size, crop=1.0)


def _whole(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise UserError(f"{name} is {value!r}; allowed: whole numbers from 1")


BASELINES = {
    "pixels": Baseline(pixels(), ("pixels",), "flatten"),
    "gabor": Baseline(gabor(), ("gabor",), "4x4"),
}
"""The controls that every comparison with recordings shows beside the networks."""
