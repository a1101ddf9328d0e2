"""Tables of sweeps: what every stage of many runs learned, beside what it cost and how far gradients travelled."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from localsim.analysis.controls import CONTROLS
from localsim.analysis.statistics import COVERAGE
from localsim.analysis.sweep_rows import SETTINGS, SweepRow, rows_of
from localsim.analysis.tables import as_csv
from localsim.errors import UserError
from localsim.files import write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from localsim.runs import Run

SEEDS_FOR_INTERVAL = 3
"""From how many seeds on their spread gives a t interval; two are shown as they are."""
_FIGURES = ("accuracy_map", "accuracy_against_path", "accuracy_against_memory", "accuracy_profiles")


@dataclass(frozen=True)
class Cell:
    """Runs that differ in nothing but their seeds, at one stage by one probe.

    Attributes:
        settings: what tells the cell from others of the sweep.
        rows: one per seed, by seed.
    """

    settings: Mapping[str, Any]
    rows: tuple[SweepRow, ...]

    @property
    def each(self) -> list[float]:
        """The accuracy of every seed."""
        return [row.accuracy for row in self.rows]

    @property
    def mean(self) -> float:
        """Accuracy on average over seeds."""
        return fmean(self.each)

    @property
    def over_images(self) -> tuple[float, float]:
        """The 95 % interval of the mean over test images, these seeds given: the mean of their intervals.

        All seeds are tested on the same images. Were all right on the same ones, this is the interval of the mean;
        else that is narrower, for the deviation of a mean is at most the mean of the deviations.
        """
        return fmean(row.low for row in self.rows), fmean(row.high for row in self.rows)

    @property
    def over_seeds(self) -> tuple[float, float] | None:
        """The 95 % t interval of the mean over seeds; None for fewer than `SEEDS_FOR_INTERVAL`.

        mean +- t(0.975, s - 1) * (standard deviation over seeds) / sqrt(s),    for s seeds, cut to 0 and 1
        """
        if len(self.rows) < SEEDS_FOR_INTERVAL:
            return None
        from scipy.stats import t

        half = float(t.ppf((1 + COVERAGE) / 2, len(self.rows) - 1)) * stdev(self.each) / len(self.rows) ** 0.5
        return max(self.mean - half, 0.0), min(self.mean + half, 1.0)

    @property
    def path(self) -> int:
        """The longest gradient path, in unit blocks."""
        return self.rows[0].path

    @property
    def held_mib(self) -> float | None:
        """MiB that autograd held at the peak of a step, the largest over seeds; None where nothing was trained."""
        return max((row.held_bytes / 2**20 for row in self.rows if row.held_bytes), default=None)


def control(cells: Sequence[Cell], name: str) -> Cell | None:
    """Return a control of some cells as a cell of its own, one row per seed; None if they have none, or several.

    Runs of one seed start from the same trunk, however it is cut: at one depth they share an untrained network.

    Args:
        cells: of one depth.
        name: `untrained` or `calibrated`.
    """
    found: dict[int, SweepRow] = {}
    for row in (row for cell in cells for row in cell.rows):
        ends = {"accuracy": row.value(name), "low": row.value(f"{name}_low"), "high": row.value(f"{name}_high")}
        if ends["accuracy"] is None or found.setdefault(row.seed, replace(row, **ends)).accuracy != ends["accuracy"]:
            return None
    return Cell({}, tuple(found[seed] for seed in sorted(found))) if found else None


@dataclass(frozen=True)
class SweepTable:
    """Every probe of every stage of the runs of a sweep; prints itself as a line per cell."""

    rows: tuple[SweepRow, ...]

    def select(self, **fields: Any) -> list[SweepRow]:
        """Return the rows with these values, e.g. `select(granularity=4, probe="linear", features="raw", stage=4)`.

        Raises:
            UserError: there is no such column.
        """
        return [row for row in self.rows if all(row.value(name) == value for name, value in fields.items())]

    @property
    def factors(self) -> tuple[str, ...]:
        """The settings that tell cells apart: those that vary, but the seed and what the rule decides by itself."""
        return tuple(name for name in self._varying() if name == "rule" or not self._follows_rule(name))

    @property
    def following(self) -> tuple[str, ...]:
        """The settings that vary, but have one value for each rule: whatever they do counts as the rule's."""
        return tuple(name for name in self._varying() if name != "rule" and self._follows_rule(name))

    def _varying(self) -> list[str]:
        names = [name for name in (*SETTINGS, *self.rows[0].settings) if name != "seed"]
        return [name for name in names if len(self.levels(name)) > 1]

    def _follows_rule(self, name: str) -> bool:
        pairs = {(row.rule, _encoded(row.value(name))) for row in self.rows}
        return len(self.levels("rule")) == len(pairs)

    def levels(self, name: str) -> list[Any]:
        """Return the values of a setting: numbers in order, granularities by their stages, others as they come."""
        first: dict[str, SweepRow] = {}
        for row in self.rows:
            first.setdefault(_encoded(row.value(name)), row)
        found = [row.value(name) for row in first.values()]
        if name == "granularity":
            return sorted(found, key=lambda value: first[_encoded(value)].num_stages)
        if all(value is None or isinstance(value, int | float) for value in found):
            return sorted(found, key=lambda value: (value is not None, value or 0))
        return found

    def cells(self, *, stage: int | None = None, probe: str = "linear", features: str = "raw") -> list[Cell]:
        """Return the cells of the sweep, in the order of the levels of its factors.

        Args:
            stage: from 1; by default the last of each run. Runs with fewer stages are left out.
            probe, features: which, see `ProbeRow`.

        Raises:
            UserError: there are none.
        """
        found: dict[tuple[str, ...], list[SweepRow]] = {}
        for row in self.select(probe=probe, features=features):
            if row.stage == (row.num_stages if stage is None else stage):
                found.setdefault(tuple(_encoded(row.value(name)) for name in self.factors), []).append(row)
        if not found:
            raise UserError(f"the table has no {probe} probe of {features} features at this stage")
        places = [[_encoded(value) for value in self.levels(name)] for name in self.factors]
        return [
            Cell(
                {name: rows[0].value(name) for name in self.factors},
                tuple(sorted(rows, key=lambda row: row.seed)),
            )
            for _, rows in sorted(
                found.items(), key=lambda item: [p.index(value) for p, value in zip(places, item[0], strict=True)]
            )
        ]

    def figures(self) -> dict[str, Figure]:
        """Return the figures that make sense for what varies, by name, see `localsim.analysis.sweep_plots`."""
        from localsim.analysis.sweep_plots import sweep_figures

        return sweep_figures(self)

    def to_csv(self) -> str:
        """Return the rows as comma-separated values, one header line, a column per setting that varies."""
        return as_csv([{name: _encoded(value) for name, value in row.flat().items()} for row in self.rows])

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rows as plain dictionaries."""
        return [asdict(row) for row in self.rows]

    @classmethod
    def from_csv(cls, path: str | Path) -> SweepTable:
        """Return the table that `to_csv` wrote down, which needs no runs; UserError if the file holds another."""
        try:
            lines = list(csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8"))))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the table of a sweep cannot be read from {path}: {error}") from None
        columns = [name for name in SweepRow.__dataclass_fields__ if name != "settings"]
        missing = [name for name in columns if not lines or name not in lines[0]]
        if missing:
            raise UserError(f"{path} is not the table of a sweep: it lacks {', '.join(missing[:3])}")
        decoded = [{name: _decoded(text) for name, text in line.items()} for line in lines]
        return cls(
            tuple(
                SweepRow(
                    **{name: line[name] for name in columns},
                    settings={name: value for name, value in line.items() if name not in columns},
                )
                for line in decoded
            )
        )

    def save(self, folder: str | Path) -> Path:
        """Write `table.csv`, `table.json`, `summary.md` and `figures/*.png` to a folder and return it.

        What an earlier call wrote there is replaced, for a sweep grows.

        Raises:
            UserError: the folder holds a run, or another table of this name.
        """
        from localsim.analysis.canvas import save

        path = Path(folder)
        if (path / "config.json").exists():
            raise UserError(f"{path} is a run folder; choose another for the table of a sweep")
        if (path / "table.csv").exists():
            SweepTable.from_csv(path / "table.csv")
        drawn = self.figures()
        for name in _FIGURES:
            if name not in drawn:  # of a sweep that varied in something else
                (path / "figures" / f"{name}.png").unlink(missing_ok=True)
        for name, figure in drawn.items():
            save(figure, path / "figures" / f"{name}.png")
        pictures = "\n\n".join(f"![{name.replace('_', ' ')}](figures/{name}.png)" for name in drawn)
        write_json(path / "table.json", self.to_json())
        write_text(path / "summary.md", f"# Sweep\n\n{self}\n\n{pictures}\n")
        write_text(path / "table.csv", self.to_csv())
        return path

    def __str__(self) -> str:
        cells, one = self.cells(), self.rows[0]
        steps, batch, size, n_train = (
            _range([row.value(name) for row in self.rows]) for name in ("steps", "batch_size", "image_size", "n_train")
        )
        fitted = f"fitted to {n_train} images, " if n_train else ""
        head = (
            f"Linear probe of the raw output of the last stage, {fitted}accuracy in % on {one.n_test} test images, "
            f"chance {100 * one.chance:.3g}; {one.backbone} on {one.data}, {size} px, {steps} steps of {batch} images"
        )
        intervals = any(cell.over_seeds for cell in cells)
        notes = [
            "over images: 95 % interval of the mean of these seeds over test images; the mean of their intervals, and "
            "the true one is no wider",
            f"over seeds: 95 % t interval, from {SEEDS_FOR_INTERVAL} seeds on" if intervals else
            f"no interval over seeds: it takes {SEEDS_FOR_INTERVAL} or more",
            "path: the longest a gradient travels, in unit blocks; held: activations at the peak, measured",
        ]  # fmt: skip
        if self.following:
            notes.append(f"rules differ in more than their credit: {', '.join(self.following)} vary with the rule")
        lines = [dict(self._line(cell, intervals)) for cell in cells]
        return "\n".join([head, "", *_markdown(lines), "", *(f"- {note}" for note in notes)])

    def _line(self, cell: Cell, intervals: bool) -> Iterator[tuple[str, str]]:
        yield from ((name, "-" if value is None else str(value)) for name, value in cell.settings.items())
        yield "accuracy", f"{100 * cell.mean:.1f}"
        yield "by seed", "; ".join(f"{row.seed}: {100 * row.accuracy:.1f}" for row in cell.rows)
        yield "over images", _ends(cell.over_images)
        if intervals:
            yield "over seeds", _ends(cell.over_seeds)
        for name in CONTROLS:
            own = control([cell], name)
            yield name, "-" if own is None else f"{100 * own.mean:.1f}"
        yield "path", str(cell.path)
        yield "held MiB", "-" if cell.held_mib is None else f"{cell.held_mib:.1f}"
        yield "heads (M)", f"{cell.rows[0].tap_parameters / 1e6:.2f}"


def sweep_table(runs: Sequence[Run | str | Path]) -> SweepTable:
    """Return the probes of all stages of some runs as a tidy table, with what varies between the runs and their costs.

    Args:
        runs: runs that were probed, or their folders; of one data set and backbone.

    Raises:
        UserError: there are no runs, one has no probes, two are the same but for their folders, or they do not
            compare: other data, backbones or ways of probing.
    """
    return SweepTable(tuple(rows_of(runs)))


def _encoded(value: Any) -> str:
    """Return a value as a field of a table: text as it is, nothing for None, else JSON."""
    if value is None:
        return ""
    plain = isinstance(value, str) and value and not _is_json(value)
    return value if plain else json.dumps(value, sort_keys=True)


def _decoded(text: str) -> Any:
    if not text:
        return None
    return json.loads(text) if _is_json(text) else text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def _ends(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _range(values: Sequence[int | None]) -> str:
    known = sorted({value for value in values if value is not None})
    return "" if not known else str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"


def _markdown(lines: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a table as Markdown whose columns also stand below each other as plain text."""
    names = list(lines[0])
    widths = [max(len(name), *(len(line[name]) for line in lines)) for name in names]
    cells = [names, *([line[name] for name in names] for line in lines)]
    shown = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return [shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]]
