"""Images cut into overlapping patches that a network sees one by one, as if each were an image."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from localsim.errors import UserError


@dataclass(frozen=True)
class Patches:
    """A square grid of square patches, folded into the batch (van den Oord et al. 2018, arXiv:1807.03748).

    Patches of one image are consecutive in the batch, row by row. Pixels at the right and lower border that fill no
    further patch are left out.

    Attributes:
        size: side of a patch, in pixels.
        stride: pixels from one patch to the next, along both sides; below `size` they overlap.

    Raises:
        UserError: where either is no whole number from 1.
    """

    size: int
    stride: int

    def __post_init__(self) -> None:
        for name in ("size", "stride"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"patch {name} {value!r} is not a number of pixels; allowed: whole numbers from 1")

    @classmethod
    def parse(cls, text: str) -> Patches:
        """Read `"SIZE:STRIDE"`, such as `"16:8"`.

        Raises:
            UserError: for any other text.
        """
        match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
        if match is None:
            raise UserError(f"patches {text!r} cannot be read; allowed: SIZE:STRIDE in pixels, such as 16:8")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.size}:{self.stride}"

    def grid(self, image_size: int) -> tuple[int, int]:
        """Return `(rows, cols)` of patches in a square image of `image_size` pixels.

        Raises:
            UserError: where the image has not even one patch.
        """
        if image_size < self.size:
            raise UserError(
                f"patches of {self.size} pixels do not fit into images of {image_size}; allowed: 1 to {image_size}"
            )
        side = (image_size - self.size) // self.stride + 1
        return side, side

    def fold(self, images: Tensor) -> Tensor:
        """Cut square images `(n, c, S, S)` into patches `(n * rows * cols, c, size, size)`.

        Raises:
            UserError: where an image has not even one patch.
        """
        self.grid(images.shape[-1])
        patches = images.unfold(2, self.size, self.stride).unfold(3, self.size, self.stride)
        return patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def unfold(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Put vectors of folded patches, `(n * rows * cols, d)`, back in their places: `(n, d, rows, cols)`."""
    return x.unflatten(0, (-1, *grid)).permute(0, 3, 1, 2)
