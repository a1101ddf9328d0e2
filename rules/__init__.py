"""What is learned where: the rules, one file each, and the objectives, readouts, heads and noise they are made of.

To add a rule, write a file like `blockwise.py` with one `RULE`. Inside localsim, name it here; outside, give its path
(`--rule path/to/file.py`), or declare it in your package as an entry point of the group `localsim.rules`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from localsim.errors import UserError, one_of
from localsim.rng import key
from localsim.rules import (
    auglocal,
    blockwise,
    chunked,
    clapp,
    clapp_dfb,
    deep_supervision,
    end_to_end,
    greedy_infomax,
    greedy_supervised,
    infopro,
    interlocking,
    layerwise,
    lcl,
    loco,
    lpl,
    man,
    predsim,
    stopgrad_overlap,
    untrained,
)
from localsim.rules.rule import Rule as Rule

_OWN = (
    untrained, end_to_end, blockwise, layerwise, lcl, loco, stopgrad_overlap, chunked, interlocking, deep_supervision,
    greedy_infomax, clapp, clapp_dfb, lpl, greedy_supervised, predsim, infopro, auglocal, man,
)  # fmt: skip


def own_rules() -> list[Rule]:
    """Return localsim's own rules, without those of other packages."""
    return [module.RULE for module in _OWN]


if TYPE_CHECKING:
    rules: dict[str, Rule]
    """All rules by name: localsim's own, those of installed packages, and those loaded from files so far."""

_rules = {rule.name: rule for rule in own_rules()}
_sources = dict.fromkeys(_rules, "localsim")
_asked_packages = False


def __getattr__(name: str) -> dict[str, Rule]:
    # on first use and not on import: an installed package's rule imports this package itself
    if name == "rules":
        return _all_rules()
    raise AttributeError(f"module 'localsim.rules' has no attribute {name!r}")


def get_rule(name: str | Path) -> Rule:
    """Return the rule called `name`, or the one in the Python file of that path, which is executed.

    Raises:
        UserError: there is no such rule, or the file holds none.
    """
    name = str(name)
    if name.endswith(".py"):
        return load_rule(name)
    rules = _all_rules()
    if name not in rules:
        raise UserError(f"{one_of('rule', name, rules)}; a rule of your own goes by its file: --rule path/to/rule.py")
    return rules[name]


def load_rule(path: str | Path) -> Rule:
    """Execute the Python file at `path` and add its `RULE` to the rules, under its own name.

    Raises:
        UserError: the file cannot be executed, holds no `RULE`, or its name is taken by another rule.
    """
    _all_rules()  # so that the name of an installed package's rule is known to be taken
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no rule file {path}")
    # files of one name in different folders are different modules
    place = key(str(path.resolve())) % 16**8
    spec = importlib.util.spec_from_file_location(f"localsim_rule_{path.stem}_{place:08x}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the names in annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file may raise
        raise UserError(f"{path} cannot be executed: {type(error).__name__}: {error}") from error
    return _add(getattr(module, "RULE", None), str(path.resolve()))


def _add(rule: object, source: str) -> Rule:
    if not isinstance(rule, Rule):
        raise UserError(f"{source} holds no rule: it needs RULE = Rule(name=..., ...)")
    if not isinstance(rule.name, str) or not re.fullmatch(r"[\w-]+", rule.name):
        raise UserError(f"{source}: the rule is called {rule.name!r}; allowed: letters, digits, _ and -")
    if _sources.get(rule.name, source) != source:
        raise UserError(f"{source}: the name {rule.name!r} is taken by a rule of {_sources[rule.name]}; choose another")
    _rules[rule.name] = rule
    _sources[rule.name] = source
    return rule


def _all_rules() -> dict[str, Rule]:
    global _asked_packages
    if not _asked_packages:
        _asked_packages = True
        _add_installed()
    return _rules


def _add_installed() -> None:
    for entry in entry_points(group="localsim.rules"):
        try:
            _add(entry.load(), f"entry point {entry.name} = {entry.value}")
        except Exception as error:  # a broken package must not keep the others from working
            warnings.warn(f"rule {entry.name} of an installed package is left out: {error}", stacklevel=2)
