"""Figures of a comparison: all layers against all, regimes against depth and over training, and a map of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from localsim.analysis.canvas import COLOURS, MARKERS, new_figure, panel_grid, styled, wrapped
from localsim.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from localsim.analysis.comparison import Comparison
    from localsim.analysis.regimes import Layer

FLOOR = "#777777"
SEEDS = "two seeds of its own"
NAMED = 30
"""Matrices of more layers name networks only."""


def comparison_figures(comparison: Comparison) -> dict[str, Figure]:
    """Return every figure that the comparison has the numbers for, by name."""
    figures = {"matrix": similarity_matrix(comparison)}
    if len(comparison.finished) > 2:
        figures["map"] = similarity_map(comparison)
    learned = [regime for regime in comparison.regimes if regime not in comparison.record.get("unlearned", ())]
    if len(comparison.regimes) > len(learned) > 1:
        figures["map_of_learned"] = similarity_map(
            comparison, learned
        )  # controls are so far away that all else is near
    if any(comparison.profile(a, b) or comparison.profile(a, b, same_seed=True) for a, b in _pairs(comparison)):
        figures["profiles"] = similarity_profiles(comparison)
    if any(layer.step is not None for layer in comparison.layers):
        figures["over_training"] = similarity_over_training(comparison)
    return figures


@styled
def similarity_matrix(comparison: Comparison) -> Figure:
    """Draw the scores of all finished layers with all as a heat map, networks parted by white lines."""
    layers, values = comparison.finished, comparison.matrix()
    num = len(layers)
    named = num <= NAMED
    side = max(3.2, 0.21 * num if named else 6.0)
    figure, axes = new_figure(side + 2.6, side + 1.9)
    low, high = _limits(comparison, values)
    # dark is always unlike
    colours = "viridis" if comparison.measure.kind == "similarity" else "viridis_r"
    image = axes.imshow(values, vmin=low, vmax=high, cmap=colours, interpolation="nearest")
    networks = [(layer.regime, layer.seed) for layer in layers]
    starts = [i for i in range(num) if i == 0 or networks[i] != networks[i - 1]]
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=2)
        axes.axvline(start - 0.5, color="white", linewidth=2)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, [*starts[1:], num], strict=True)]
    titles = [_network(layers[start]) for start in starts]
    if named:
        names = [layer.name for layer in layers]
        axes.set_xticks(range(num), names, rotation=90, fontsize=7)
        axes.set_yticks(range(num), names, fontsize=7)
        above = axes.secondary_xaxis("top")
        above.set_xticks(middles, titles, rotation=30, ha="left", rotation_mode="anchor", fontsize=8.5)
        beside = axes.secondary_yaxis("right")
        beside.set_yticks(middles, titles, fontsize=8.5)
        for extra in (above, beside):
            extra.tick_params(length=0)
            extra.spines[:].set_visible(False)
    else:
        axes.set_xticks(middles, titles, rotation=40, ha="right", rotation_mode="anchor", fontsize=8.5)
        axes.set_yticks(middles, titles, fontsize=8.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    symmetric = comparison.measure.symmetric
    axes.set_xlabel("layers, from low to high in each network" if symmetric else "predicted layer")
    axes.set_ylabel("" if symmetric else "predicting layer")
    figure.colorbar(
        image,
        ax=axes,
        label=f"{_unit(comparison)}, n = {comparison.record['n']} images",
        shrink=0.8,
        pad=0.02 if not named else 0.04,
    )
    return figure


@styled
def similarity_profiles(comparison: Comparison) -> Figure:
    """Draw, in a panel for each regime, how alike the others are to it at each depth, with 95 % intervals.

    Where regimes have several seeds, pairs of runs of different seeds are drawn, and the panel's regime against its own
    other seeds as a grey band: what lies inside is as different as two seeds. Else pairs of the same seed are drawn.
    """
    regimes = comparison.regimes
    several = any(comparison.profile(regime, regime) for regime in regimes)
    columns = 2 if len(regimes) in (2, 4) else 3
    rows = -(-len(regimes) // columns)
    figure, _ = new_figure(2.6 + 2.3 * columns, 0.8 + 2.3 * rows, axes=False)
    panels = panel_grid(figure, len(regimes), columns, share_y=True)
    colour = _colours(comparison)
    drawn = {}
    for axes, regime in zip(panels, regimes, strict=True):
        if floor := comparison.profile(regime, regime):
            depth, low, high = ([getattr(point, name) for point in floor] for name in ("depth", "low", "high"))
            value = [point.value for point in floor]
            (drawn[SEEDS],) = axes.plot(depth, value, color=FLOOR, linewidth=1.2, linestyle="--")
            if low[0] is not None:
                drawn[SEEDS] = axes.fill_between(depth, low, high, color=FLOOR, alpha=0.3, linewidth=0)
        for number, other in enumerate(regimes):
            points = comparison.profile(regime, other, same_seed=not several) or comparison.profile(regime, other)
            if other == regime or not points:
                continue
            aside = 0.008 * (number - len(regimes) / 2)
            drawn[other] = axes.errorbar(
                [point.depth + aside for point in points], [point.value for point in points], yerr=_bars(points),
                color=colour[other], fmt=f"{_marker(comparison, other)}-", markersize=4, linewidth=1.4, elinewidth=1,
            )  # fmt: skip
        axes.set_title(wrapped(regime), fontsize=10)
        axes.set_xlim(0, 1.05)
    _scale(panels, comparison)
    _share_labels(figure, panels, "depth (share of the unit blocks)", _unit(comparison))
    pairs = f"\npairs of runs of {'different seeds' if several else 'the same seed'}"
    order = [*(regime for regime in regimes if regime in drawn), SEEDS]
    shown = [name for name in order if name in drawn]
    title = f"{_relation(comparison)} the\npanel's regime{pairs}{_bars_are(comparison)}"
    figure.legend([drawn[name] for name in shown], list(map(wrapped, shown)), loc="outside right upper", title=title)
    return figure


@styled
def similarity_map(comparison: Comparison, regimes: Sequence[str] | None = None) -> Figure:
    """Draw all layers of all networks, or of some regimes, as a map: the nearer, the more alike.

    Classical scaling (Torgerson 1952) of `Comparison.distances`: coordinates are the leading eigenvectors of
    -1/2 J D^2 J. A line runs through the layers of a network, from the open marker, its lowest, to the largest.
    """
    kept = [i for i, layer in enumerate(comparison.finished) if regimes is None or layer.regime in regimes]
    layers = [comparison.finished[i] for i in kept]
    places, shares = scaled(comparison.distances()[np.ix_(kept, kept)])
    figure, axes = new_figure(7.6, 4.8)
    colour = _colours(comparison)
    networks = list(dict.fromkeys((layer.regime, layer.seed) for layer in layers))
    for regime, seed in networks:
        mine = [i for i, layer in enumerate(layers) if (layer.regime, layer.seed) == (regime, seed)]
        x, y = places[mine].T
        first = (regime, seed) == next(network for network in networks if network[0] == regime)
        marker = _marker(comparison, regime)
        axes.plot(x, y, color=colour[regime], linewidth=1.2, alpha=0.7)
        for step, (a, b) in enumerate(zip(x, y, strict=True)):
            size = 4 + 5 * step / max(1, len(mine) - 1)
            face = "white" if step == 0 else colour[regime]
            axes.plot(a, b, marker=marker, color=colour[regime], markerfacecolor=face, markersize=size, linestyle="",
                      label=wrapped(regime) if first and step == len(mine) - 1 else None)  # fmt: skip
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xlabel=f"first dimension ({shares[0]:.0%} of squared distance)",
             ylabel=f"second dimension ({shares[1]:.0%})")  # fmt: skip
    axes.set_title(f"Map by {comparison.measure.name}")
    distance = "" if comparison.measure.kind == "distance" else "\ndistance sqrt(2 - 2 s)"
    title = f"regime\n(small, open: lowest\nlayer; large: highest)\nn = {comparison.record['n']} images{distance}"
    figure.legend(loc="outside right upper", title=title)
    return figure


@styled
def similarity_over_training(comparison: Comparison) -> Figure:
    """Draw how each layer's likeness changes over training: with its own end, its beginning, and the first regime.

    A column for each layer of the regime with most, where others' layers of that name stand, or else those nearest in
    depth; a line for each regime, seeds averaged; bars are 95 % intervals over images of one seed.
    """
    trained = [layer for layer in comparison.layers if layer.step is not None]
    if not trained:
        raise UserError("the comparison holds no steps of training; compare with over_training=True")
    regimes = list(dict.fromkeys(layer.regime for layer in trained))
    columns = layer_columns(trained)
    rows = {"its own end": None, "its beginning": 0, **({f"{regimes[0]},\nsame step": -1} if len(regimes) > 1 else {})}
    figure, _ = new_figure(2.2 + 1.7 * len(columns), 0.9 + 1.9 * len(rows), axes=False)
    word = _relation(comparison).split()[-1] if comparison.measure.symmetric else "predicting"
    grid = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    colour = _colours(comparison)
    handles = {}
    for axes_row, (title, against) in zip(grid, rows.items(), strict=True):
        for axes, (name, members) in zip(axes_row, columns.items(), strict=True):
            for regime in regimes:
                mine = [layer for layer in members if layer.regime == regime]
                points = _course(comparison, mine, against, regimes[0])
                if points:
                    steps, values, low, high = np.array(points, dtype=float).T
                    handles[regime] = axes.errorbar(
                        steps, values, yerr=np.abs([values - low, high - values]), color=colour[regime],
                        fmt=f"{_marker(comparison, regime)}-", markersize=3.5, linewidth=1.3, elinewidth=0.9,
                    )  # fmt: skip
            if against is None:
                axes.set_title(name, fontsize=9.5)
        axes_row[0].set_ylabel(f"{word} {title}")
    _scale(list(grid.flat), comparison)
    figure.supxlabel("training step")
    figure.supylabel(_unit(comparison))
    figure.legend(list(handles.values()), list(map(wrapped, handles)), loc="outside right upper",
                  title=_bars_are(comparison).strip() or None)  # fmt: skip
    return figure


def scaled(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two coordinates `(L, 2)` for points of given distances `(L, L)`, and each one's share `(2,)` of all.

    Shares are of the sum of positive eigenvalues; a tie of directions and signs is broken by making the largest
    coordinate positive.
    """
    num = len(distances)
    centre = np.eye(num) - 1 / num
    values, vectors = np.linalg.eigh(-0.5 * centre @ distances**2 @ centre)
    values, vectors = np.clip(values[::-1][:2], 0, None), vectors[:, ::-1][:, :2]
    total = np.clip(np.linalg.eigvalsh(-0.5 * centre @ distances**2 @ centre), 0, None).sum()
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(2)])
    return vectors * np.sqrt(values), values / max(total, 1e-300)


def layer_columns(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Return the layers by column: the names of the regime with most, each layer with its namesake or its nearest."""
    by_regime: dict[str, dict[str, float]] = {}
    for layer in layers:
        by_regime.setdefault(layer.regime, {})[layer.name] = layer.depth
    depths = max(by_regime.values(), key=len)
    columns: dict[str, list[Layer]] = {name: [] for name in depths}
    for layer in layers:
        nearest = min(depths, key=lambda name: (name != layer.name, abs(depths[name] - layer.depth)))
        columns[nearest].append(layer)
    return columns


def _course(
    comparison: Comparison, layers: Sequence[Layer], against: int | None, reference: str
) -> list[tuple[float, float, float, float]]:
    """Return (step, value, low, high) of one layer over training, seeds averaged."""
    found: dict[int, list] = {}
    for layer in layers:
        for other in comparison.layers:
            same = other.name == layer.name and other.seed == layer.seed
            wanted = (
                other.regime == reference != layer.regime and other.step == layer.step
                if against == -1
                else other.regime == layer.regime and other.step == against
            )
            if same and wanted and (score := comparison.score(layer, other)) is not None and layer.step is not None:
                found.setdefault(layer.step, []).append(score)
    points = []
    for step, scores in sorted(found.items()):
        value = float(np.mean([score.value for score in scores]))
        ends = [[getattr(score, end) for score in scores] for end in ("low", "high")]
        low, high = (value, value) if None in ends[0] else (float(np.mean(end)) for end in ends)
        points.append((step, value, low, high))
    return points


def _pairs(comparison: Comparison) -> list[tuple[str, str]]:
    return [(a, b) for a in comparison.regimes for b in comparison.regimes]


def _bars(points: Sequence) -> np.ndarray | None:
    if points[0].low is None:
        return None
    return np.abs([[point.value - point.low for point in points], [point.high - point.value for point in points]])


def _relation(comparison: Comparison) -> str:
    """Return the words between what a line stands for and what it is compared with."""
    if not comparison.measure.symmetric:
        return "predicted from"
    return "likeness with" if comparison.measure.kind == "similarity" else "distance from"


def _bars_are(comparison: Comparison) -> str:
    n = f"\nn = {comparison.record['n']} images"
    return n + ("\nbars: 95 % intervals" if comparison.record["resamples"] else "")


def _limits(comparison: Comparison, values: np.ndarray) -> tuple[float, float]:
    """Return the ends of the scale: 0 to 1 of a bounded similarity, wider where a score is below 0."""
    measure = comparison.measure
    high = measure.high if np.isfinite(measure.high) else float(np.nanmax(values))
    return min(0.0, float(np.nanmin(values))), high if measure.kind == "similarity" else float(np.nanmax(values))


def _scale(panels: Sequence[Axes], comparison: Comparison) -> None:
    if comparison.measure.kind == "similarity" and np.isfinite(comparison.measure.high):
        for axes in panels:
            axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.03 * comparison.measure.high)
    else:
        for axes in panels:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _share_labels(figure: Figure, panels: Sequence[Axes], x: str, y: str) -> None:
    figure.supxlabel(x)
    figure.supylabel(y)


def _colours(comparison: Comparison) -> Mapping[str, str]:
    return dict(zip(comparison.regimes, cycle(COLOURS), strict=False))


def _marker(comparison: Comparison, regime: str) -> str:
    place = comparison.regimes.index(regime)
    # where colours come again, they come with other markers
    return MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]


def _network(layer: Layer) -> str:
    return layer.regime if layer.seed is None else f"{layer.regime} s{layer.seed}"


def _unit(comparison: Comparison) -> str:
    return f"{comparison.measure.name} ({comparison.measure.kind})"
