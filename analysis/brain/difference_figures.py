"""The forest plot of differences between regimes on the same images and neurons."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING, Any

from localsim.analysis.brain.contrasts import BrainDifference, differences, references_of
from localsim.analysis.brain.figure_parts import SMALL, counts, entitle, looks, where
from localsim.analysis.canvas import new_figure, styled, wrapped
from localsim.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from localsim.analysis.brain.scores import BrainScores

ABREAST = 6
"""Most panels side by side."""
TALL = 45
"""More rows are set closer, and twice as many panels side by side."""


@styled
def score_differences(scores: BrainScores) -> Figure:
    """Draw each regime's score less that of its untrained network, and of end-to-end regimes, with 95 % intervals.

    A panel for each region and reference, a row for each layer. Open: the interval holds zero.
    """
    places = scores.headline
    pairs = [(regime, reference) for regime in scores.untrained for reference in references_of(scores, regime)]
    found = {pair: differences(scores, *pair, places) for pair in pairs}
    found = {pair: several for pair, several in found.items() if several}
    if not found:
        raise UserError("no regime has a reference to be held against; score untrained or end-to-end networks too")
    references = list(dict.fromkeys(reference for _, reference in found))
    names = {regime: list(dict.fromkeys(one.layer for pair in found if pair[0] == regime for one in found[pair]))
             for regime, _ in found}  # fmt: skip
    rows, ticks, height = {}, [], 0.0
    for regime, layers in names.items():
        lines = wrapped(regime).count("\n") + 1
        ticks.append((height + 0.45 * (lines - 1), wrapped(regime)))
        height += 0.9 * lines
        for layer in layers:
            rows[regime, layer] = height
            ticks.append((height, layer))
            height += 1
        height += 0.4
    panels = [(place, reference) for place in places for reference in references]
    close = height > TALL
    most = max(1, ABREAST * (1 + close) // len(references)) * len(references)
    columns = min(len(panels), most)
    deep = -(-len(panels) // columns)
    figure, _ = new_figure(2.3 + 1.9 * columns, 0.8 + deep * (1.1 + (0.105 if close else 0.155) * height), axes=False)
    grid = list(figure.subplots(deep, columns, sharex=True, sharey=True, squeeze=False).flat)
    look = looks(scores)
    grid[0].set_ylim(height - 0.4, -0.8)
    for axes, (place, reference) in zip(grid, panels, strict=False):
        axes.axvline(0, color="#222222", linewidth=0.9)
        for regime in names:
            for one in found.get((regime, reference), ()):
                if (one.recording, one.region) == place:
                    _whisker(axes, one, rows[regime, one.layer], look[regime])
        title = "\n".join(wrap(f"{place[1]} minus {reference}", 21))
        entitle(axes, title, where(scores, place), counts(scores, place), width=30)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.tick_params(labelbottom=True)
        axes.set_yticks([y for y, _ in ticks], [text for _, text in ticks], fontsize=5.5 if close else SMALL)
    for axes in grid[: len(panels) : columns]:
        for text in axes.get_yticklabels():
            text.set_fontweight("bold" if text.get_text() in map(wrapped, names) else "normal")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    small = _small_print(found, int(13 * figure.get_figwidth()))
    figure.supxlabel("\n".join([f"difference of {scores.metric.name} (raw score)", *small]), fontsize=9)
    return figure


def _whisker(axes: Axes, one: BrainDifference, height: float, look: dict[str, Any]) -> None:
    if one.low is not None and one.high is not None:
        axes.plot([one.low, one.high], [height, height], "-", color=look["color"], linewidth=1.3)
    clear = one.low is None or one.high is None or one.low > 0 or one.high < 0
    axes.plot([one.value], [height], look["marker"], color=look["color"], markersize=4.5,
              markerfacecolor=look["color"] if clear else "white")  # fmt: skip


def _small_print(found: dict[tuple[str, str], list[BrainDifference]], width: int) -> list[str]:
    """Return what the intervals are over and what was paired, in lines of a width in characters."""
    every = [one for several in found.values() for one in several]
    over = " or ".join(dict.fromkeys(one.over for one in every if one.low is not None))
    words = {True: "of the same seed", False: "of different seeds", None: "without seeds"}
    pairs: dict[str, list[int]] = {}
    for one in every:
        pairs.setdefault(words[one.same_seed], []).append(one.pairs)
    text = (
        f"95 % intervals, each by itself, over {over}; open: holds zero; " if over else "no intervals: no resamples; "
    )
    counted = (f"{' or '.join(map(str, sorted(set(numbers))))} {word}" for word, numbers in pairs.items())
    return wrap(f"{text}pairs of networks: {', '.join(counted)}", width)
