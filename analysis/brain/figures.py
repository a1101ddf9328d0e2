"""Figures of brain scores: regimes against depth, all layers against all regions, differences, and the hierarchy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from statistics import fmean
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np

from localsim.analysis.brain.contrasts import references_of
from localsim.analysis.brain.difference_figures import score_differences
from localsim.analysis.brain.figure_parts import (
    NEUTRALS,
    SMALL,
    bars,
    beside,
    counts,
    entitle,
    intervals_are,
    looks,
    networks,
    several_seeds,
    where,
)
from localsim.analysis.brain.means import SeedMean, profile, raw_ceiling
from localsim.analysis.brain.training_figures import scores_over_training
from localsim.analysis.canvas import new_figure, panel_grid, styled
from localsim.analysis.statistics import COVERAGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from localsim.analysis.brain.scores import BrainScores, Place

CHANCE = "shuffled images"
CEILING = "ceiling"
NEAR = 0.35
"""A ceiling is drawn where it lies no farther above all else than this share of the height that all else takes."""
NAMED = 60
"""Heat maps of more rows name networks only, without numbers."""
WIDE = 6
"""Heat maps of more columns leave intervals out."""


def brain_figures(scores: BrainScores) -> dict[str, Figure]:
    """Return every figure that there are numbers for, by name."""
    figures = {"regimes": scores_by_depth(scores), "matrix": score_matrix(scores)}
    if any(references_of(scores, regime) for regime in scores.untrained):
        figures["differences"] = score_differences(scores)
    if len({region for _, region in scores.headline}) > 1 and networks(scores):
        figures["hierarchy"] = best_depths(scores)
    if scores.training:
        figures["training"] = scores_over_training(scores)
    return figures


@styled
def scores_by_depth(scores: BrainScores) -> Figure:
    """Draw, in a panel for each region, raw scores against depth: a line for each regime, seeds averaged.

    Level lines are baselines, the mean chance level, and the raw score that reaches the ceiling, where it is near.
    """
    places = scores.headline
    columns = 2 if len(places) in (2, 4) else 3
    rows = -(-len(places) // columns)
    figure, _ = new_figure(2.6 + 2.7 * min(columns, len(places)), 0.7 + 2.9 * rows, axes=False)
    handles: dict[str, Any] = {}
    panels = dict(zip(places, panel_grid(figure, len(places), columns), strict=True))
    limits = {}
    for place, axes in panels.items():
        values = _lines(axes, scores, place, handles) + _levels(axes, scores, place, handles)
        limits[place] = (min(values), max(values))
    ceilings = {place: ends for place in places if (ends := raw_ceiling(scores, place)) is not None}
    reach = {place: high + NEAR * (high - low) for place, (low, high) in limits.items()}
    near = all(ends[0] <= reach[place] for place, ends in ceilings.items())
    for place, axes in panels.items():
        (low, high), text = limits[place], "no ceiling"
        if place in ceilings:
            text = f"score at the ceiling {_ends(ceilings[place], 2)}{'' if near else ', far above'}"
            if near:
                handles[CEILING] = _ceiling(axes, ceilings[place])
                high = max(high, min(ceilings[place][1], reach[place]))
        room = max(0.05 * (high - low), 0.01)
        axes.set_ylim(low - room, high + room)
        axes.set_xlim(0, 1.05)
        entitle(axes, place[1], where(scores, place), counts(scores, place), text)
    figure.supxlabel("depth (share of the unit blocks)")
    figure.supylabel(f"{scores.metric.name} (raw score)")
    order = [*networks(scores), *scores.record["baselines"], CHANCE, CEILING]
    title = intervals_are(scores, "bars, bands")
    beside(figure, {name: handles[name] for name in order if name in handles},
           [*title, "ticks on bars: single seeds"] if several_seeds(scores) else title)  # fmt: skip
    return figure


def _lines(axes: Axes, scores: BrainScores, place: Place, handles: dict[str, Any]) -> list[float]:
    """Draw the regimes of networks; return all that has to fit."""
    values = []
    look = looks(scores)
    found = {regime: profile(scores, place, regime) for regime in look}
    depths = sorted({0.0, *(point.depth for points in found.values() for point in points)})
    # side by side, so that bars of equal scores stay visible, but nearer to their depth than to the next
    aside = min(0.012, 0.5 * min(np.diff(depths), default=1) / max(1, len(look)))
    for number, (regime, points) in enumerate(found.items()):
        x = [point.depth + aside * (number - (len(look) - 1) / 2) for point in points]
        handles[regime] = axes.errorbar(
            x, [point.value for point in points], yerr=bars(points), markersize=4, linewidth=1.4, elinewidth=1,
            **look[regime],
        )  # fmt: skip
        for depth, point in zip(x, points, strict=True):
            values += [*point.each, *(point.interval or ())]
            if len(point.each) > 1:
                axes.plot([depth] * len(point.each), point.each, "_", color=look[regime]["color"], alpha=0.7,
                          markersize=6)  # fmt: skip
    return values


def _levels(axes: Axes, scores: BrainScores, place: Place, handles: dict[str, Any]) -> list[float]:
    """Draw what has no depth; return all that has to fit."""
    values = []
    for regime, (colour, dashes) in zip(scores.record["baselines"], cycle(NEUTRALS), strict=False):
        for point in profile(scores, place, regime):
            handles[regime] = axes.axhline(point.value, color=colour, linestyle=dashes, linewidth=1.3)
            if point.interval is not None:
                axes.axhspan(*point.interval, color=colour, alpha=0.12, linewidth=0)
            values += [point.value, *(point.interval or ())]
    ended = [scores.score(*place, layer) for layer in scores.layers if layer.step is None]
    chances = [one.chance for one in ended if one.chance is not None]
    if chances:
        handles[CHANCE] = axes.axhline(fmean(chances), color="#222222", linestyle=":", linewidth=1)
        values.append(fmean(chances))
    return values


def _ceiling(axes: Axes, ends: tuple[float, float]) -> Any:
    line = axes.axhline(ends[1], color="#222222", linewidth=1)
    return axes.axhspan(*ends, color="#222222", alpha=0.1, linewidth=0) if ends[0] < ends[1] else line


def _ends(ends: tuple[float, float] | None, digits: int) -> str:
    """Return a ceiling in words."""
    return "none" if ends is None else "–".join(f"{end:.{digits}f}" for end in dict.fromkeys(ends))


@styled
def score_matrix(scores: BrainScores) -> Figure:
    """Draw raw scores of all layers (rows) for all regions (columns) as a heat map, ceilings in a last row.

    Networks are parted by white lines. Cells say their score, and where there is room its interval.
    """
    layers, places = [layer for layer in scores.layers if layer.step is None], scores.places
    found = [[scores.score(*place, layer) for place in places] for layer in layers]
    values = np.array([[one.value for one in row] for row in found])
    rows, named, wide = len(layers), len(layers) <= NAMED, len(places) <= WIDE
    headings = [
        _column_label(scores, place, 20) if wide else
        ", ".join(filter(None, [place[1], where(scores, place), counts(scores, place)]))
        for place in places
    ]  # fmt: skip
    baselines = scores.record["baselines"]
    # rows without names are too thin for names of one row each
    groups = [", ".join(baselines) if layer.regime in baselines and not named else
              " ".join(filter(None, [layer.regime, "" if layer.seed is None else f"s{layer.seed}"]))
              for layer in layers]  # fmt: skip
    starts = [i for i in range(rows) if i == 0 or groups[i] != groups[i - 1]]
    titles = [groups[start] for start in starts]
    body = (1.3 if wide else 0.46) * len(places)
    above = 0.14 * max(text.count("\n") + 1 for text in headings) if wide else 0.062 * max(map(len, headings))
    margin = 0.075 * max(map(len, titles)) + (0.07 * max(len(layer.name) for layer in layers) if named else 0)
    figure, axes = new_figure(
        1.6 + max(1.6, body) + margin, 0.9 + above + (0.17 * (rows + 2) if named else max(7.5, 0.17 * len(starts)))
    )
    image = axes.imshow(
        values, vmin=min(0.0, values.min()), vmax=values.max(), cmap="viridis", interpolation="nearest", aspect="auto"
    )
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=2 if named else 1)
    if named:
        for (i, j), value in np.ndenumerate(values):
            interval = found[i][j].interval
            text = f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]" if wide and interval else f"{value:.3f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=6.5, color=_ink(image.to_rgba(value)))
    last = rows + 0.01 * rows + 0.2
    for j, place in enumerate(places):
        axes.text(j, last, _ends(raw_ceiling(scores, place), 3), ha="center", va="center", fontsize=6.5)
    axes.set_ylim(last + 0.5 + 0.005 * rows, -0.5)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(places)), headings, fontsize=SMALL, rotation=0 if wide else 90)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, [*starts[1:], rows], strict=True)]
    if named:
        axes.set_yticks([*range(rows), last], [*(layer.name for layer in layers), "score at the ceiling"], fontsize=7)
        beyond = axes.secondary_yaxis("right")
        beyond.set_yticks(middles, titles, fontsize=8.5)
        beyond.tick_params(length=0)
        beyond.spines[:].set_visible(False)
    else:
        axes.set_yticks([*middles, last], [*titles, "score at the ceiling"], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    note = "each network by itself; "
    note += f"95 % intervals over {scores.metric.over}" if scores.record["resamples"] else "no intervals: no resamples"
    note += "" if named and wide else ", see scores.csv" if scores.record["resamples"] else ""
    axes.set_xlabel("\n".join(wrap(note, int(14 * figure.get_figwidth() * 0.7))), fontsize=SMALL)
    axes.xaxis.set_label_position("bottom")
    figure.colorbar(image, ax=axes, label=f"{scores.metric.name} (raw score)", shrink=0.8, pad=0.02)
    return figure


def _column_label(scores: BrainScores, place: Place, width: int) -> str:
    return "\n".join([place[1], *wrap(where(scores, place), width), counts(scores, place).replace(", ", ",\n")])


def _ink(colour: Any) -> str:
    """Return what is legible on a colour: by its relative luminance (ITU-R BT.709)."""
    return "#222222" if np.dot(colour[:3], [0.2126, 0.7152, 0.0722]) > 0.45 else "white"


@styled
def best_depths(scores: BrainScores) -> Figure:
    """Draw the depth of each regime's best-matching layer for each region, seeds averaged before the best is taken.

    Intervals hold 95 % of the depths that are best in resamples, which are the same for all layers. Lines join areas
    where each stands once.
    """
    places, regimes, look = scores.headline, networks(scores), looks(scores)
    figure, axes = new_figure(3.6 + 0.95 * max(2, len(places)), 3.6)
    handles = {}
    for number, regime in enumerate(regimes):
        x = np.arange(len(places)) + 0.5 / len(regimes) * (number - (len(regimes) - 1) / 2)
        best = [best_depth(profile(scores, place, regime)) for place in places]
        (handles[regime],) = axes.plot(x, [depth for depth, _ in best], markersize=5, linewidth=1.2, **look[regime])
        if len({region for _, region in places}) < len(places):
            handles[regime].set_linestyle("")  # of an area there are several time bins
        for place, (_, interval) in zip(x, best, strict=True):
            if interval is not None:
                axes.vlines(place, *interval, color=look[regime]["color"], linewidth=1)
    labels = [_column_label(scores, place, 15) for place in places]
    axes.set_xticks(range(len(places)), labels, fontsize=8)
    axes.set(xlim=(-0.5, len(places) - 0.5), ylim=(0, 1.05))
    axes.set_ylabel("depth of the best-matching layer,\nchosen on the images it is scored on")
    beside(figure, handles, [f"by {scores.metric.name}", *intervals_are(scores, "bars")])
    return figure


def best_depth(points: Sequence[SeedMean]) -> tuple[float, tuple[float, float] | None]:
    """Return the depth of the highest of some layers' scores, and the middle 95 % of those that draws choose."""
    depths = np.array([point.depth for point in points])
    best = float(depths[np.argmax([point.value for point in points])])
    draws = np.stack([point.draws for point in points])
    if not draws.size:
        return best, None
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(depths[draws.argmax(0)], [tail, 1 - tail], method="inverted_cdf")
    return best, (float(low), float(high))
