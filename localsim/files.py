"""Files that are either whole or absent: written beside their place, flushed to disk, then renamed; and JSON."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from localsim.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)` and rename the result to `path`; on failure nothing is left and `path` is as before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix is kept at the end: savefig and others choose their format by it
    temporary = path.with_name(f".{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; UserError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {cause(error)}") from None


def cause(error: BaseException) -> str:
    """Return in one line what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically as indented JSON that refuses NaN."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
