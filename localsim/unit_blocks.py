"""Unit blocks: the smallest pieces of a network between which it may be cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn


class UnitBlock(nn.Module):
    """One unit block: modules of a whole model, run in order.

    Args:
        name: what `--cuts` calls the block: torchvision's name of it, "stem" for what comes before the first residual
            block.
        parts: the name of each module in the whole model, under which its weights are kept, and the module.
    """

    def __init__(self, name: str, parts: Iterable[tuple[str, nn.Module]]) -> None:
        super().__init__()
        names, modules = zip(*parts, strict=True)
        self.name: str = name
        self.part_names: tuple[str, ...] = names
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, c, h, w)` to the block's output."""
        for part in self.parts:
            x = part(x)
        return x


@dataclass(frozen=True)
class Backbone:
    """A network without its pooling and classifier.

    Attributes:
        name: its name in `BACKBONES`, or that of one's own.
        units: the unit blocks, in the order in which they run.
        natural_cuts: index of the unit block with which each natural stage begins; the first is 0.
    """

    name: str
    units: tuple[UnitBlock, ...]
    natural_cuts: tuple[int, ...]
