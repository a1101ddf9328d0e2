"""The embedded data set: small labelled pictures that the project renders itself, so a first run downloads nothing.

Every picture shows one large object on a dim background. The class is what the object's surface looks like
(`CLASSES`). Everything else is nuisance and says nothing of the class: the object's shape, position, size and turn,
the scale of its surface, its two colours, the side from which it is lit, the background's colours, the blobs that
clutter it and a little noise. Picture k depends on the seed, the size and k only, so a larger set begins with the
smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from localsim.errors import UserError
from localsim.rng import uniform

_TAU = 2 * math.pi
_CHUNK = 250  # pictures rendered at once: keeps the float64 temporaries of 32 px within the processor's cache
_NUM_BLOBS = 3


def render(num_images: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Render the first `num_images` pictures of the set named by `seed`; every run of ten holds each class once.

    Returns:
        images: `(num_images, 3, size, size)` uint8.
        labels: `(num_images,)` int64 indices into `CLASSES`.

    Raises:
        UserError: fewer than one picture, or fewer than 8 pixels a side.
    """
    if num_images < 1:
        raise UserError(f"cannot render {num_images} images of the embedded data set; ask for at least 1")
    if size < 8:
        raise UserError(f"cannot render the embedded data set at {size} pixels a side; at least 8 are needed")
    index = np.arange(num_images)
    labels = torch.from_numpy(_labels(index, seed))
    images = torch.empty(num_images, 3, size, size, dtype=torch.uint8)
    for start in range(0, num_images, _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _render(index[part], labels[part], size, seed)
    return images, labels


def _labels(index: np.ndarray, seed: int) -> np.ndarray:
    """Return each picture's class: every run of `len(CLASSES)` pictures is a permutation of the classes."""
    run, place = np.divmod(index, len(CLASSES))
    order = uniform(run, len(CLASSES), "embedded", seed, "labels").argsort(axis=1)
    return order[np.arange(len(index)), place]


@dataclass(frozen=True)
class _Draws:
    """The named draws of the pictures `index`."""

    index: np.ndarray
    seed: int

    def __call__(self, what: str, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return `(n, 1, 1)` numbers, uniform between the bounds."""
        draw = uniform(self.index, 1, "embedded", self.seed, what)
        return torch.from_numpy(low + (high - low) * draw)[..., None]

    def colour(self, what: str, low: float, high: float) -> Tensor:
        """Return `(n, 3, 1, 1)` colours, each channel uniform between the bounds."""
        draw = uniform(self.index, 3, "embedded", self.seed, what)
        return torch.from_numpy(low + (high - low) * draw)[..., None, None]


def _render(index: np.ndarray, labels: Tensor, size: int, seed: int) -> Tensor:
    """Return the `(n, 3, size, size)` pictures `index`."""
    draw = _Draws(index, seed)
    # Drawn in float64, so that processors which differ in a unit in the last place still agree on every byte.
    axis = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 / size) - 1
    y, x = axis[None, :, None], axis[None, None, :]

    # The object's own coordinates: its radius is 1 and its surface turns with it.
    radius, turn = draw("radius", 0.7, 1.0), draw("turn", -0.4, 0.4)
    dx, dy = (x - draw("x", -0.2, 0.2)) / radius, (y - draw("y", -0.2, 0.2)) / radius
    u, v = dx * turn.cos() + dy * turn.sin(), dy * turn.cos() - dx * turn.sin()
    inside = torch.sigmoid((1 - _distance(u, v, draw("shape"))) * radius * size)

    pattern = _surface(labels, u, v, draw)
    first = draw.colour("object", 0.1, 0.9)
    # The second colour differs in every channel, so no class depends on a contrast that might be missing.
    second = (first + 0.45 * torch.where(first < 0.5, 1.0, -1.0) * (1 + 0.2 * draw.colour("contrast", -1, 1))).clamp(
        0, 1
    )
    swap = draw("swap") < 0.5
    pattern = torch.where(swap, 1 - pattern, pattern)
    objects = first + (second - first) * pattern[:, None]

    lit = draw("light", 0, _TAU)
    shade = 1 + draw("shade", 0, 0.3) * (dx * lit.cos() + dy * lit.sin())
    image = _background(x, y, draw)
    image = image + (objects * shade[:, None] - image) * inside[:, None]
    noise = uniform(index, size * size, "embedded", seed, "noise").reshape(-1, 1, size, size)
    image = image + 0.08 * (torch.from_numpy(noise) - 0.5)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def _distance(u: Tensor, v: Tensor, shape: Tensor) -> Tensor:
    """Return how far a point is from the middle, in radii of a disc, square, diamond or triangle."""
    disc = (u.square() + v.square()).sqrt()
    square = torch.maximum(u.abs(), v.abs()) / 0.9
    diamond = (u.abs() + v.abs()) / 1.25
    triangle = torch.maximum(v / 0.75, (u.abs() * 0.87 - v * 0.5) / 0.65)
    kind = (shape * 4).long()
    return torch.where(kind == 0, disc, torch.where(kind == 1, square, torch.where(kind == 2, diamond, triangle)))


def _background(x: Tensor, y: Tensor, draw: _Draws) -> Tensor:
    """Return `(n, 3, size, size)` dim backgrounds: a slope between two colours, with soft blobs."""
    angle = draw("slope", 0, _TAU)
    slope = 0.5 + 0.35 * (x * angle.cos() + y * angle.sin())
    near, far = draw.colour("near", 0.1, 0.4), draw.colour("far", 0.1, 0.4)
    image = near + (far - near) * slope[:, None]
    for blob in range(_NUM_BLOBS):
        dx, dy = x - draw(f"blob {blob} x", -1, 1), y - draw(f"blob {blob} y", -1, 1)
        spot = torch.exp(-(dx.square() + dy.square()) / draw(f"blob {blob} size", 0.1, 0.3).square())
        image = image + (draw.colour(f"blob {blob} colour", 0.0, 0.6) - image) * spot[:, None]
    return image


def _surface(labels: Tensor, u: Tensor, v: Tensor, draw: _Draws) -> Tensor:
    """Return `(n, size, size)` surfaces between 0 and 1, each drawn by its class."""
    scale = draw("scale", 2.0, 2.8)
    phase_u, phase_v = draw("phase u"), draw("phase v")
    out = torch.empty_like(u)
    for label, paint in enumerate(_SURFACES.values()):
        own = labels == label
        out[own] = paint(u[own] * scale[own], v[own] * scale[own], phase_u[own], phase_v[own])
    return out


def _edge(value: Tensor, steepness: float) -> Tensor:
    """Return a soft step from 0 to 1 where `value` crosses zero."""
    return torch.sigmoid(2 * steepness * value)


def _cell(value: Tensor) -> Tensor:
    """Return the signed distance to the middle of the unit cell, in [-0.5, 0.5)."""
    return value - value.floor() - 0.5


def _stripes(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return _edge(torch.sin(_TAU * (u + p)), 3)


def _checks(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return _edge(torch.tanh(3 * torch.sin(_TAU * (u + p) / 1.25)) * torch.tanh(3 * torch.sin(_TAU * (v + q) / 1.25)), 3)


def _dots(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return _edge(0.28 - torch.hypot(_cell(u + p), _cell(v + q)), 8)


def _grid(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return _edge(0.11 - torch.minimum(_cell(u + p).abs(), _cell(v + q).abs()), 10)


def _bricks(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    row = (1.3 * v + q).floor()
    return _edge(torch.maximum(_cell(0.65 * u + p + row / 2).abs() * 1.6, _cell(1.3 * v + q).abs()) - 0.36, 9)


def _waves(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return _edge(torch.sin(_TAU * (v + q + 0.3 * torch.sin(_TAU * (0.8 * u + p)))), 3)


def _rings(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return _edge(torch.sin(_TAU * (torch.hypot(u + 0.4 * (p - 0.5), v + 0.4 * (q - 0.5)) + p)), 3)


def _rays(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    angle = torch.atan2(v + 0.4 * (q - 0.5), u + 0.4 * (p - 0.5))
    return _edge(torch.sin(8 * angle + _TAU * p), 3)


def _diamonds(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return _edge(torch.sin(_TAU * (u + v + p) / 1.4) * torch.sin(_TAU * (u - v + q) / 1.4), 6)


def _plain(u: Tensor, v: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return _edge(torch.sin(_TAU * ((p - 0.5) * u + (q - 0.5) * v) / 4 + _TAU * p), 0.5)


_SURFACES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "grid": _grid,
    "bricks": _bricks,
    "waves": _waves,
    "rings": _rings,
    "rays": _rays,
    "diamonds": _diamonds,
    "plain": _plain,
}
CLASSES: tuple[str, ...] = tuple(_SURFACES)
