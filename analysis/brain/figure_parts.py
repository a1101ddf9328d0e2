"""What the figures of brain scores share: means over seeds, looks of regimes, and what is written beside panels."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from localsim.analysis.brain.means import SeedMean, counted, members
from localsim.analysis.brain.scores import EVERY
from localsim.analysis.canvas import COLOURS, MARKERS, wrapped
from localsim.analysis.profiles import ENOUGH_SEEDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from localsim.analysis.brain.scores import BrainScores, Place

GREYS = ("#777777", "#aaaaaa", "#555555")
"""Of networks that have learned nothing."""
NEUTRALS = (("#8B6B4A", "-."), ("#5B6F8F", (0, (7, 2))), ("#7A5B78", (0, (3, 1))))
"""Colours and dashes of baselines, none of them of `COLOURS`."""
SMALL = 7.5
"""Size of small print in points."""


def networks(scores: BrainScores) -> list[str]:
    """Return the regimes that are no baselines."""
    return [regime for regime in scores.regimes if regime not in scores.record["baselines"]]


def looks(scores: BrainScores) -> dict[str, dict[str, Any]]:
    """Return colour, marker and dashes of each regime that is no baseline: in colour what learned, else in grey."""
    found: dict[str, dict[str, Any]] = {}
    counts = {True: 0, False: 0}
    for regime in networks(scores):
        learned = regime not in scores.record["unlearned"]
        place = counts[learned]
        counts[learned] += 1
        colours = COLOURS if learned else GREYS
        found[regime] = {
            "color": colours[place % len(colours)],
            # where colours come again, they come with other markers
            "marker": MARKERS[(place + place // len(colours) + (0 if learned else 4)) % len(MARKERS)],
            "linestyle": "-" if learned else "--",
        }
    return found


def bars(points: Sequence[SeedMean]) -> np.ndarray | None:
    """Return what errorbar takes `(2, points)`, None without intervals."""
    if points[0].interval is None:
        return None
    # an interval cut to the metric's range still holds its estimate, but for rounding
    ends = [(one.value - one.interval[0], one.interval[1] - one.value) for one in points if one.interval is not None]
    return np.clip(np.array(ends).T, 0, None)


def several_seeds(scores: BrainScores) -> bool:
    """Return whether a regime has networks of several seeds."""
    seeds: dict[str, set] = {}
    for layer in scores.layers:
        seeds.setdefault(layer.regime, set()).add(layer.seed)
    return any(len(found) > 1 for found in seeds.values())


def intervals_are(scores: BrainScores, marks: str) -> list[str]:
    """Return, in lines, what intervals are over, for the title of a legend."""
    lines = []
    if several_seeds(scores):
        lines.append("means over seeds")
    if scores.record["resamples"]:
        also = f"; runs held fixed where fewer than {ENOUGH_SEEDS} seeds" if several_seeds(scores) else ""
        lines += textwrap.wrap(f"{marks}: 95 % intervals over {scores.metric.over}{also}", 28)
    else:
        lines.append("no intervals: no resamples")
    return lines


def where(scores: BrainScores, place: Place) -> str:
    """Return which recording a place is, or how many it is the mean over; nothing where there is but one."""
    recording, _ = place
    if len(of := members(scores, place)) > 1:
        when = recording.removeprefix(EVERY).strip()
        # a space that no line ends at
        return ", ".join(filter(None, [f"mean over {len(of)} recordings", when.replace(" ", "\N{NO-BREAK SPACE}")]))
    return recording if len(scores.record["recordings"]) > 1 else ""


def counts(scores: BrainScores, place: Place) -> str:
    """Return how many images and neurons a place has."""
    return f"n = {counted(scores, place)}"


def entitle(axes: Axes, title: str, *small: str, width: int = 38, written: bool = True) -> None:
    """Write a title above a panel, and below it lines of small print, or leave their room empty."""
    lines = [line for text in small if text for line in textwrap.wrap(text, width)]
    axes.set_title(title, fontsize=10, pad=5 + 1.28 * SMALL * len(lines))
    if lines and written:
        axes.annotate(
            "\n".join(lines), (0, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", va="bottom",
            fontsize=SMALL, linespacing=1.1,
        )  # fmt: skip


def beside(figure: Figure, handles: Mapping[str, Any], title: Sequence[str]) -> None:
    """Put a legend, with small print above it, to the right of all panels; the figure grows where it is too low."""
    labels = [wrapped(label) for label in handles]
    lines = sum(label.count("\n") + 1 for label in labels)
    needed = 0.3 + 0.165 * lines + 0.05 * len(labels) + 0.14 * len(title)
    if figure.get_figheight() < needed:
        figure.set_figheight(needed)
    legend = figure.legend(
        list(handles.values()), labels, loc="outside right upper", title="\n".join(title), title_fontsize=SMALL + 0.5,
        alignment="left",
    )  # fmt: skip
    legend.get_title().set_multialignment("left")
