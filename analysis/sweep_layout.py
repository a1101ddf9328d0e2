"""What the figures of sweeps share: which setting is told apart how, and what is written beside the panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from localsim.analysis.canvas import COLOURS
from localsim.analysis.sweeps import Cell, SweepTable, control

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PREFERRED = ("granularity", "reach", "rule")  # which setting is laid out first


@dataclass(frozen=True)
class Layout:
    """The settings that vary: along x (or in colours), along y (or in markers), and those left for panels."""

    x: str | None
    y: str | None
    rest: tuple[str, ...]

    @classmethod
    def of(cls, table: SweepTable, most: int | None = None) -> Layout:
        """Lay out what varies; a setting of more than `most` values is no good along y and has panels."""
        names = [name for name in _PREFERRED if name in table.factors]
        names += [name for name in table.factors if name not in names]
        if most and len(names) > 1 and len(table.levels(names[1])) > most:
            return cls(names[0], None, tuple(names[1:]))
        return cls(names[0] if names else None, names[1] if len(names) > 1 else None, tuple(names[2:]))


def panels_of(
    table: SweepTable, cells: Sequence[Cell], names: Sequence[str], between: str = ", "
) -> Mapping[str, list[Cell]]:
    """Return the cells by what a panel's title says of them: its values of the named settings."""
    panels: dict[str, list[Cell]] = {}
    order = [[level(value) for value in table.levels(name)] for name in names]
    ranked = sorted(
        cells, key=lambda c: [o.index(level(c.settings[name])) for o, name in zip(order, names, strict=True)]
    )
    for cell in ranked:
        panels.setdefault(between.join(setting(name, cell.settings[name]) for name in names), []).append(cell)
    return panels


def colour_scale(values: Sequence[float]) -> Any:
    """Return a scale of colours that ends a little beyond the values, so that lines at its ends are seen."""
    from matplotlib.colors import Normalize

    low, high = min(values), max(values)
    return Normalize(low - 0.02 * (high - low), high)


def level_colours(levels: Sequence[Any]) -> list[Any]:
    """Return a colour per level: from dark to light where levels have an order, else colours that stay apart."""
    from matplotlib import colormaps

    if all(isinstance(level, int | float) for level in levels) or len(levels) > len(COLOURS):
        return [colormaps["viridis"](0.9 * place / max(1, len(levels) - 1)) for place in range(len(levels))]
    return list(COLOURS[: len(levels)])


def impossible(table: SweepTable, chosen: Mapping[str, Any]) -> bool:
    """Return whether a reach is larger than the number of stages that it would have to fit in."""
    reach = chosen.get("reach", table.rows[0].reach if len(table.levels("reach")) == 1 else None)
    granularity = chosen.get(
        "granularity", table.rows[0].granularity if len(table.levels("granularity")) == 1 else None
    )
    stages = {row.num_stages for row in table.rows if row.granularity == granularity}
    return isinstance(reach, int) and bool(stages) and reach > max(stages)


def draw_legend(figure: Figure, table: SweepTable, cells: Sequence[Cell], handles: Mapping[str, Any]) -> None:
    """Draw a legend beside the panels, which says of how many images and seeds the points are and what bars are."""
    most, row = max(len(cell.rows) for cell in cells), table.rows[0]
    lines = [f"{row.backbone} on {row.data}", f"n = {row.n_test} test images", "pale: 95 % intervals over images"]
    if most > 1:
        lines.append(f"large: mean of up to {most} seeds\nsmall: each seed")
    if any(cell.over_seeds for cell in cells):
        lines.append("bars: 95 % t intervals over seeds")
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", title="\n".join(lines),
                  title_fontsize=8.5, fontsize=8.5, alignment="left")  # fmt: skip


def made_of(table: SweepTable) -> str:
    """Return what was trained, for how long, and tested on how many images."""
    row, steps = table.rows[0], sorted({row.steps for row in table.rows})
    shown = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    return f"{row.backbone} on {row.data}, {shown} steps; n = {row.n_test} test images"


def control_in_words(cells: Sequence[Cell], name: str) -> str:
    """Return the accuracy of a control, from that of one cell to that of another where cells have several."""
    found = sorted(own.mean for cell in cells if (own := control([cell], name)))
    if not found:
        return ""
    shown = dict.fromkeys(f"{100 * value:.1f}" for value in (found[0], found[-1]))
    return f"{name} {' to '.join(shown)} %"


def probed(probe: str, features: str) -> str:
    """Return what an axis of accuracy is called."""
    name = {"linear": "linear", "knn": "k-NN"}[probe]
    return f"accuracy, {name} probe" + ("" if features == "raw" else f" of {features}")


def series(name: str | None, cell: Cell) -> str:
    """Return what a line is called: the value of the setting that lines differ in, the rule where there is none."""
    return cell.rows[0].rule if name is None else setting(name, cell.settings[name])


def setting(name: str, value: Any) -> str:
    """Return a setting and its value; rules have names that need no other."""
    return level(value) if name == "rule" else f"{name} {level(value)}"


def level(value: Any) -> str:
    """Return the value of a setting in words; None is what a rule has where nothing is chosen."""
    return "the rule's own" if value is None else str(value)


def counted(number: int, what: str) -> str:
    """Return how many there are of something, in words."""
    return f"{number} {what}{'s' * (number > 1)}"
