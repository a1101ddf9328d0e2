"""Where a backbone is cut: its unit blocks grouped into consecutive stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from localsim.backbones import TRACE_BATCH, Backbone, UnitTrace, trace_units, unit_shapes
from localsim.errors import UserError
from localsim.placement import consecutive_groups

Stages = tuple[range, ...]
"""The stages bottom-up, each the range of the indices of its unit blocks."""

GRANULARITIES = ("network", "stage", "block")
# any power of two that no backbone shrinks below one pixel: map sizes then halve exactly and tell the stride
_STRIDE_PROBE = 1024


@dataclass(frozen=True)
class CutRow:
    """One stage in the table of cuts.

    Attributes:
        stage: its number, from 1.
        first: name of its first unit block.
        last: name of its last unit block.
        num_units: how many unit blocks it has.
        channels: channels of its output.
        stride: input pixels per position of its output, along one side.
        map_size: height and width of its output.
        num_parameters: trainable and frozen parameters together.
        held_bytes: float32 activations that autograd holds for its backward, in bytes per image.
    """

    stage: int
    first: str
    last: str
    num_units: int
    channels: int
    stride: int
    map_size: tuple[int, int]
    num_parameters: int
    held_bytes: int


def partition(
    backbone: Backbone, granularity: int | str | None = None, cuts: str = "auto", *, image_size: int = 224
) -> Stages:
    """Group the unit blocks of a backbone into stages: `granularity` says how many, `cuts` says where.

    Args:
        backbone: what to cut.
        granularity: the number K of stages, "network" (1), "stage" (as many as the backbone's natural stages) or
            "block" (as many as its unit blocks). None is what `cuts` lists, or else "stage".
        cuts: "auto" is the natural stages where K is their number, and otherwise K stages of equally many unit
            blocks (the first ones have one more where K does not divide them). "balanced" makes the largest
            `held_bytes` of any stage as small as possible. Otherwise the unit blocks with which the second and
            every later stage begins: "layer2.0,layer3.0,layer4.0".
        image_size: side of the input images in pixels, which "balanced" depends on.

    Returns:
        The stages, each the range of its unit block indices; together they are `range(len(backbone.units))`.

    Raises:
        UserError: for a granularity or cuts that the backbone does not have, or that contradict each other.
    """
    if cuts not in ("auto", "balanced"):
        return _listed(backbone, granularity, cuts)
    num_units, num_stages = len(backbone.units), _num_stages(backbone, granularity)
    if cuts == "balanced":
        return _balanced(trace_units(backbone, image_size), num_stages)
    if num_stages == len(backbone.natural_cuts):
        return _from_starts(backbone.natural_cuts, num_units)
    size, larger = divmod(num_units, num_stages)
    return _from_starts([stage * size + min(stage, larger) for stage in range(num_stages)], num_units)


def _from_starts(starts: Sequence[int], num_units: int) -> Stages:
    return tuple(range(start, stop) for start, stop in pairwise((*starts, num_units)))


def _num_stages(backbone: Backbone, granularity: int | str | None) -> int:
    num_units = len(backbone.units)
    if granularity is None or granularity == "stage":
        return len(backbone.natural_cuts)
    if granularity == "network":
        return 1
    if granularity == "block":
        return num_units
    allowed = f"allowed: 1 to {num_units}, {', '.join(GRANULARITIES)}"
    if isinstance(granularity, str) and granularity.isascii() and granularity.isdigit():
        granularity = int(granularity)  # as it comes from a command line
    if isinstance(granularity, bool) or not isinstance(granularity, int) or granularity < 1:
        raise UserError(f"granularity {granularity!r} is no number of stages of {backbone.name}; {allowed}")
    if granularity > num_units:
        raise UserError(
            f"granularity {granularity} is finer than the {num_units} unit blocks of {backbone.name}; {allowed}"
        )
    return granularity


def _listed(backbone: Backbone, granularity: int | str | None, cuts: str) -> Stages:
    index = {unit.name: i for i, unit in enumerate(backbone.units)}
    first, *later = index
    names = [name.strip() for name in cuts.split(",")]
    for name in names:
        if name == first:
            raise UserError(
                f"cuts {cuts!r} lists {first}, where the first stage of {backbone.name} begins anyway; leave it out"
            )
        if name not in index:
            raise UserError(
                f"{backbone.name} has no unit block {name!r} to cut at; allowed: auto, balanced, "
                f"or a comma list of {', '.join(later)}"
            )
    for before, after in pairwise(names):
        if before == after:
            raise UserError(f"cuts {cuts!r} lists {after} twice; allowed: every unit block once")
        if index[before] > index[after]:
            raise UserError(
                f"cuts {cuts!r} lists {after} after {before}, but it comes before it in {backbone.name}; "
                "allowed: unit blocks once each, in the order of the network"
            )
    if granularity is not None and _num_stages(backbone, granularity) != len(names) + 1:
        raise UserError(
            f"granularity {granularity} contradicts cuts {cuts!r}, which make {len(names) + 1} stages; "
            f"allowed: {len(names) + 1}, or no granularity"
        )
    return _from_starts([0, *(index[name] for name in names)], len(backbone.units))


def _held(traces: Sequence[UnitTrace]) -> int:
    """Return the bytes that a stage of the traced unit blocks holds; what two blocks keep together counts once."""
    return sum({identity: size for trace in traces for identity, size in trace.saved.items()}.values())


def _balanced(traces: Sequence[UnitTrace], num_stages: int) -> Stages:
    """Return the contiguous partition whose largest stage holds least, see `consecutive_groups`."""
    held = cache(lambda start, stop: _held(traces[start:stop]))
    return consecutive_groups(len(traces), num_stages, held)


def cut_table(backbone: Backbone, stages: Stages, image_size: int) -> list[CutRow]:
    """Measure every stage for square images of `image_size` pixels, without computing anything.

    Held activations are what autograd saves in a training forward of two float32 images, halved; every storage
    once per stage, so that a map kept on both sides of a cut counts in both stages.

    Raises:
        UserError: for an image size the backbone cannot run on.
    """
    traces = trace_units(backbone, image_size)
    probed = unit_shapes(backbone, _STRIDE_PROBE)
    rows = []
    for number, stage in enumerate(stages, start=1):
        units = backbone.units[stage.start : stage.stop]
        channels, height, width = traces[stage.stop - 1].shape
        rows.append(
            CutRow(
                stage=number,
                first=units[0].name,
                last=units[-1].name,
                num_units=len(units),
                channels=channels,
                stride=_STRIDE_PROBE // probed[stage.stop - 1][1],
                map_size=(height, width),
                num_parameters=sum(p.numel() for unit in units for p in unit.parameters()),
                held_bytes=_held(traces[stage.start : stage.stop]) // TRACE_BATCH,
            )
        )
    return rows


def format_cut_table(rows: Sequence[CutRow], gradient_paths: Sequence[int] | None = None) -> str:
    """Return the table of cuts as aligned text, one line per stage under a line of headings.

    Args:
        rows: from `cut_table`.
        gradient_paths: for every stage, how many unit blocks the longest gradient path that reaches it crosses;
            shown as a last column where given.

    Raises:
        ValueError: where there is not one gradient path per stage.
    """
    head = ["stage", "from", "to", "unit blocks", "channels", "stride", "map", "parameters", "held MiB/image"]
    table = [
        [
            str(row.stage),
            row.first,
            row.last,
            str(row.num_units),
            str(row.channels),
            str(row.stride),
            f"{row.map_size[0]}x{row.map_size[1]}",
            f"{row.num_parameters:,}",
            f"{row.held_bytes / 2**20:.2f}",
        ]
        for row in rows
    ]
    if gradient_paths is not None:
        head.append("gradient path")
        for cells, path in zip(table, gradient_paths, strict=True):
            cells.append(str(path))
    lines = [head, *table]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    names = {head.index("from"), head.index("to")}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in names else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
