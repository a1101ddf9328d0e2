"""The one error class for what a user can put right: its message is a sentence to show, not a traceback."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LONGEST = 1000  # characters, of which some hundreds list what is allowed


class UserError(ValueError):
    """What was asked cannot be done; the message names the offending value and what is allowed.

    The command line prints it on stderr without a traceback and exits with code 2. What a file holds can be of any
    length: where it makes the message longer than a reader reads, the middle is left out.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 400]} ... {text[-395:]}"


class TrainingFailed(UserError):
    """Training cannot go on: the message says why, of which tap or file, and which checkpoint is kept."""


class ProcessLost(TrainingFailed):
    """Another process of the run is gone or does not answer; the message says how to go on."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM while training: the step was finished and, unless a tap may be collapsing, kept."""


def one_of(what: str, value: object, allowed: Iterable[object]) -> UserError:
    """Return the error for a `value` of `what` that is not among the `allowed` ones."""
    return UserError(f"unknown {what} {value!r}; allowed: {', '.join(str(a) for a in allowed)}")


def out_of_memory(error: Exception) -> bool:
    """Return whether memory has run out; torch says so in its own ways on the CPU and on an accelerator."""
    told = re.search("out of memory|not enough memory|allocate memory", str(error))
    return isinstance(error, MemoryError) or told is not None
