"""What the commands' options share: values of `--set`, groups of options that several commands have."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from localsim.errors import UserError


def int_or_word(text: str) -> int | str:
    """Return a number where the text is one, else the text."""
    try:
        return int(text)
    except ValueError:
        return text


def pair(text: str) -> tuple[str, Any]:
    """Return name and value of NAME=VALUE; a value that is JSON is what it says, any other is text.

    Raises:
        UserError: there is no `=`, or the value is null, which would be passed over.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text!r} is not of the form NAME=VALUE")
    try:
        meant = json.loads(value)
    except (ValueError, RecursionError):  # ValueError: no JSON, or a number of thousands of digits
        return name, value
    if meant is None:
        raise UserError(f"--set {text!r} sets nothing; leave it out, or give a value")
    return name, meant


def settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Return what all `--set NAME=VALUE` say, the last of each name; UserError see `pair`."""
    return dict(pair(text) for text in pairs)


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all options of a command by name, those of `--set` among them; UserError for one that is given twice."""
    named = {name: value for name, value in vars(arguments).items() if name not in ("command", "debug", "set")}
    more = settings(arguments.set)
    for name in more:
        if named.get(name) is not None:
            raise UserError(f"{name} is given twice: by --{name.replace('_', '-')} and by --set")
    return {**named, **more}


def add_layers(group: Any) -> None:
    """Add --layers, of the commands that compare layers, to a group of options."""
    group.add_argument("--layers", metavar="WHICH", default="ends",
                       help="ends (default: what ends the backbone's own stages), stages, units, readouts, or modules "
                            "by name: layer2,layer3.0.conv1")  # fmt: skip


def add_where(parser: argparse.ArgumentParser, out: str, metavar: str = "DIR") -> None:
    """Add the options of commands that read runs: where their data lie now, and where results go, `out` in words."""
    where = parser.add_argument_group("where")
    where.add_argument("--rule", metavar="FILE", help="the file of a rule of your own, for runs made with it; executed")
    where.add_argument("--data", metavar="DIR", help="where the runs' folder of images lies now")
    where.add_argument("--data-root", metavar="DIR", help="where the runs' named data set lies now")
    where.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N (default: the runs')")
    where.add_argument("--cache", metavar="DIR", help="keep features there, by their content, for another time")
    where.add_argument("--out", metavar=metavar, help=out)
    add_debug(where)


def add_debug(parser: Any) -> None:
    """Add --debug to a parser or a group of options."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
