"""Backbones of one's own, as `localsim.backbones.register_backbone` keeps them: checked when they are built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from localsim.errors import UserError
from localsim.unit_blocks import Backbone, UnitBlock

Split = Callable[[Any], tuple[Sequence[UnitBlock], Sequence[int]]]
"""From a whole model to its unit blocks, and the index of the unit block with which each natural stage begins."""

REGISTERED: dict[str, tuple[Callable[[], nn.Module], Split]] = {}
"""By name: what makes the whole model, and what splits it."""


def make_registered(name: str) -> Backbone:
    """Return a backbone of a user's own; UserError where it is none."""
    make, split = REGISTERED[name]
    try:
        units, natural_cuts = split(make())
        units, natural_cuts = tuple(units), tuple(natural_cuts)
    except Exception as error:  # whatever a user's functions may raise
        raise UserError(f"backbone {name} cannot be built: {type(error).__name__}: {error}") from error
    if not units or not all(isinstance(unit, UnitBlock) for unit in units):
        raise UserError(f"backbone {name}: split must return unit blocks (UnitBlock), one or more, not {units!r:.80}")
    if twice := _repeated(unit.name for unit in units):
        raise UserError(f"backbone {name}: two unit blocks are called {twice}; every one needs a name of its own")
    numbers = all(type(cut) is int for cut in natural_cuts)
    if not numbers or list(natural_cuts) != sorted({0, *natural_cuts}) or natural_cuts[-1] >= len(units):
        raise UserError(
            f"backbone {name}: the natural stages begin at {list(natural_cuts)}; allowed: 0, then rising indices of "
            f"unit blocks, up to {len(units) - 1}"
        )
    if _repeated(id(parameter) for unit in units for parameter in unit.parameters()):
        raise UserError(f"backbone {name}: two unit blocks share weights; a loss could not change one of them alone")
    if twice := _repeated(f"{part}.{key}" for unit in units for part, key in _part_keys(unit)):
        raise UserError(
            f"backbone {name}: two weights are called {twice}; every part of a unit block needs its own name"
        )
    return Backbone(name, units, natural_cuts)


def _repeated(items: Iterable[Any]) -> Any:
    return next((item for item, times in Counter(items).items() if times > 1), None)


def _part_keys(unit: UnitBlock) -> Iterator[tuple[str, str]]:
    for name, part in zip(unit.part_names, unit.parts, strict=True):
        yield from ((name, key) for key in part.state_dict())
