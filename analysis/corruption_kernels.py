"""What each common corruption does to pixels; severities, sizes and draws are chosen in `corruptions`.

Every function takes images `(n, 3, H, W)`, float32 between 0 and 1, one numpy generator per image, and its parameters,
and returns an array of the same shape, which the caller clips and rounds. An image's result depends on that image and
its generator only, bit for bit: elementwise arithmetic and `scipy.ndimage` do so for a batch, the rest runs image by
image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage

Draws = Sequence[np.random.Generator]
_GREY_WEIGHTS = (0.299, 0.587, 0.114)  # luma of Rec. 601, OpenCV's
_ICE = (0.83, 0.93, 1.0)
"""Tint of procedural frost: red, green, blue."""


def gaussian_noise(x: np.ndarray, draws: Draws, deviation: float) -> np.ndarray:
    """Add noise of this standard deviation, drawn anew for each pixel and channel."""
    return x + deviation * np.stack([draw.standard_normal(x.shape[1:], dtype=np.float32) for draw in draws])


def shot_noise(x: np.ndarray, draws: Draws, photons: float) -> np.ndarray:
    """Replace each value v by Poisson(v * photons) / photons: variance v / photons."""
    return np.stack([draw.poisson(image * photons) / photons for draw, image in zip(draws, x, strict=True)])


def impulse_noise(x: np.ndarray, draws: Draws, share: float) -> np.ndarray:
    """Set this share of values, channel by channel, to 0 or 1 with equal chance."""
    chance = np.stack([draw.random(x.shape[1:], dtype=np.float32) for draw in draws])
    return np.where(chance < share / 2, 0.0, np.where(chance < share, 1.0, x))


def defocus_kernel(radius: float, softening: float) -> np.ndarray:
    """Return the square kernel of a lens out of focus, of sum 1.

    A disk of that radius in pixels, its edge softened by a Gaussian of that deviation over 3 x 3 pixels, 5 x 5 for
    radii above 8.
    """
    wing = 1 if radius <= 8 else 2
    reach = math.floor(radius) + wing
    offset = np.arange(-reach, reach + 1)
    disk = (offset[:, None] ** 2 + offset**2 <= radius**2).astype(np.float64)
    kernel = ndimage.gaussian_filter(disk, softening, mode="constant", radius=wing)
    return kernel / kernel.sum()


def defocus_blur(x: np.ndarray, draws: Draws, radius: float, softening: float) -> np.ndarray:
    """Blur with `defocus_kernel`."""
    return ndimage.correlate(x, defocus_kernel(radius, softening)[None, None], mode="mirror")


def glass_blur(x: np.ndarray, draws: Draws, deviation: float, reach: float, passes: float) -> np.ndarray:
    """Blur, let every pixel take the value of a random neighbour, again and again, and blur once more.

    Args:
        x, draws: see the module.
        deviation: of the Gaussian, in pixels.
        reach: neighbours are up to this many pixels away; rounded, at least 1.
        passes: over the image, from its lower right corner; rounded, at least 1. A pixel may take what its neighbour
            took before. The released code means to swap the two, but swaps views of one array, which copies.
    """
    far, times = max(1, round(reach)), max(1, round(passes))
    n, _, height, width = x.shape
    rows, columns = np.arange(height - far, far, -1), np.arange(width - far, far, -1)
    places = (rows[:, None] * width + columns).ravel()
    # images last: each pixel is one step for the whole batch
    step = np.stack([draw.integers(-far, far, (2, times, len(places)), dtype=np.int32) for draw in draws], axis=-1)
    neighbours = places[:, None] + step[0] * width + step[1]
    source = np.repeat(np.arange(height * width)[:, None], n, axis=1)
    every = np.arange(n)
    for there in neighbours:
        for place, neighbour in zip(places.tolist(), there, strict=True):
            source[place] = source[neighbour, every]
    blurred = _gaussian(x, deviation).reshape(n, 3, -1)
    return _gaussian(np.take_along_axis(blurred, source.T[:, None], axis=2).reshape(x.shape), deviation)


def motion_blur(x: np.ndarray, draws: Draws, radius: float, deviation: float) -> np.ndarray:
    """Smear along a line within 45 degrees of the horizontal, see `smear`."""
    return np.stack(
        [smear(image, radius, deviation, draw.uniform(-45, 45)) for draw, image in zip(draws, x, strict=True)]
    )


def smear(x: np.ndarray, radius: float, deviation: float, degrees: float) -> np.ndarray:
    """Return ImageMagick's motion blur of `(..., H, W)`.

    sum_i k_i x[p + i u], rounded to whole pixels, with k_i proportional to exp(-i^2 / (2 deviation^2)) for
    i = 0..2 radius and the unit vector u at that angle: one half of a Gaussian. Edges repeat.
    """
    i = np.arange(2 * math.ceil(radius) + 1)
    weights = np.exp(-(i**2) / (2 * deviation**2))
    weights /= weights.sum()
    angle = math.radians(degrees)
    down, right = np.ceil(i * math.sin(angle) - 0.5).astype(int), np.ceil(i * math.cos(angle) - 0.5).astype(int)
    height, width = x.shape[-2:]
    margin = int(max(abs(down).max(), abs(right).max()))
    padded = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(margin, margin)] * 2, mode="edge")
    out = np.zeros_like(x)
    for weight, row, column in zip(weights.astype(x.dtype), margin + down, margin + right, strict=True):
        out += weight * padded[..., row : row + height, column : column + width]
    return out


def zoom_blur(x: np.ndarray, draws: Draws, highest: float, step: float) -> np.ndarray:
    """Average the image with enlargements by 1, 1 + step, ..., highest."""
    factors = np.linspace(1, highest, round((highest - 1) / step) + 1)
    enlarged = sum((enlarge(x, factor) for factor in factors), start=x)
    return enlarged / (len(factors) + 1)


def enlarge(x: np.ndarray, factor: float) -> np.ndarray:
    """Return `(..., H, W)` enlarged about its centre by a factor of at least 1, bilinearly, and cut to its size."""
    rows, columns = (_enlarging(length, factor).astype(x.dtype) for length in x.shape[-2:])
    return rows @ x @ columns.T


def _enlarging(length: int, factor: float) -> np.ndarray:
    """Return the `(length, length)` matrix of linear interpolation at centre + (i - centre) / factor."""
    centre = (length - 1) / 2
    place = centre + (np.arange(length) - centre) / factor
    return np.maximum(0, 1 - abs(place[:, None] - np.arange(length)))


def snow(
    x: np.ndarray,
    draws: Draws,
    mean: float,
    deviation: float,
    flake: float,
    threshold: float,
    radius: float,
    length: float,
    clarity: float,
) -> np.ndarray:
    """Whiten the image and let streaks of snow fall in two opposite directions.

    Args:
        x, draws: see the module.
        mean, deviation: of the noise from which flakes are made.
        flake: factor by which that noise is enlarged: flakes have about so many pixels.
        threshold: noise below it is no flake.
        radius, length: of the streaks, see `smear`; within 45 degrees of the vertical.
        clarity: weight of the image against its whitened version, max(x, 1.5 grey + 0.5).
    """
    fallen = np.empty_like(x[:, :1])
    for draw, layer in zip(draws, fallen, strict=True):
        noise = enlarge(draw.normal(mean, deviation, x.shape[2:]), max(1.0, flake))
        flakes = np.where(noise < threshold, 0, noise).clip(0, 1)
        streaks = smear(flakes, radius, length, draw.uniform(-135, -45))
        layer[0] = streaks + streaks[::-1, ::-1]
    grey = np.tensordot(x, np.array(_GREY_WEIGHTS, dtype=x.dtype), axes=(1, 0))[:, None]
    return clarity * x + (1 - clarity) * np.maximum(x, 1.5 * grey + 0.5) + fallen


def frost(x: np.ndarray, draws: Draws, clarity: float, cover: float) -> np.ndarray:
    """Add a sheet of frost: clarity * x + cover * frost. The frost is procedural, see `frost_sheet`."""
    height, width = x.shape[2:]
    sheets = np.stack([frost_sheet(height, width, draw)[None] for draw in draws])
    return clarity * x + cover * np.array(_ICE, dtype=x.dtype)[:, None, None] * sheets


def frost_sheet(height: int, width: int, draw: np.random.Generator) -> np.ndarray:
    """Return a made-up sheet of frost, `(H, W)` float32 between 0 and 1: not the photographs of the released code.

    Needles of ice, random seeds smeared along three directions 60 degrees apart, are strewn over a plasma that makes
    some parts of the pane freeze more than others. All lengths are shares of the shorter side.
    """
    side = min(height, width)
    cloud = plasma(height, width, 1.6, draw)
    turn = draw.uniform(0, 60)
    needles = np.zeros((height, width))
    for degrees in (turn, turn + 60, turn + 120):
        for long, seeds in ((0.25, 0.01), (0.08, 0.05)):
            strewn = np.where(draw.random((height, width)) < seeds, draw.random((height, width)), 0)
            sharp = smear(strewn, long * side, long * side / 2, degrees + draw.choice((0, 180)))
            needles = np.maximum(needles, sharp / max(sharp.max(), 1e-6))
    frozen = np.clip(2 * cloud - 0.4, 0, 1)
    return (0.15 + 0.45 * frozen + 0.7 * frozen * needles).clip(0, 1).astype(np.float32)


def fog(x: np.ndarray, draws: Draws, density: float, decay: float) -> np.ndarray:
    """Add `density` times a plasma, then scale so that the image's brightest value could stay: m / (m + density)."""
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    height, width = x.shape[2:]
    cloud = np.stack([plasma(height, width, decay, draw)[None] for draw in draws]).astype(x.dtype)
    return (x + density * cloud) * brightest / (brightest + density)


def plasma(height: int, width: int, decay: float, draw: np.random.Generator) -> np.ndarray:
    """Return a fractal landscape `(H, W)` between 0 and 1, by the diamond-square algorithm on a torus.

    Starting from one point, the grid is doubled until it covers the image: new points are the mean of their four
    neighbours plus U(-a, a), and a falls by decay^2 with every doubling.
    """
    field, amplitude = np.zeros((1, 1)), 1.0
    while len(field) < max(height, width):
        n = len(field)
        noise = amplitude * draw.uniform(-1, 1, (3, n, n))
        across, along = np.roll(field, -1, axis=1), np.roll(field, -1, axis=0)
        middle = (field + across + along + np.roll(across, -1, axis=0)) / 4 + noise[0]
        finer = np.empty((2 * n, 2 * n))
        finer[::2, ::2], finer[1::2, 1::2] = field, middle
        finer[::2, 1::2] = (field + across + middle + np.roll(middle, 1, axis=0)) / 4 + noise[1]
        finer[1::2, ::2] = (field + along + middle + np.roll(middle, 1, axis=1)) / 4 + noise[2]
        field, amplitude = finer, amplitude / decay**2
    field -= field.min()
    return (field / field.max())[:height, :width]


def brightness(x: np.ndarray, draws: Draws, added: float) -> np.ndarray:
    """Add to the value of HSV, max(r, g, b), up to 1; hue and saturation stay."""
    value = x.max(axis=1, keepdims=True)
    brighter = np.minimum(value + added, 1)
    return np.where(value > 0, x * (brighter / np.where(value > 0, value, 1)), brighter)


def contrast(x: np.ndarray, draws: Draws, factor: float) -> np.ndarray:
    """Scale the distance from each channel's mean over the image."""
    mean = x.mean(axis=(2, 3), keepdims=True)
    return (x - mean) * factor + mean


def elastic_transform(x: np.ndarray, draws: Draws, strength: float, smoothness: float, shift: float) -> np.ndarray:
    """Warp by a random affine map and a smooth random displacement.

    Args:
        x, draws: see the module.
        strength: the displacement is this times a field of U(-1, 1) that was smoothed, in pixels.
        smoothness: deviation of the Gaussian that smooths it, in pixels; 0 leaves it rough.
        shift: the affine map moves three corners of the middle of the image by U(-shift, shift) pixels.
    """
    height, width = x.shape[2:]
    grid = np.indices((height, width), dtype=np.float64)
    third = min(height, width) // 3
    corners = np.array([height // 2, width // 2]) + third * np.array([[1, 1], [1, -1], [-1, -1]])
    out = np.empty_like(x)
    for draw, image, warped in zip(draws, x, out, strict=True):
        moved = corners + draw.uniform(-shift, shift, corners.shape)
        back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), corners)  # (row, column, 1) -> where it came from
        rough = draw.uniform(-1, 1, grid.shape)
        place = grid + strength * ndimage.gaussian_filter(rough, (0, smoothness, smoothness), truncate=3)
        came_from = np.tensordot(back[:2].T, place, axes=1) + back[2][:, None, None]
        for channel, target in zip(image, warped, strict=True):
            ndimage.map_coordinates(channel, came_from, output=target, order=1, mode="mirror")
    return out


def pixelate(x: np.ndarray, draws: Draws, share: float) -> np.ndarray:
    """Shrink to this share of the side by box averages, and enlarge again."""
    height, width = x.shape[2:]
    small = max(1, int(width * share)), max(1, int(height * share))

    def coarse(image: Image.Image) -> Image.Image:
        return image.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX)

    return np.stack([_from_pil(coarse(_to_pil(image))) for image in x])


def jpeg_compression(x: np.ndarray, draws: Draws, quality: float) -> np.ndarray:
    """Store as JPEG with PIL at this quality (rounded), and read again."""

    def stored(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=round(quality))
        return Image.open(file)

    return np.stack([_from_pil(stored(_to_pil(image))) for image in x])


def _gaussian(x: np.ndarray, deviation: float) -> np.ndarray:
    return ndimage.gaussian_filter(x, (0, 0, deviation, deviation), mode="nearest")


def _to_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray((image * 255).round().astype(np.uint8).transpose(1, 2, 0))


def _from_pil(image: Image.Image) -> np.ndarray:
    return (np.asarray(image, dtype=np.float32) / 255).transpose(2, 0, 1)
