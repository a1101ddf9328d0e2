"""Figures of what rules may change and of what was learned.

Every function returns a `matplotlib.figure.Figure` and leaves pyplot alone, so nothing opens a window or stays open;
`save` writes it to a file. In a notebook `%matplotlib inline` makes a returned figure show itself. The look is in
`localsim.mplstyle`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from localsim.analysis import trunk
from localsim.analysis.canvas import FORMATS, STYLE, in_order, new_figure, percent, save, styled
from localsim.analysis.comparison_plots import (
    comparison_figures,
    similarity_map,
    similarity_matrix,
    similarity_over_training,
    similarity_profiles,
)
from localsim.analysis.depth_plots import geometry_by_stage, update_alignment
from localsim.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "FORMATS", "STYLE", "accuracy_by_stage", "comparison_figures", "contact_sheet", "credit_matrix",
    "geometry_by_stage", "gradient_paths", "loss_curves", "running_median", "save", "similarity_map",
    "similarity_matrix", "similarity_over_training", "similarity_profiles", "update_alignment",
]  # fmt: skip


@styled
def accuracy_by_stage(
    table: Mapping[str, Sequence[tuple[str, float, float, float]]], *, title: str, chance: float | None = None
) -> Figure:
    """Draw probe accuracy against stage: a line per series, an interval bar per point, chance as a dashed line.

    Args:
        table: `{series: [(stage name, accuracy, low, high), ...]}`, shares from 0 to 1. Stages stand in the order in
            which the series first name them.
        title: of the figure.
        chance: accuracy of guessing, where it should be drawn.

    Raises:
        UserError: there is nothing to draw.
    """
    if not any(table.values()):
        raise UserError("a plot of accuracy by stage needs at least one series with at least one stage")
    stages = list(dict.fromkeys(stage for points in table.values() for stage, *_ in points))
    figure, axes = new_figure(max(5.0, 2.6 + 0.75 * len(stages)), 3.6)
    drawn = {series: points for series, points in table.items() if points}
    for number, (series, points) in enumerate(drawn.items()):
        # side by side within a stage, so that bars of equal accuracy stay visible
        aside = 0.06 * (number - (len(drawn) - 1) / 2)
        x = [stages.index(stage) + aside for stage, *_ in points]
        accuracy, low, high = np.array([values for _, *values in points], dtype=float).T
        axes.errorbar(
            x, accuracy, yerr=np.abs([accuracy - low, high - accuracy]), fmt="o-", elinewidth=1.2, label=series
        )
    if chance is not None:
        axes.axhline(chance, color="#666666", linestyle="--", linewidth=1.2, label="chance")
    axes.set_xticks(range(len(stages)), stages)
    axes.set_xlim(-0.4, len(stages) - 0.6)
    axes.yaxis.set_major_formatter(percent)
    axes.set(title=title, xlabel="stage", ylabel="accuracy")
    # in the order drawn: by default lines without bars (chance) would come first
    figure.legend(handles=in_order(axes, [*drawn, "chance"]), loc="outside right upper")
    return figure


@styled
def loss_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the loss of every tap against the step: faint as measured, strong as a running median.

    Args:
        rows: metrics in the order of training, `{"step": int, "loss": {tap: float}}`; rows without a loss (of epochs
            or probes) are passed over. The median runs over about a twentieth of a tap's points, centred.

    Raises:
        UserError: no row holds a loss.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for tap, loss in row.get("loss", {}).items():
            curves.setdefault(tap, []).append((row["step"], loss))
    if not curves:
        raise UserError("the metrics hold no losses to draw")
    figure, axes = new_figure(6.5, 3.6)
    for tap, points in curves.items():
        step, loss = np.array(points, dtype=float).T
        (raw,) = axes.plot(step, loss, alpha=0.25, linewidth=0.9)
        median = running_median(loss, len(loss) // 40)
        # a single point is no line
        axes.plot(step, median, color=raw.get_color(), label=tap, marker="o" if len(step) == 1 else None)
    axes.set(title="Training loss", xlabel="step", ylabel="loss")
    figure.legend(loc="outside right upper")
    return figure


def running_median(values: np.ndarray, half: int) -> np.ndarray:
    """Return the median of each of `values`, `(n,)`, and its `half` neighbours to either side, of fewer near the ends.

    NaN (a loss that diverged) is left out; where there is nothing else the median is NaN.
    """
    padded = np.pad(np.asarray(values, dtype=float), half, constant_values=np.nan)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        return np.nanmedian(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


@styled
def contact_sheet(originals: Any, views: Sequence[Any], labels: Sequence[object] | None = None) -> Figure:
    """Draw images in columns, each above its augmented views.

    Args:
        originals: `(n, 3, H, W)` tensor or array, uint8 or float.
        views: tensors of n images each, of any height and width: the first views of all images, the second, ...
            Floats outside [0, 1] (normalised images) are stretched per tensor and channel to fill [0, 1].
        labels: n titles of the columns.

    Raises:
        UserError: the images are not colour images or not equally many.
    """
    sheets = [_pixels(images) for images in (originals, *views)]
    counts = [len(sheet) for sheet in sheets] + ([] if labels is None else [len(labels)])
    if len(set(counts)) != 1 or counts[0] == 0:
        raise UserError(f"a contact sheet needs equally many images, views and labels, at least one, not {counts}")
    names = ["image", *(f"view {number}" for number in range(1, len(sheets)))]
    figure, _ = new_figure(1.1 * counts[0] + 0.6, 1.15 * len(sheets) + 0.3, axes=False)
    grid = figure.subplots(len(sheets), counts[0], squeeze=False)
    for row, (name, sheet) in enumerate(zip(names, sheets, strict=True)):
        for column, image in enumerate(sheet):
            axes = grid[row, column]
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if column == 0:
                axes.set_ylabel(name)
            if row == 0 and labels is not None:
                axes.set_title(str(labels[column]), fontsize=9, fontweight="normal", loc="center")
    return figure


@styled
def credit_matrix(
    matrix: np.ndarray | Sequence[Sequence[float]], taps: Sequence[int], stage_names: Sequence[str], title: str = ""
) -> Figure:
    """Draw a credit matrix: a row per tap, a column per stage, a filled cell with its weight where the tap has credit.

    Pale cells could have credit and have none; a stage above its tap has no cell at all.

    Args:
        matrix: `(taps, stages)` weights, zero above each tap's stage.
        taps: the stage, from 0, that each tap reads.
        stage_names: names of the columns.
        title: of the figure.

    Raises:
        UserError: the three do not fit together.
    """
    from matplotlib.patches import FancyBboxPatch

    weights = trunk.checked(matrix, taps, stage_names)
    num_taps, num_stages = weights.shape
    figure, axes = new_figure(1.6 + 0.6 * num_stages, 1.1 + 0.6 * max(num_taps, 1))
    for (tap, stage), weight in np.ndenumerate(weights):
        if stage > taps[tap]:
            continue
        colour = trunk.tint(taps[tap], 0.25 + 0.75 * weight / weights.max()) if weight else "#f2f2f2"
        cell = FancyBboxPatch(
            (stage - 0.4, tap - 0.4),
            0.8,
            0.8,
            boxstyle="round,pad=0,rounding_size=0.1",
            facecolor=colour,
            edgecolor="none",
            label=f"tap {tap} stage {stage}",
        )
        axes.add_patch(cell)
        if weight:
            ink = "white" if weight / weights.max() > 0.6 else "#222222"
            axes.text(stage, tap, f"{weight:.3g}", ha="center", va="center", color=ink, fontweight="bold")
    if not num_taps:
        axes.text((num_stages - 1) / 2, 0, "no tap: nothing is trained", ha="center", va="center")
    axes.set(xlim=(-0.6, num_stages - 0.4), ylim=(max(num_taps, 1) - 0.4, -0.6), aspect="equal")
    slant = {} if max(map(len, stage_names)) < 8 else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(num_stages), stage_names, **slant)
    axes.set_yticks(range(num_taps), [f"tap on {stage_names[stage]}" for stage in taps])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.set_title(title)
    axes.set_xlabel("may change stage")
    return figure


@styled
def gradient_paths(
    rules: Sequence[tuple[str, np.ndarray | Sequence[Sequence[float]], Sequence[int], Sequence[str]]],
) -> Figure:
    """Draw rules as gradient arrows on one trunk, a row each: how far does each loss's signal travel?

    Stages run from left to right. A loss stands above the end of the stage it reads; its arrow runs back over the
    stages it may change, thicker for more credit, dotted where the gradient only passes through. A stage wears the
    colours of the losses that change it. Bars stand where no gradient crosses.

    Args:
        rules: `(title, matrix, taps, stage_names)` of each row, as in `credit_matrix`; what follows the first line
            break of a title is set smaller below it.

    Raises:
        UserError: there is no rule, or one does not fit together.
    """
    if not rules:
        raise UserError("a picture of gradient paths needs at least one rule")
    checked = [
        (title, trunk.checked(matrix, taps, names), list(taps), list(names)) for title, matrix, taps, names in rules
    ]
    heights = [trunk.height(weights, taps) for _, weights, taps, _ in checked]
    total = sum(heights) + trunk.LEGEND_HEIGHT
    figure, _ = new_figure(trunk.WIDTH / 100, total / 100, axes=False)
    figure.set_layout_engine("none")
    top = total
    for (title, weights, taps, names), height in zip(checked, heights, strict=True):
        top -= height
        trunk.draw(_canvas(figure, top, height, total), title, weights, taps, names)
    trunk.draw_legend(_canvas(figure, 0, trunk.LEGEND_HEIGHT, total), [(w, t) for _, w, t, _ in checked])
    return figure


def _canvas(figure: Figure, bottom: float, height: float, total: float) -> Axes:
    """Return axes without decoration whose units are hundredths of an inch of the figure."""
    axes = figure.add_axes((0, bottom / total, 1, height / total))
    axes.set(xlim=(0, trunk.WIDTH), ylim=(0, height))
    axes.set_axis_off()
    return axes


def _pixels(images: Any) -> np.ndarray:
    """Return images `(n, 3, H, W)` of any kind as float `(n, H, W, 3)` in [0, 1]."""
    array = np.asarray(images.detach().cpu() if hasattr(images, "detach") else images)
    if array.ndim != 4 or array.shape[1] != 3:
        raise UserError(f"images must be (n, 3, height, width), not {array.shape}")
    array = array.transpose(0, 2, 3, 1)
    if array.dtype == np.uint8:
        return array / 255
    array = array.astype(float)
    low, high = array.min(axis=(0, 1, 2), initial=np.inf), array.max(axis=(0, 1, 2), initial=-np.inf)
    if low.min() >= 0 and high.max() <= 1:
        return array
    return (array - low) / np.maximum(high - low, 1e-12)
