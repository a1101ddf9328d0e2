"""What tables of results share: choosing rows, and writing them down."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

Row = TypeVar("Row")


def matching(rows: Iterable[Row], fields: Mapping[str, Any]) -> list[Row]:
    """Return the rows whose attributes have these values."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in fields.items())]


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Return rows as comma-separated values, one header line; None is an empty field.

    Args:
        rows: with the same columns.
        columns: those to write, in order; by default all of the first row, which then has to have all there are.
    """
    out = io.StringIO()
    names = list(rows[0]) if columns is None else columns
    extra = "raise" if columns is None else "ignore"
    writer = csv.DictWriter(out, names, extrasaction=extra, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
