"""Brain scores over training: against epochs, and against the number of weight updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from localsim.analysis.brain.figure_parts import (
    bars,
    beside,
    counts,
    entitle,
    intervals_are,
    looks,
    where,
)
from localsim.analysis.brain.means import SeedMean, seed_mean
from localsim.analysis.canvas import new_figure, styled
from localsim.analysis.comparison_plots import layer_columns as columns_of
from localsim.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from localsim.analysis.brain.scores import BrainScore, BrainScores, Place
    from localsim.analysis.regimes import Layer

SHOWN = 5
"""Most layers that have a column; of more, as many evenly spread, the highest among them."""
AGAINST = ("epoch", "weight updates (log)")


@styled
def scores_over_training(scores: BrainScores) -> Figure:
    """Draw raw scores over training: a column for each layer, two rows for each region, a line for each regime.

    The first row is against epochs, the second against weight updates (`training.training_behind`) on a scale that is
    linear from 0 to the first number above it and logarithmic from there. The untrained network stands at 0. Columns
    are the layers of the regime with most; of others, those of that name or nearest in depth. Seeds are averaged.

    Raises:
        UserError: the scores are of no steps of training.
    """
    trained = [layer for layer in scores.layers if (layer.regime, layer.seed, layer.step) in scores.training]
    if not trained:
        raise UserError("the scores hold no steps of training; score with over_training=True")
    columns = columns_of(trained)
    spread = np.unique(np.linspace(0, len(columns) - 1, SHOWN).round().astype(int))
    shown = {name: columns[name] for name in np.array(list(columns))[spread].tolist()}
    figure, _ = new_figure(2.7 + 1.75 * len(shown), 0.8 + 3.7 * len(scores.headline), axes=False)
    grid = figure.subplots(2 * len(scores.headline), len(shown), squeeze=False, sharey=False)
    look = looks(scores)
    handles: dict[str, Any] = {}
    ends = [pair[1] for pair in scores.training.values() if pair[1] > 0]
    for number, place in enumerate(scores.headline):
        block = grid[2 * number : 2 * number + 2]
        for axes in list(block.flat)[1:]:
            axes.sharey(block[0, 0])
        for column, (name, members) in enumerate(shown.items()):
            for regime in dict.fromkeys(layer.regime for layer in members):
                reached, points = course(scores, place, _nearest(members, regime, name))
                for axes, x in zip(block[:, column], np.array(reached).T, strict=True):
                    handles[regime] = axes.errorbar(
                        x, [point.value for point in points], yerr=bars(points), markersize=3.5, linewidth=1.3,
                        elinewidth=0.8, **look[regime],
                    )  # fmt: skip
            if ends:
                _from_zero(block[1, column], min(ends), max(ends))
            small = [where(scores, place), counts(scores, place)]
            entitle(block[0, column], f"{place[1]}, {name}" if column == 0 else name, *small, written=column == 0)
            for axes, label in zip(block[:, column], AGAINST, strict=True):
                axes.set_xlabel(label, fontsize=8.5)
                axes.tick_params(labelleft=column == 0)
    figure.supylabel(f"{scores.metric.name} (raw score)")
    title = [*intervals_are(scores, "bars"), "at 0: untrained"]
    beside(figure, handles, [*title, f"{len(shown)} of {len(columns)} layers"] if len(shown) < len(columns) else title)
    return figure


def course(
    scores: BrainScores, place: Place, layers: Sequence[Layer]
) -> tuple[list[tuple[float, float]], list[SeedMean]]:
    """Return epochs and weight updates behind each step of one layer of a regime, and its scores, seeds averaged."""
    found: dict[tuple[float, float], dict[int | None, BrainScore]] = {}
    for layer in layers:
        reached = scores.training[layer.regime, layer.seed, layer.step]
        # the last snapshot may be the end of the run
        found.setdefault(reached, {})[layer.seed] = scores.score(*place, layer)
    ordered = sorted(found)
    return ordered, [seed_mean(layers[0].name, layers[0].depth, found[reached]) for reached in ordered]


def _nearest(members: Sequence[Layer], regime: str, name: str) -> list[Layer]:
    """Return the layer of a regime, at all its steps, that has a column's name, or is the highest in the column."""
    own = [layer for layer in members if layer.regime == regime]
    chosen = name if any(layer.name == name for layer in own) else max(own, key=lambda layer: layer.depth).name
    return [layer for layer in own if layer.name == chosen]


def _from_zero(axes: Axes, first: float, last: float) -> None:
    """Give an axis a logarithmic scale that starts at 0, with 0 and up to three round numbers written."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("symlog", linthresh=first, linscale=0.5)
    axes.set_xlim(-0.1 * first, last * 1.3)
    powers = range(int(np.floor(np.log10(first))), int(np.ceil(np.log10(last))) + 1)
    ticks = [10.0**power for power in powers if first <= 10.0**power <= 1.3 * last]
    if len(ticks) < 2:
        ticks = [m * 10.0**power for power in powers for m in (1, 2, 5) if first <= m * 10.0**power <= 1.3 * last]
    ticks = ticks[:: -(-len(ticks) // 3)] if ticks else [last]
    axes.xaxis.set_major_locator(FixedLocator([0, *ticks]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: _power(value))


def _power(value: float) -> str:
    if value == 0:
        return "0"
    power = int(np.floor(np.log10(value) + 1e-9))
    mantissa = f"{value / 10.0**power:.2g}"
    return f"$10^{{{power}}}$" if mantissa == "1" else f"${mantissa}\\!\\cdot\\!10^{{{power}}}$"
