"""Whether the files of a checkpoint are still what was written: their SHA-256 sums, kept in its `progress.json`.

A flipped bit in the numbers of a safetensors file cannot be seen otherwise. Checkpoints of versions of localsim that
kept no sums are read unchecked. `sha256sum` prints the same sums.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from localsim.errors import UserError
from localsim.files import cause, read_json, write_json

RECORD = "progress.json"
_STEP = re.compile("[0-9]+")


def write_record(folder: Path, step: int) -> None:
    """Write the record of a checkpoint folder whose other files are complete: its step, and the sum of every file."""
    sums = {file.name: _sum(file) for file in sorted(folder.iterdir()) if file.name != RECORD}
    write_json(folder / RECORD, {"step": step, "sha256": sums})


def check(file: Path) -> None:
    """Raise UserError if the folder of a file has a record, and the file is not what it says."""
    expected = _sums(file.parent).get(file.name)
    try:
        whole = expected is None or _sum(file) == expected
    except OSError as error:
        raise UserError(f"{file} cannot be read: {cause(error)}") from None
    if not whole:
        raise UserError(f"{file} cannot be read: it is not what was written (its SHA-256 is not that in {RECORD})")


def is_whole(folder: Path) -> bool:
    """Return whether every file that the record of a checkpoint folder names is what was written."""
    try:
        for name in _sums(folder):
            check(folder / name)
    except UserError:
        return False
    return True


def step_folders(root: Path) -> list[Path]:
    """Return the folders of steps, the newest last."""
    found = [folder for folder in root.glob("[0-9]*") if _STEP.fullmatch(folder.name) and folder.is_dir()]
    return sorted(found, key=lambda folder: int(folder.name))


def set_damaged_aside(path: Path) -> None:
    """Rename checkpoints that are not what was written where an older one is whole, and warn of each.

    Training goes on from the older one to the same bits. Where none is whole, all stay: reading them says so.
    """
    found = step_folders(path / "checkpoints")[::-1]
    damaged = list(takewhile(lambda folder: not is_whole(folder), found))
    for folder in damaged if len(damaged) < len(found) else []:
        names = (folder.with_name(f"damaged-{folder.name}" + f"-{n}" * (n > 1)) for n in count(1))
        aside = folder.rename(next(name for name in names if not name.exists()))
        warnings.warn(
            f"checkpoint {folder} is damaged and was set aside as {aside.name}; the run goes on from step "
            f"{int(found[len(damaged)].name)}",
            stacklevel=2,
        )


def way_on(folder: Path) -> str:
    """Say how to go on without a checkpoint; nothing of other folders."""
    if folder.parent.name != "checkpoints" or not _STEP.fullmatch(folder.name):
        return ""
    older = [other for other in step_folders(folder.parent) if int(other.name) < int(folder.name)]
    from_there = f"go on from step {int(older[-1].name)}" if older else "start anew, for no older checkpoint is kept"
    return f"; remove {folder} to {from_there}"


def _sums(folder: Path) -> Mapping[str, Any]:
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else {}
    sums = record.get("sha256", {}) if isinstance(record, Mapping) else None
    # the record of a stranger's folder must not name files elsewhere
    told = isinstance(sums, Mapping) and all(Path(name).name == name for name in sums)
    if _STEP.fullmatch(folder.name) and record and not (told and record.get("step") == int(folder.name)):
        raise UserError(f"{folder / RECORD} cannot be read: it is not the record of step {int(folder.name)}")
    return sums if told else {}  # type: ignore[return-value]


def _sum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
