"""Section: what happened while the runs were trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from localsim.analysis.canvas import COLOURS, MARKERS, new_figure, panel_grid, styled, wrapped
from localsim.analysis.plots import running_median
from localsim.analysis.report.elements import Note, Part, Section, Table, listed, picture
from localsim.analysis.report.reported import Reported, by_regime

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAST = 0.05
"""The share of the lines of metrics that the end of a run is the mean of."""
Curves = Mapping[str, Sequence[Mapping[str, tuple[np.ndarray, np.ndarray]]]]
"""By regime, for each of its runs: steps and values of every tap or stage."""


def section(runs: Sequence[Reported]) -> Section:
    """Return the section."""
    parts: list[Part] = []
    with_metrics = [run for run in runs if run.metrics]
    for run in runs:
        if run.trains and not run.metrics:
            parts.append(Note(f"{run.label} has no lines of metrics."))
    drawn = by_regime(with_metrics)
    for name, title, unit, how in (
        ("loss", "Training loss", "loss",
         "the running median over about a twentieth of the lines of metrics. Losses of different objectives are on "
         "different scales, and a low loss is no accuracy"),
        ("effective_rank", "Effective rank", "dimensions",
         "of the stage's outputs averaged over positions, on a clean pass of up to 256 images of a batch. 1 is a stage "
         "that has collapsed to a line"),
    ):  # fmt: skip
        curves = {regime: [_curves(run.metrics, name) for run in mine] for regime, mine in drawn.items()}
        if any(curve for mine in curves.values() for curve in mine):
            figure = _panels(curves, unit)
            caption = f"{title}, a panel for each regime and a line for each stage and seed: {how}."
            parts.append(picture(figure, _alt(title, curves), caption))
    if with_metrics:
        held = {regime: _series(mine[0].metrics, "held_bytes") for regime, mine in drawn.items()}
        parts.append(picture(
            _held(held), _held_alt(held),
            "Held memory: activations that autograd holds at the peak of a step, measured at the lines of metrics; "
            "weights, gradients and temporary buffers come on top. A line for each regime, of its first run; the table "
            "has all.",
        ))  # fmt: skip
        parts.append(_table(with_metrics))
    return Section(
        "training", "Training",
        "Measured while training, on training images with augmentation and noise, a line for every seed: there are no "
        "intervals, and a network that was not trained has no such curves. What was learned is in the sections that "
        "follow.",
        parts,
    )  # fmt: skip


def _curves(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return steps and values of every tap or stage."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for key, value in (row.get(name) or {}).items():
            if isinstance(value, int | float):
                points.setdefault(key, []).append((row["step"], value))
    found = {key: np.array(both, dtype=float).T for key, both in points.items()}
    return {key: (steps, values) for key, (steps, values) in found.items()}


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    there = [row for row in rows if isinstance(row.get(name), int | float)]
    return [row["step"] for row in there], [row[name] for row in there]


@styled
def _panels(curves: Curves, unit: str) -> Figure:
    """Draw a panel for each regime: a line for each tap or stage of each run, from dark for the lowest to light."""
    from matplotlib import colormaps

    columns = 1 if len(curves) == 1 else 2
    rows = -(-len(curves) // columns)
    figure, _ = new_figure(6.4, 0.9 + 2.1 * rows, axes=False)
    handles = {}
    # a stage has one look in all panels
    names = sorted({name for runs in curves.values() for run in runs for name in run}, key=_by_number)
    panels = panel_grid(figure, len(curves), columns)
    for axes, (regime, runs) in zip(panels, curves.items(), strict=True):
        for run in runs:
            for name, (steps, values) in run.items():
                place = names.index(name)
                colour = colormaps["viridis"](0.85 * place / max(1, len(names) - 1))
                # a marker here and there: stages can be told apart without colours
                (line,) = axes.plot(
                    steps, running_median(values, len(values) // 40), color=colour, linewidth=1.3,
                    marker=MARKERS[place % len(MARKERS)], markersize=4,
                    markevery=(min(place, len(steps) - 1), max(1, len(steps) // 5)),
                )  # fmt: skip
                handles[place] = line
        axes.set_title(wrapped(regime), fontsize=9.5)
    for axes in panels[-columns:]:  # a label of the figure would lie under the legend
        axes.set_xlabel("step")
    figure.supylabel(unit, fontsize=10)
    # of many, the lowest and the highest
    shown = sorted(handles) if len(handles) <= 10 else [*sorted(handles)[:5], *sorted(handles)[-5:]]
    figure.legend([handles[place] for place in shown], [names[place] for place in shown], loc="outside lower center",
                  ncols=5)  # fmt: skip
    return figure


def _by_number(name: str) -> tuple[int, str]:
    digits = re.search(r"\d{1,9}", name)
    return int(digits[0]) if digits else 0, name


@styled
def _held(held: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> Figure:
    figure, axes = new_figure(6.4, 2.6 + 0.2 * -(-len(held) // 2))
    for number, (label, (steps, values)) in enumerate(held.items()):
        axes.plot(steps, np.array(values) / 2**20, color=COLOURS[number % len(COLOURS)], label=label, markersize=4,
                  marker=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)], linewidth=1.3,
                  markevery=(min(number, len(steps) - 1), max(1, len(steps) // 5)))  # fmt: skip
    axes.set(xlabel="step", ylabel="held MiB")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _end(values: Sequence[float]) -> float:
    """Return the mean of the last values."""
    return fmean(values[-max(1, round(LAST * len(values))) :])


def _alt(title: str, curves: Curves) -> str:
    told = []
    for regime, runs in curves.items():
        found = [
            f"{name} from {values[0]:.3g} to {_end(list(values)):.3g}" for name, (_, values) in (runs[0] or {}).items()
        ]
        shown = found if len(found) <= 4 else [found[0], f"{len(found) - 2} more", found[-1]]
        told.append(f"{regime}: {', '.join(shown)}")
    return f"{title} over the steps of training, first seed of each regime. {listed(told)}"


def _held_alt(held: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> str:
    told = [f"{label}: {max(values) / 2**20:.1f} MiB at most" for label, (_, values) in held.items() if values]
    return f"Held memory over the steps of training. {listed(told)}"


def _table(runs: Sequence[Reported]) -> Table:
    head = ["run", "lines", "loss at the end, from the lowest tap up", "effective rank at the end, from stage 1 up",
            "held MiB", "images/s (median)"]  # fmt: skip
    rows = []
    for run in runs:
        ends = [
            ", ".join(f"{_end(list(values)):.3g}" for _, values in _curves(run.metrics, name).values()) or "–"
            for name in ("loss", "effective_rank")
        ]
        held, speed = (_series(run.metrics, name)[1] for name in ("held_bytes", "images_per_second"))
        rows.append([
            run.label, str(len(run.metrics)), *ends, f"{max(held) / 2**20:.1f}" if held else "–",
            f"{median(speed):.0f}" if speed else "–",
        ])  # fmt: skip
    return Table(
        "The end of training: means over the last twentieth of the lines of metrics. Speed is that of one machine and "
        "of whatever else ran on it.",
        head, rows, names=(0, 2, 3),
    )  # fmt: skip
