"""What `localsim compare` and `localsim brain` share: opening runs, choosing a folder, and one table after another."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from localsim.analysis.catalogue import NAMED
from localsim.analysis.regimes import LAYERS
from localsim.errors import UserError
from localsim.rng import key
from localsim.runs import Run, load_run


class Table(Protocol):
    """What is printed, and saved with its figures in a folder of its own."""

    def save(self, folder: str | Path) -> Path: ...


Kind = TypeVar("Kind")
Made = TypeVar("Made", bound=Table)


def open_runs(
    runs: Sequence[str], *, rule: str | None, data: str | None, data_root: str | None, device: str | None
) -> list[Run | str]:
    """Return runs, where their data and device are now, and names of networks as they are.

    Args:
        runs: folders, or names of networks as `features` takes them.
        rule: the file of a rule of one's own; executed.
        data, data_root, device: where the runs' images lie and the networks run now.
    """
    if rule is not None:
        from localsim.rules import get_rule

        get_rule(rule)
    return [
        path if path.startswith(NAMED) else load_run(path).moved(data=data, data_root=data_root, device=device)
        for path in runs
    ]


def folder_for(parent: str, runs: Sequence[str], out: str | None) -> Path:
    """Return `out`, by default a folder in `parent` that is named after the runs; UserError if there cannot be one."""
    paths = [Path(run) if Path(run).name not in ("", "..") else Path(run).resolve() for run in runs]
    names = "+".join(path.name.replace(":", "-") for path in paths) or "controls"
    # file systems allow names of 255 bytes
    named = names if len(names) <= 100 else f"{names[:90]}-{key(names) % 16**6:06x}"
    folder = Path(parent) / named if out is None else Path(out)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"no folder can be made in {there}; choose another --out")
    return folder


def refuse_existing(path: Path) -> Path:
    """Return a path at which nothing is yet; UserError where something is."""
    if path.exists():
        raise UserError(f"{path} exists already; choose another --out, or move it away")
    return path


def chosen_layers(text: str) -> str | Mapping[str, list[str]]:
    """Return one of `regimes.LAYERS`, or what stands for modules whose names are joined by commas."""
    return text if text in LAYERS else {"modules": text.split(",")}


def chosen_controls(text: str) -> list[str]:
    """Return names that are joined by commas; `none` is none."""
    return [] if text == "none" else text.split(",")


def print_and_save(
    kinds: Iterable[Kind], make: Callable[[Kind, str], Made], folder: Path, cache: str | None, holds: str
) -> list[Made]:
    """Make a table of each kind, print it, and save it in the folder; networks are run once for all of them.

    Args:
        kinds: of tables.
        make: from a kind and a folder for features to a table.
        folder: in which each gets a folder of its own.
        cache: where features are kept for another time; by default only until the last table is made.
        holds: what is in these folders, in words.
    """
    made = []
    with tempfile.TemporaryDirectory() as temporary:
        for kind in kinds:
            began = time.monotonic()
            table: Any = make(kind, cache or temporary)
            kept = table.save(folder)
            print(f"{table}\n\n{time.monotonic() - began:.0f} s; {holds} in {kept}\n")
            made.append(table)
    return made
