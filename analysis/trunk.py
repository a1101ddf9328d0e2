"""The picture of one rule: a trunk of stages, the losses above it, and how far each loss's gradient runs back.

Drawing for `localsim.analysis.plots.gradient_paths`. Lengths are in hundredths of an inch, pixels of a README's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from localsim.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 900
LEGEND_HEIGHT = 44
LEFT, RIGHT = 232, 878  # the trunk lies between
BOX = 34
BASE = 16  # below the boxes
CLEAR = 19  # from the boxes to the first lane
LANE = 23
INK, GREY = "#222222", "#9a9a9a"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def checked(matrix: np.ndarray | Sequence[Sequence[float]], taps: Sequence[int], names: Sequence[str]) -> np.ndarray:
    """Return the weights as a `(taps, stages)` array, or say why they do not fit their taps and stage names."""
    weights = np.asarray(matrix, dtype=float)
    if not len(taps) and not weights.size:
        weights = np.zeros((0, len(names)))
    fits = len(names) > 0 and weights.shape == (len(taps), len(names)) and all(0 <= tap < len(names) for tap in taps)
    if not fits:
        raise UserError(
            f"a credit matrix of shape {np.shape(matrix)} does not fit taps {list(taps)} and {len(names)} stage names"
        )
    return weights


def tint(stage: int, strength: float) -> tuple[float, float, float]:
    """Return the colour of losses that read this stage, mixed with white: 0 is white, 1 the full colour."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(COLOURS[stage % len(COLOURS)]))
    return red, green, blue


def lowest(weights: np.ndarray, tap: int, top: int) -> int:
    """Return the lowest stage that a tap's gradient travels to; the stage it reads where it changes none."""
    return int(next(iter(np.flatnonzero(weights[tap])), top))


def lanes(weights: np.ndarray, taps: Sequence[int]) -> list[int]:
    """Return the height of each tap's arrow: above every earlier arrow that shares a stage with it.

    Later taps read later stages, so a loss never has an arrow of a lower lane between itself and its stage.
    """
    spans = [(lowest(weights, tap, top), top) for tap, top in enumerate(taps)]
    placed: list[int] = []
    for low, top in spans:
        below = [lane for lane, (a, b) in zip(placed, spans, strict=False) if a <= top and low <= b]
        placed.append(max(below, default=-1) + 1)
    return placed


def stops(weights: np.ndarray, taps: Sequence[int]) -> list[int]:
    """Return the stages, from 0, above which no gradient comes down; none where nothing is trained anyway."""
    if not weights.any():
        return []
    spans = [(lowest(weights, tap, top), top) for tap, top in enumerate(taps)]
    return [stage for stage in range(weights.shape[1] - 1) if not any(low <= stage < top for low, top in spans)]


def height(weights: np.ndarray, taps: Sequence[int]) -> int:
    """Return the height of a rule's row."""
    return BASE + BOX + CLEAR + LANE * max(1, 1 + max(lanes(weights, taps), default=0)) + 6


def draw(axes: Axes, title: str, weights: np.ndarray, taps: Sequence[int], names: Sequence[str]) -> None:
    """Draw one rule into axes whose units are hundredths of an inch."""
    num_stages = len(names)
    gap = min(26.0, 0.22 * (RIGHT - LEFT) / num_stages)
    width = (RIGHT - LEFT - gap * (num_stages - 1)) / num_stages
    lefts = [LEFT + stage * (width + gap) for stage in range(num_stages)]
    _title(axes, title)
    for stage, left in enumerate(lefts):
        _stage(axes, stage, left, width, weights[:, stage], taps, names[stage])
        if stage + 1 < num_stages:
            _arrow(axes, left + width + 1, left + width + gap - 1, BASE + BOX / 2, GREY, 1.2, head=min(7.0, gap / 2))
    for stage in stops(weights, taps):
        middle = lefts[stage] + width + gap / 2
        top = BASE + BOX + CLEAR + 9
        for offset in (-1.8, 1.8):
            axes.plot([middle + offset] * 2, [BASE + BOX / 2 + 9, top], color=INK, linewidth=1.5, label=f"stop {stage}")
    heaviest = weights.max(initial=0) or 1
    for tap, (top, lane) in enumerate(zip(taps, lanes(weights, taps), strict=True)):
        _loss(axes, tap, weights[tap] / heaviest, top, BASE + BOX + CLEAR + LANE * lane, lefts, width)


def draw_legend(axes: Axes, rules: Sequence[tuple[np.ndarray, Sequence[int]]]) -> None:
    """Draw the key of the marks that these rules use."""
    y, x = LEGEND_HEIGHT / 2 - 2, float(LEFT)
    if any(taps for _, taps in rules):
        _marker(axes, x + 8, y, "#666666", 8.5)
        x = _words(axes, x + 24, y, "loss")
        _arrow(axes, x + 42, x, y, "#666666", 3.2, head=9)
        x = _words(axes, x + 52, y, "may change these stages")
    if any(_passes(weights, taps).any() for weights, taps in rules):
        axes.plot([x, x + 40], [y, y], color="#666666", linewidth=1.6, linestyle=(0, (1, 1.4)))
        x = _words(axes, x + 50, y, "only passes through")
    if any(stops(weights, taps) for weights, taps in rules):
        for offset in (0, 3.6):
            axes.plot([x + offset] * 2, [y - 8, y + 8], color=INK, linewidth=1.5)
        _words(axes, x + 14, y, "stop-gradient")


def _passes(weights: np.ndarray, taps: Sequence[int]) -> np.ndarray:
    """Return where a tap's gradient goes through a stage that it does not change, as a `(taps, stages)` mask."""
    stages = np.arange(weights.shape[1])
    rows = [(stages >= lowest(weights, tap, top)) & (stages <= top) for tap, top in enumerate(taps)]
    changes = weights.any(axis=1, keepdims=True)
    return np.array(rows, dtype=bool).reshape(weights.shape) & (weights == 0) & changes


def _title(axes: Axes, title: str) -> None:
    name, _, rest = title.partition("\n")
    middle = BASE + BOX / 2
    axes.text(18, middle + (8 if rest else 0), name, fontsize=12, fontweight="bold", va="center")
    if rest:
        axes.text(18, middle - 9, rest, fontsize=8.5, color="#555555", va="center")


def _stage(
    axes: Axes, stage: int, left: float, width: float, column: np.ndarray, taps: Sequence[int], name: str
) -> None:
    """Draw a stage as a box striped in the colours of the losses that change it, in proportion to their credit."""
    from matplotlib.patches import FancyBboxPatch, Rectangle

    shape = "round,pad=0,rounding_size=5"
    box = FancyBboxPatch((left, BASE), width, BOX, boxstyle=shape, facecolor="#f0f0f0", edgecolor="none")
    axes.add_patch(box)
    y = float(BASE)
    for tap in map(int, np.flatnonzero(column)):
        share = BOX * column[tap] / column.sum()
        stripe = Rectangle((left, y), width, share, color=tint(taps[tap], 0.28), linewidth=0)
        stripe.set_label(f"tap {tap} changes stage {stage}")
        axes.add_patch(stripe)
        stripe.set_clip_path(box)
        y += share
    edge = FancyBboxPatch((left, BASE), width, BOX, boxstyle=shape, facecolor="none", edgecolor="#777777", linewidth=1)
    axes.add_patch(edge)
    fits = 1.1 * width / max(3, len(name))  # the largest font size, in points, at which the name stays inside
    words, size = (name, min(10.0, fits)) if fits >= 7 else (str(stage + 1), 8.0)
    axes.text(left + width / 2, BASE + BOX / 2, words, ha="center", va="center", fontsize=size)


def _loss(axes: Axes, tap: int, share: np.ndarray, top: int, y: float, lefts: Sequence[float], width: float) -> None:
    """Draw a loss, its stem to the stage it reads, and its arrow back over the stages it may change."""
    colour = COLOURS[top % len(COLOURS)]
    x = lefts[top] + width - min(12.0, width / 2)
    axes.plot([x, x], [BASE + BOX, y], color=colour, linewidth=1.1, label=f"tap {tap} reads {top}")
    changed = np.flatnonzero(share)
    for stage in range(top, int(changed[0]) - 1 if changed.size else top, -1):
        start = x if stage == top else lefts[stage + 1]
        label = f"tap {tap} stage {stage}"
        if share[stage] == 0:
            axes.plot([start, lefts[stage]], [y, y], color=colour, linewidth=1.6, linestyle=(0, (1, 1.4)), label=label)
        elif stage == changed[0]:
            _arrow(axes, start, lefts[stage], y, colour, 1 + 2.2 * share[stage], head=9, label=label)
        else:
            axes.plot([start, lefts[stage]], [y, y], color=colour, linewidth=1 + 2.2 * share[stage], label=label)
    _marker(axes, x, y, colour, min(8.5, width / 4))


def _arrow(
    axes: Axes, start: float, end: float, y: float, colour: str, linewidth: float, *, head: float, label: str = ""
) -> None:
    """Draw a horizontal line from `start` that ends in a filled head whose tip is at `end`."""
    from matplotlib.patches import Polygon

    back = end + head if end < start else end - head
    axes.plot([start, back], [y, y], color=colour, linewidth=linewidth, label=label, solid_capstyle="butt")
    tip = [(end, y), (back, y + 0.55 * head), (back, y - 0.55 * head)]
    axes.add_patch(Polygon(tip, facecolor=colour, edgecolor="none", zorder=3))


def _marker(axes: Axes, x: float, y: float, colour: str, radius: float) -> None:
    from matplotlib.patches import Circle

    axes.add_patch(Circle((x, y), radius, facecolor=colour, edgecolor="white", linewidth=1.2, zorder=4))
    axes.text(x, y - 0.3, "L", color="white", ha="center", va="center", fontsize=radius, fontweight="bold", zorder=5)


def _words(axes: Axes, x: float, y: float, words: str) -> float:
    """Write words from `x` on and return where the next mark may begin."""
    axes.text(x, y, words, fontsize=9, va="center")
    return x + 6.6 * len(words) + 22  # DejaVu Sans at 9 points: 6.6 hundredths a letter, near enough
