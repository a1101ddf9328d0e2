"""From what a layer gives for a batch to one vector per image.

| spatial | map `(n, c, h, w)` | tokens `(n, t, c)` | vectors `(n, c)` |
|---|---|---|---|
| `mean` | mean over positions, `(n, c)` | mean over all tokens, a class token included, `(n, c)` | as they are |
| `2x2`, `3x3`, ... | mean over k x k regions, `(n, c * k * k)` | refused: tokens have no grid | as they are |
| `upto4x4`, ... | the same, or the map as it is where that is coarser | refused | as they are |
| `flatten` | every number, `(n, c * h * w)` | `(n, t * c)` | as they are |
| `project1000`, ... | N random projections of `flatten`, `(n, N)` | likewise | likewise |

Maps are taken as channels first. Of a network that keeps them last (Swin) name its `permute` module, or flatten.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from localsim import rng
from localsim.errors import UserError

SPATIAL = "mean, 2x2 (any k x k), upto4x4 (likewise), flatten, project1000 (any number)"
POOLED = "upto4x4"
"""What bounds the memory of a layer of any network: how maps become vectors to compare with recordings."""
HELD_BYTES = 256 * 2**20
"""A random projection larger than this is drawn anew, block by block, for every batch, instead of being held."""
BLOCK_NUMBERS = 2**22
"""Entries of a projection that are drawn at a time; part of what a projection is."""


@dataclass(frozen=True)
class Reducer:
    """The reduction that the name `spatial` stands for, see this module's table.

    `projectN` is a Gaussian random projection, y = x R / sqrt(N) with R_ij ~ N(0, 1), which keeps squared distances in
    expectation, with a relative standard deviation of sqrt(2 / N) (Johnson & Lindenstrauss 1984). R depends on the
    seed, the width of x and N only: equally wide layers of all networks are projected alike.

    Attributes:
        spatial: its name.
        seed: of the projection.

    Raises:
        UserError: for an unknown name.
    """

    spatial: str
    seed: int = 0
    _held: dict[int, list[Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        known = r"mean|flatten|project[1-9]\d*|(?:upto)?([1-9]\d*)x\1"
        if not (isinstance(self.spatial, str) and re.fullmatch(known, self.spatial)):
            raise UserError(f"unknown spatial handling {self.spatial!r}; allowed: {SPATIAL}")

    def __call__(self, x: Tensor, layer: str = "the layer") -> Tensor:
        """Return `(n, d)` in float32 for `x` of 2, 3 or 4 dimensions; `layer` is what errors call it.

        Raises:
            UserError: `x` has another number of dimensions, no k x k regions, or is not made of real numbers.
        """
        if x.ndim not in (2, 3, 4) or x.is_complex():
            what = "complex numbers" if x.is_complex() else f"an array of shape {tuple(x.shape)}"
            raise UserError(f"{layer} gives {what}; allowed: vectors (n, c), tokens (n, t, c), maps (n, c, h, w)")
        with torch.autocast(x.device.type, enabled=False):
            x = x if x.dtype == torch.float64 else x.float()
            if self.spatial.startswith("project"):
                return self._project(x.flatten(1).float())
            if x.ndim > 2 and self.spatial == "mean":
                x = x.mean((2, 3)) if x.ndim == 4 else x.mean(1)
            elif x.ndim > 2 and self.spatial != "flatten":
                x = F.adaptive_avg_pool2d(x, self._regions(x, layer))
            return x.flatten(1).float()

    def _regions(self, x: Tensor, layer: str) -> int | tuple[int, int]:
        k = int(self.spatial.removeprefix("upto").partition("x")[0])
        if x.ndim == 3:
            raise UserError(
                f"spatial {self.spatial} needs maps, but {layer} gives tokens; allowed: mean, flatten, projectN"
            )
        if self.spatial.startswith("upto"):
            return min(k, x.shape[2]), min(k, x.shape[3])
        if k > min(x.shape[2:]):
            raise UserError(f"spatial {self.spatial} is finer than the map of {layer}, {x.shape[2]}x{x.shape[3]}")
        return k

    def _project(self, x: Tensor) -> Tensor:
        num = int(self.spatial.removeprefix("project"))
        projected = x.new_zeros(len(x), num)
        start = 0
        for block in self._blocks(x.shape[1], num):
            projected += x[:, start : start + len(block)] @ block.to(x.device)
            start += len(block)
        return projected / num**0.5

    def _blocks(self, width: int, num: int) -> Iterator[Tensor]:
        """Iterate over the rows of R, `(width, num)`, in blocks; drawn on the CPU, so that all devices see the same."""
        if width in self._held:
            yield from self._held[width]
            return
        rows = max(1, BLOCK_NUMBERS // num)
        held: list[Tensor] | None = [] if 4 * width * num <= HELD_BYTES else None
        for start in range(0, width, rows):
            generator = rng.generator("projection", self.seed, width, num, start // rows)
            block = torch.randn(min(rows, width - start), num, generator=generator)
            if held is not None:
                held.append(block)
            yield block
        if held is not None:
            self._held[width] = held
