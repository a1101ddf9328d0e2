"""Figures of sweeps: accuracy against how finely a network is cut, how far gradients travel, and what is held.

Every figure shows the single seeds, the control that learned nothing, and how many images the accuracies are of. What
varies is told apart by place, colour, marker or panel; nothing but seeds is averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from localsim.analysis.canvas import COLOURS, MARKERS, new_figure, panel_grid, percent, styled
from localsim.analysis.controls import CONTROLS
from localsim.analysis.sweep_layout import (
    Layout,
    colour_scale,
    control_in_words,
    counted,
    draw_legend,
    impossible,
    level,
    level_colours,
    made_of,
    panels_of,
    probed,
    series,
    setting,
)
from localsim.analysis.sweeps import Cell, SweepTable, control
from localsim.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#777777"
LOOKS = dict(zip(CONTROLS, (("--", "_"), (":", "x")), strict=True))
"""Line and marker of each control."""


def sweep_figures(table: SweepTable) -> dict[str, Figure]:
    """Return the figures that make sense for what varies in a table, by the names of their functions.

    The map where two settings vary or more; accuracy against gradient path and held memory where these differ; the
    profiles always.
    """
    learned = [cell for cell in table.cells() if cell.path]
    figures = {}
    if len(table.factors) > 1:
        figures["accuracy_map"] = accuracy_map(table)
    if len({cell.path for cell in learned}) > 1:
        figures["accuracy_against_path"] = accuracy_against_path(table)
    if len({cell.held_mib for cell in learned} - {None}) > 1:
        figures["accuracy_against_memory"] = accuracy_against_memory(table)
    return {**figures, "accuracy_profiles": accuracy_profiles(table)}


@styled
def accuracy_map(table: SweepTable, *, probe: str = "linear", features: str = "raw") -> Figure:
    """Draw the accuracy of the last stage as a heat map: granularity by reach, or the first two settings that vary.

    A cell has its mean over seeds, in %, and their number. Hatched: not run, or no such credit matrix, where a reach
    is larger than the number of stages. The colours begin at the untrained network, where that is the lowest; a line
    marks it on their scale. Further settings that vary have a panel for each of their values.

    Args:
        table: in which two settings vary or more.
        probe, features: which, see `ProbeRow`.

    Raises:
        UserError: fewer settings vary.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.patches import Rectangle

    layout, cells = Layout.of(table), table.cells(probe=probe, features=features)
    if layout.x is None or layout.y is None:
        raise UserError(f"a map of accuracy needs two settings that vary, not {len(table.factors)}")
    columns, rows = table.levels(layout.x), table.levels(layout.y)
    panels = panels_of(table, cells, layout.rest)
    base = [row.untrained for cell in cells for row in cell.rows if row.untrained is not None]
    scale = colour_scale([*base, *(cell.mean for cell in cells)])
    across = min(len(panels), 2)
    figure, _ = new_figure(
        1.9 + across * (0.9 + 0.95 * len(columns)),
        0.8 + -(-len(panels) // across) * (0.7 + 0.75 * len(rows)),
        axes=False,
    )
    grid = panel_grid(figure, len(panels), across, share_y=True)
    for axes, (title, own) in zip(grid, panels.items(), strict=True):
        found = {(columns.index(c.settings[layout.x]), rows.index(c.settings[layout.y])): c for c in own}
        for place in np.ndindex(len(columns), len(rows)):
            cell, corner = found.get(place), (place[0] - 0.5, place[1] - 0.5)
            if cell is None:
                chosen = {layout.x: columns[place[0]], layout.y: rows[place[1]]}
                words = "no such\nmatrix" if impossible(table, chosen) else "not run"
                axes.add_patch(
                    Rectangle(corner, 1, 1, facecolor="#f7f7f7", edgecolor="#cccccc", hatch="///", label=words)
                )
                look: dict[str, Any] = {"color": "#555555", "fontsize": 8, "backgroundcolor": "#f7f7f7"}
            else:
                colour = colormaps["viridis"](scale(cell.mean))
                words = f"{100 * cell.mean:.1f}\n{counted(len(cell.rows), 'seed')}"
                axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white", label="accuracy"))
                look = {"color": "white" if np.dot(colour[:3], (0.3, 0.6, 0.1)) < 0.5 else "#111111", "fontsize": 9}
            axes.text(place[0], place[1], words, ha="center", va="center", **look)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.5, len(rows) - 0.5), xlabel=layout.x, title=title)
        axes.set_xticks(range(len(columns)), [level(value) for value in columns])
        axes.set_yticks(range(len(rows)), [level(value) for value in rows])
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
    grid[0].set_ylabel(layout.y)
    bar = figure.colorbar(ScalarMappable(scale, "viridis"), ax=grid, label=f"{probed(probe, features)}, last stage")
    bar.ax.yaxis.set_major_formatter(percent)
    for accuracy in sorted(set(base)):
        bar.ax.axhline(accuracy, color=COLOURS[1], linewidth=2.5)
    bar.ax.grid(False)
    named = [words for name in CONTROLS if (words := control_in_words(cells, name))]
    what = f"{' and '.join(named)} (untrained: line on the scale); judge by the better"
    title = f"{made_of(table)}\n{what}" if named else made_of(table)
    figure.suptitle(title, fontsize=9.5, x=0.01, horizontalalignment="left")
    return figure


@styled
def accuracy_against_path(table: SweepTable, *, probe: str = "linear", features: str = "raw") -> Figure:
    """Draw the accuracy of the last stage against the longest path that a gradient takes, in unit blocks.

    Cells with paths of the same length stand side by side. Large: the mean over seeds; small: each seed. A line joins
    these, or from three seeds on shows the 95 % t interval of the mean; pale, the 95 % interval over images. Cells in
    which nothing was trained are left out: the untrained network is the dashed line, its band the interval over images.
    Grey and dotted, or crosses: `calibrated`.

    Raises:
        UserError: nothing was trained.
    """
    units = round(table.rows[0].unit / table.rows[0].depth)
    figure, panels = _scatter(
        table,
        lambda cell: cell.path,
        f"longest gradient path, of {units} unit blocks",
        probe,
        features,
        apart=units / 45,
    )
    for axes in panels:
        axes.set_xlim(0, units * 1.06)
        axes.set_xticks(sorted({cell.path for cell in table.cells(probe=probe, features=features) if cell.path}))
    return figure


@styled
def accuracy_against_memory(table: SweepTable, *, probe: str = "linear", features: str = "raw") -> Figure:
    """Draw the accuracy of the last stage against the activations that a step held, as `accuracy_against_path` does.

    The memory is measured: what autograd held for backward passes at the peak of a step, without weights, their
    gradients or the optimiser's state.

    Raises:
        UserError: no run has it.
    """
    figure, panels = _scatter(
        table, lambda cell: cell.held_mib, "activations held at the peak, measured (MiB)", probe, features
    )
    for axes in panels:
        axes.set_xlim(0, 1.06 * max(cell.held_mib or 0 for cell in table.cells(probe=probe, features=features)))
    return figure


@styled
def accuracy_profiles(table: SweepTable, *, probe: str = "linear", features: str = "raw") -> Figure:
    """Draw the accuracy of every stage against its depth: a panel per granularity, a line per reach or rule.

    Lines are means over seeds, small points each seed, thin bars, from three seeds on, 95 % t intervals of the mean,
    and pale ones 95 % intervals over images.
    Grey: the untrained network, and `calibrated`.
    """
    layout, last = Layout.of(table), table.cells(probe=probe, features=features)
    by_depth = {id(end): _profile(table, end, probe, features) for end in last}
    panels = panels_of(table, last, [name for name in (layout.x, *layout.rest) if name], "\n")
    lines = [None] if layout.y is None else table.levels(layout.y)
    # a row for each granularity, where its panels stand side by side
    beside = len(panels) // len(table.levels(layout.x)) if layout.x and layout.rest else len(panels)
    across = beside if beside < 6 else 4
    figure, _ = new_figure(2.6 + 1.75 * across, 0.7 + 2.5 * -(-len(panels) // across), axes=False)
    grid, handles = panel_grid(figure, len(panels), across, share_y=True), {}
    for axes, (title, ends) in zip(grid, panels.items(), strict=True):
        for name, (look, marker) in LOOKS.items():
            drawn: list[list[tuple[float, float]]] = []
            for end in ends:
                points = [(at.rows[0].depth, own.mean) for at in by_depth[id(end)] if (own := control([at], name))]
                if points and points not in drawn:
                    drawn.append(points)
                    (handles[name],) = axes.plot(*zip(*points, strict=True), look, color=GREY, linewidth=1.2,
                                                 marker=marker, markersize=4)  # fmt: skip
        for end in (end for end in ends if end.path):
            place = lines.index(end.settings[layout.y] if layout.y else None)
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]
            points = by_depth[id(end)]
            depths = [at.rows[0].depth for at in points]
            (line,) = axes.plot(
                depths, [at.mean for at in points], color=colour, marker=marker, markersize=4, linewidth=1.5
            )
            handles[series(layout.y, end)] = line
            _spread(axes, list(zip(depths, points, strict=True)), colour)
        axes.set_title(title, fontsize=9.5)
        axes.set_xlim(0, 1.06)
        axes.set_xticks((0, 0.5, 1), ("0", "½", "1"))
        axes.yaxis.set_major_formatter(percent)
    grid[0].set_ylabel(probed(probe, features))
    figure.supxlabel("depth of a stage's output (share of the unit blocks)", fontsize=10)
    controls = [name for name in CONTROLS if name in handles]
    draw_legend(figure, table, last, {**{n: h for n, h in handles.items() if n not in controls},
                                  **{name: handles[name] for name in controls}})  # fmt: skip
    return figure


def _scatter(
    table: SweepTable, x_of: Callable[[Cell], float | None], label: str, probe: str, features: str, *, apart: float = 0
) -> tuple[Figure, Sequence[Axes]]:
    """Draw the cells that were trained against what `x_of` gives; `apart`: how far those at one place stand aside."""
    from matplotlib.lines import Line2D

    layout = Layout.of(table, most=len(MARKERS))
    cells = [cell for cell in table.cells(probe=probe, features=features) if cell.path and x_of(cell) is not None]
    if not cells:
        raise UserError("a figure of what was learned needs a run that was trained: none of these was")
    colours = [None] if layout.x is None else table.levels(layout.x)
    markers = [None] if layout.y is None else table.levels(layout.y)
    shades = level_colours(colours)
    panels = panels_of(table, cells, layout.rest)
    across = 2 if len(panels) == 4 else min(len(panels), 3)
    figure, _ = new_figure(2.3 + 3.9 * across, 0.5 + 3.3 * -(-len(panels) // across), axes=False)
    grid, handles = panel_grid(figure, len(panels), across, share_y=True), {}
    for axes, (title, own) in zip(grid, panels.items(), strict=True):
        beside: dict[float, list[Cell]] = {}
        for cell in own:
            beside.setdefault(x_of(cell) or 0.0, []).append(cell)
        places = []
        for x, group in beside.items():
            places += [(x + apart * (i - (len(group) - 1) / 2), cell) for i, cell in enumerate(group)]
        handles |= _controls(axes, places)
        for x, cell in places:
            colour = shades[colours.index(cell.settings[layout.x] if layout.x else None)]
            marker = MARKERS[markers.index(cell.settings[layout.y] if layout.y else None)]
            axes.plot([x], [cell.mean], color=colour, marker=marker, markersize=8, linestyle="", zorder=4)
            _spread(axes, [(x, cell)], colour)
        axes.yaxis.set_major_formatter(percent)
        axes.set_title(title, fontsize=9.5)
        axes.set_xlabel(label)
    grid[0].set_ylabel(f"{probed(probe, features)}, last stage")
    keys = {}
    for marker, value in zip(MARKERS, markers, strict=False):
        if layout.y:
            look = {"marker": marker, "markersize": 7, "linestyle": ""}
            keys[setting(layout.y, value)] = Line2D([], [], color="#444444", **look)
    for colour, value in zip(shades, colours, strict=True):
        if layout.x:
            keys[setting(layout.x, value)] = Line2D([], [], color=colour, linewidth=5)
    draw_legend(figure, table, cells, {**keys, **handles})
    return figure, grid


def _controls(axes: Axes, places: Sequence[tuple[float, Cell]]) -> dict[str, Any]:
    """Draw the controls of cells: lines where they share them, the untrained with its band, else marks at each."""
    cells, handles = [cell for _, cell in places], {}
    for name, (line, marker) in LOOKS.items():
        if shared := control(cells, name):
            handles[name] = axes.axhline(shared.mean, color=GREY, linestyle=line, linewidth=1.3, zorder=1)
            if name == "untrained":
                axes.axhspan(*shared.over_images, color="#eeeeee", zorder=0)
                handles["untrained\n(band: 95 % over images)"] = handles.pop(name)
            continue
        points = [(x, own.mean) for x, cell in places if (own := control([cell], name))]
        if points:
            (handles[name],) = axes.plot(
                *zip(*points, strict=True), color=GREY, marker=marker, linestyle="", markersize=6
            )
    return handles


def _spread(axes: Axes, places: Sequence[tuple[float, Cell]], colour: Any) -> None:
    """Draw the interval of cells over images, pale, and every seed with what joins them: an interval if it can be."""
    for x, cell in places:
        axes.plot([x, x], cell.over_images, color=colour, alpha=0.25, linewidth=5, solid_capstyle="butt", zorder=1)
        if len(cell.rows) < 2:
            continue
        ends = cell.over_seeds or (min(cell.each), max(cell.each))
        bar = "_" if cell.over_seeds else ""  # only intervals have caps
        axes.plot([x, x], ends, color=colour, linewidth=1.2, marker=bar, markersize=7, zorder=2)
        axes.plot([x] * len(cell.rows), cell.each, color="white", marker="o", markersize=3, markeredgecolor=colour,
                  markeredgewidth=0.9, linestyle="", zorder=5)  # fmt: skip


def _profile(table: SweepTable, end: Cell, probe: str, features: str) -> list[Cell]:
    """Return the cells of all stages of the runs that a cell of last stages is of, lowest first."""
    stages: dict[int, list[Any]] = {}
    for row in table.select(**end.settings, probe=probe, features=features):
        stages.setdefault(row.stage, []).append(row)
    return [Cell(end.settings, tuple(stages[stage])) for stage in sorted(stages)]
