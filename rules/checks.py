"""Checks of the options that heads and objectives take: whatever is out of range is told with what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

from localsim.errors import UserError


def check_number(name: str, option: str, value: object, *, above_zero: bool = False) -> None:
    """Raise UserError unless an option of head or objective `name` is a finite number >= 0 (> 0 if `above_zero`)."""
    if not _is_number(value) or not 0 <= value < math.inf or (above_zero and value == 0):
        raise UserError(f"{name}: {option} is {value!r}; allowed: numbers {'>' if above_zero else '>='} 0")


def check_fraction(name: str, option: str, value: object, *, below_one: bool = False) -> None:
    """Raise UserError unless an option of head or objective `name` is a number in [0, 1] ([0, 1) if `below_one`)."""
    if not _is_number(value) or not 0 <= value <= 1 or (below_one and value == 1):
        raise UserError(f"{name}: {option} is {value!r}; allowed: numbers from 0 to {'below 1' if below_one else '1'}")


def check_count(name: str, option: str, value: object, *, at_least: int) -> None:
    """Raise UserError unless an option of head or objective `name` is an integer of `at_least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise UserError(f"{name}: {option} is {value!r}; allowed: whole numbers from {at_least}")


def check_choice(name: str, option: str, value: object, allowed: Sequence[object]) -> None:
    """Raise UserError unless an option of head or objective `name` is one of `allowed`; 1 does not pass for True."""
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise UserError(f"{name}: {option} is {value!r}; allowed: {', '.join(map(str, allowed))}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
