"""Short programs to run or to copy and change: `python -m localsim.analysis.scripts.NAME RUN... [--out DIR]`.

A copied file runs by itself, `python my_copy.py RUN...`, wherever localsim is installed. What the programs share is
here: how they are started, and what they leave behind.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsim.analysis import plots
from localsim.analysis.tables import as_csv
from localsim.errors import UserError
from localsim.files import write_text
from localsim.runs import Run, load_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAKE = (
    "`localsim run --rule blockwise --granularity 4 --out runs/blockwise` and "
    "`localsim run --rule end_to_end --out runs/end_to_end` make two, in about five minutes each"
)
Result = tuple[str, list[dict[str, Any]], "Figure"]
"""What a program finds: a text to print, rows to keep as a table, and a figure."""


def start(find: Callable[[list[Run]], Result], file: str, argv: Sequence[str] | None = None) -> None:
    """Open the runs named on the command line, print what `find` makes of them, and keep table and figure.

    Ends with exit code 2 and one sentence where a run is missing, something does not fit, or a file to be written is
    there already.

    Args:
        find: from runs to text, rows and figure.
        file: the program's `__file__`, whose name the table and the figures get.
        argv: the command line, by default the process's own.
    """
    name = Path(file).stem
    parser = argparse.ArgumentParser(prog=name, allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="*", help="run folders")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("figures"), help="where table and figures go "
                        "(default: figures)")  # fmt: skip
    parser.add_argument("--data-root", metavar="DIR", help="where the runs' named data set lies now")
    given = parser.parse_args(argv)
    files = {suffix: given.out / f"{name}{suffix}" for suffix in (".csv", ".png", ".svg")}
    try:
        if there := [str(path) for path in files.values() if path.exists()]:
            raise UserError(f"{there[0]} exists already; choose another --out, or move it away")
        text, rows, figure = find([run.moved(data_root=given.data_root) for run in opened(given.runs)])
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    write_text(files[".csv"], as_csv(rows))
    for suffix in (".png", ".svg"):
        plots.save(figure, files[suffix])
    print(f"{text}\n\ntable and figure in {given.out}: {', '.join(path.name for path in files.values())}")


def opened(paths: Sequence[str]) -> list[Run]:
    """Return the runs in these folders; UserError that says how to make some, where there is none."""
    if not paths:
        raise UserError(f"no run is named; {MAKE}")
    try:
        return [load_run(path) for path in paths]
    except UserError as error:
        raise UserError(f"{error}; {MAKE}") from None


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows that have the same columns as an aligned table; of `x`, `x_low` and `x_high` it makes one column."""
    names = [name for name in rows[0] if not name.endswith(("_low", "_high"))]
    cells = [names, *([_cell(row, name) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def _cell(row: Mapping[str, Any], name: str) -> str:
    value, low, high = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
    shown = "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
    return shown if low is None or high is None else f"{shown} [{low:.3f}, {high:.3f}]"
