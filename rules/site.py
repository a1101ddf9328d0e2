"""What a head may know of the place where its tap reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from localsim.backbones import UnitBlock
from localsim.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Site:
    """A tap's place in the network, for the makers of heads.

    Attributes:
        stage: the stage that the tap reads, from 0.
        num_stages: how many there are.
        unit: index of the stage's last unit block.
        num_units: how many unit blocks the trunk has.
        shape: what the readout gives per image: `(d,)` for a vector, `(channels, height, width)` for a map,
            `(channels, rows, columns)` for patches.
        top_shape: `(channels, height, width)` of the highest stage's output.
        above: the trunk's unit blocks above the stage, lowest first. A head may copy them, never keep or change them.
        image_shape: `(3, size, size)` of what enters the trunk.
        widths: output widths of a projector's layers.
        num_classes: of the data set; None without labels.
        end: from the width of a vector to the vector head that the tap's objective uses by default.
    """

    stage: int
    num_stages: int
    unit: int
    num_units: int
    shape: tuple[int, ...]
    top_shape: tuple[int, int, int]
    above: tuple[UnitBlock, ...]
    image_shape: tuple[int, int, int]
    widths: tuple[int, ...]
    num_classes: int | None
    end: Callable[[int], nn.Module]

    @property
    def depth(self) -> float:
        """Where the stage stands: 0 for the lowest, 1 for the highest (and for an only one)."""
        return 1.0 if self.num_stages == 1 else self.stage / (self.num_stages - 1)

    def classes(self) -> int:
        """Return the number of classes; UserError where the images have no labels."""
        if self.num_classes is None:
            raise UserError(
                "a classifier needs images with labels: a data set that has them, or a folder of class folders"
            )
        return self.num_classes
