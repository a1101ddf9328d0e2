"""Checks of the options that heads share."""

from __future__ import annotations

from localsim.errors import UserError


def check_whole(head: str, option: str, value: object, low: int) -> None:
    """Raise UserError unless `value` is a whole number from `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(f"{head}: {option} is {value!r}; allowed: whole numbers from {low}")


def check_fraction(head: str, option: str, value: object) -> None:
    """Raise UserError unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"{head}: {option} is {value!r}; allowed: numbers from 0 to 1")


def check_flag(head: str, option: str, value: object) -> None:
    """Raise UserError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{head}: {option} is {value!r}; allowed: true, false")
