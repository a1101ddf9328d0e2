"""What all figures share: the style, how they are made without pyplot, and how they are written."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from localsim.errors import one_of
from localsim.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
"""Okabe & Ito's, which stay apart for colour-blind readers; with `MARKERS` also in grey."""
MARKERS = "osD^vP*X"
STYLE = Path(__file__).with_name("localsim.mplstyle")

P = ParamSpec("P")
R = TypeVar("R")


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function under the project's style and put matplotlib's settings back afterwards."""

    @wraps(function)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import style

        with style.context(STYLE):
            return function(*args, **kwargs)

    return in_style


@styled
def save(figure: Figure, path: str | Path) -> None:
    """Write a figure atomically in the format that the suffix names; the same figure gives the same bytes.

    Raises:
        UserError: the suffix is none of `FORMATS`.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise one_of("figure format", path.suffix, FORMATS)
    stamp = {".png": None, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[path.suffix]
    write_atomically(path, lambda temporary: figure.savefig(temporary, metadata=stamp))


def new_figure(width: float, height: float, *, axes: bool = True) -> tuple[Figure, Axes]:
    """Return a figure of a size in inches, and its axes where there is to be one pair that fills it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, (figure.add_subplot() if axes else None)  # pyright: ignore[reportReturnType]


def panel_grid(figure: Figure, number: int, columns: int, *, share_y: bool = False) -> list[Axes]:
    """Return panels side by side with one scale of x, and of y if that is shared; x is numbered below the lowest."""
    grid = figure.subplots(-(-number // columns), min(number, columns), sharex=True, sharey=share_y, squeeze=False)
    for axes in list(grid.flat)[number:]:
        axes.set_axis_off()
    for axes in list(grid.flat)[max(0, number - columns) : number]:
        axes.tick_params(labelbottom=True)
    return list(grid.flat)[:number]


def percent(value: float, _place: float = 0) -> str:
    """Return a share as per cent, for the ticks of an axis."""
    return f"{100 * value:.3g} %"


def in_order(axes: Axes, labels: Sequence[str]) -> list[Any]:
    """Return the legend handles of these labels, in this order, those that exist."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    return [handles[label] for label in labels if label in handles]


def wrapped(words: str) -> str:
    """Return the name of a regime in lines that fit beside panels."""
    return textwrap.fill(words, 22)
