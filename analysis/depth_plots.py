"""Figures by stage and over training: the geometry of stages, and how a rule's updates lie to backpropagation's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from localsim.analysis.canvas import COLOURS, MARKERS, new_figure, styled
from localsim.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from localsim.analysis.geometry import GeometryRow
    from localsim.analysis.updates import AlignmentTable

UNITS = {
    "participation_ratio": ("Participation ratio", "dimensions"),
    "effective_rank": ("Effective rank", "dimensions"),
    "spectrum_slope": ("Slope of the spectrum", "exponent alpha"),
    "within_share": ("Variance within classes", "share of all"),
    "nc1": ("Neural collapse NC1", "tr(S_w S_b^+) / classes"),
    "nearest_class_mean_accuracy": ("Nearest class mean", "accuracy"),
    "uniformity": ("Uniformity", "log mean exp(-2 d^2)"),
    "alignment": ("Alignment of views", "mean squared distance"),
    "shared_variance": ("Variance shared by views", "share of all"),
}
"""Titles and units of the quantities of `geometry.describe`."""


@styled
def geometry_by_stage(
    regimes: Mapping[str, Sequence[tuple[str | float, Sequence[GeometryRow]]]],
    *,
    quantities: Sequence[str] | None = None,
) -> Figure:
    """Draw each quantity of the geometry in a panel of its own: a line per regime, stages from low to high.

    Args:
        regimes: `{regime: [(stage, geometry.describe(...)), ...]}`, stages in order: each its name, which all regimes
            share, or its depth, the share of the unit blocks that lie in and below it.
        quantities: which, by name; by default all that are there.

    Raises:
        UserError: there is nothing to draw.
    """
    stages = list(dict.fromkeys(stage for found in regimes.values() for stage, _ in found))
    names = [stage for stage in stages if isinstance(stage, str)]
    step = 0.07 if names else 0.008
    there = {row.quantity: row.n for found in regimes.values() for _, rows in found for row in rows}
    shown = [name for name in UNITS if name in there and (quantities is None or name in quantities)]
    if not shown:
        raise UserError("a figure of geometry needs at least one regime with one stage and one quantity")
    columns = min(len(shown), 4)
    rows_of_panels = -(-len(shown) // columns)
    figure, _ = new_figure(1.9 + 2.3 * columns, 0.6 + 2.3 * rows_of_panels, axes=False)
    panels = list(figure.subplots(rows_of_panels, columns, squeeze=False, sharex=True).flat)
    handles = {}
    for axes, quantity in zip(panels, shown, strict=False):
        for number, (regime, found) in enumerate(regimes.items()):
            points = [
                (names.index(stage) if isinstance(stage, str) else stage, row)
                for stage, rows in found
                for row in rows
                if row.quantity == quantity
            ]
            if not points:
                continue
            values = np.array([row.value for _, row in points])
            ends = [[row.value if end is None else end for end in (row.low, row.high)] for _, row in points]
            handles[regime] = axes.errorbar(
                [place + step * (number - (len(regimes) - 1) / 2) for place, _ in points], values,
                yerr=np.abs(np.array(ends).T - values), color=COLOURS[number % len(COLOURS)],
                fmt=f"{MARKERS[number % len(MARKERS)]}-", markersize=4, linewidth=1.3, elinewidth=1,
            )  # fmt: skip
        title, unit = UNITS[quantity]
        axes.set_title(title, fontsize=9.5)
        axes.set_ylabel(unit, fontsize=8.5)
        if names:
            axes.set_xticks(range(len(names)), names, **_slant(names))
        else:
            axes.set_xlim(0, 1.05)
        axes.tick_params(labelbottom=True)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("stage" if names else "depth (share of the unit blocks)")
    n = sorted(set(there.values()))
    figure.legend(list(handles.values()), list(handles), loc="outside right upper",
                  title=f"n = {', '.join(map(str, n))} images\nbars: 95 % intervals")  # fmt: skip
    return figure


@styled
def update_alignment(tables: Mapping[str, AlignmentTable]) -> Figure:
    """Draw how the update of each stage lies to exact backpropagation of the last loss, over training.

    A column per rule, a line per stage, from dark for its lowest to light for its highest. Above, the cosine: 1 where
    the rule's update is backpropagation's; dashed, the cosine between backpropagation's own gradients of different
    batches, the yardstick of how much two gradients agree at all. Below, the ratio of norms.

    Args:
        tables: `{rule: alignment_over_training(...)}`.

    Raises:
        UserError: there is nothing to draw.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import NullFormatter

    if not tables:
        raise UserError("a figure of alignment needs at least one table")
    figure, _ = new_figure(1.6 + 1.9 * len(tables), 4.6, axes=False)
    grid = figure.subplots(2, len(tables), sharex="col", sharey="row", squeeze=False)
    handles = {}
    for column, (rule, table) in enumerate(tables.items()):
        above, below = grid[:, column]
        stages = sorted({row.stage for row in table.select(level="stage") if row.stage is not None})
        for stage in stages:
            rows = [row for row in table.select(level="stage", stage=stage) if row.cosine is not None]
            if not rows:
                continue
            steps = [row.step for row in rows]
            colour = colormaps["viridis"](0.9 * (stage - 1) / max(1, stages[-1] - 1))
            (line,) = above.plot(steps, [row.cosine for row in rows], "o-", color=colour, markersize=3.5, linewidth=1.5)
            if stage in (stages[0], stages[-1]):
                handles.setdefault("highest stage" if stage == stages[-1] else "lowest stage", line)
            _band(above, steps, [(row.low, row.high) for row in rows], colour)
            above.plot(steps, [row.self_cosine for row in rows], "--", color=colour, linewidth=0.9)
            below.plot(steps, [row.norm_ratio for row in rows], "o-", color=colour, markersize=3.5, linewidth=1.5)
            _band(below, steps, [(row.ratio_low, row.ratio_high) for row in rows], colour)
        above.set_title(rule, fontsize=9.5)
        above.set_ylim(-0.35, 1.05)
        above.axhline(0, color="#888888", linewidth=0.8)
        below.axhline(1, color="#888888", linewidth=0.8)
        below.set_yscale("log")
        below.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        below.yaxis.set_major_locator(_ticks())
        below.yaxis.set_minor_formatter(NullFormatter())
    grid[0, 0].set_ylabel("cosine with\nbackpropagation")
    grid[1, 0].set_ylabel("norm relative to\nbackpropagation's")
    figure.supxlabel("training step")
    (yardstick,) = grid[0, 0].plot([], [], "--", color="#555555", linewidth=0.9)
    figure.legend(
        [*handles.values(), yardstick], [*handles, "backpropagation,\ntwo batches"], loc="outside right upper",
        title=f"n = {max(row.n for table in tables.values() for row in table.rows)} batches\nbands: 95 % intervals",
    )  # fmt: skip
    return figure


def _band(axes, steps: Sequence[int], ends: Sequence[tuple[float | None, float | None]], colour) -> None:
    if all(low is not None and high is not None for low, high in ends):
        axes.fill_between(steps, *np.array(ends, dtype=float).T, color=colour, alpha=0.2, linewidth=0)


def _ticks() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 5))


def _slant(names: Sequence[str]) -> dict:
    return {} if max(map(len, names)) < 4 else {"rotation": 35, "ha": "right", "rotation_mode": "anchor", "fontsize": 8}
