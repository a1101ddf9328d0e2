"""What a sweep asks for: lists of values, the cells of their product, their names, and the run folders they have."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localsim import runs
from localsim.config import FREE, Config
from localsim.credit import Credit
from localsim.errors import UserError, one_of
from localsim.partition import GRANULARITIES
from localsim.presets import resolve
from localsim.rng import key
from localsim.rules import get_rule

Values = dict[str, list[Any]]
"""Several values of some fields of `Config`, by name: what one call of `localsim.sweep` asks for."""

_LISTS = tuple(f.name for f in dataclasses.fields(Config) if str(f.type).startswith("list"))
_ORDER = ("seed", *(name for name in Config.names() if name != "seed"))
_LONGEST_VALUE, _LONGEST_NAME = 40, 150  # of 255 bytes that file systems allow


@dataclass(frozen=True)
class Cell:
    """One configuration of a sweep and the run folder that holds it, or will.

    Attributes:
        config: resolved.
        path: the run folder.
        label: what varies besides the seed, as in a name.
        rule_file: the absolute path of a rule of one's own; None for a rule with a name.
    """

    config: Config
    path: Path
    label: str
    rule_file: str | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name


def as_values(settings: Mapping[str, Any]) -> tuple[Values, dict[str, Any]]:
    """Return the values of every setting as a list and, apart, the settings that change no numbers, as they are.

    A list, tuple or range means several values; for a field whose value is itself a list, a list of lists does. What
    depends on the working directory (files of rules, folders of images) is made absolute; None is not given.

    Raises:
        UserError: no field of this name, no such rule, or several values of a field in `FREE`.
    """
    values: Values = {}
    free: dict[str, Any] = {}
    for name, given in settings.items():
        if name not in Config.names():
            raise one_of("setting", name, Config.names())
        if given is None:
            continue
        several = _several(name, given)
        if not several:
            raise UserError(f"{name} is an empty list; allowed: one value or more")
        plain = [_plain(name, value) for value in several]
        if name in FREE:
            if len(plain) > 1:
                raise UserError(f"{name} is {given!r}, but does not change what a run learns; give one value")
            free[name] = plain[0]
        else:
            values[name] = [value for i, value in enumerate(plain) if value not in plain[:i]]
    return values, free


def _several(name: str, given: Any) -> list[Any]:
    if not isinstance(given, list | tuple | range):
        return [given]
    if name in _LISTS and not (given and isinstance(given[0], list | tuple)):
        return [given]
    return list(given)


def _plain(name: str, value: Any) -> Any:
    """Return a value as JSON can hold it, meaning the same in any working directory."""
    if isinstance(value, Credit):
        return value.to_config()
    if name == "granularity" and isinstance(value, str) and value not in GRANULARITIES:
        raise one_of("granularity", value, ("a number", *GRANULARITIES))  # a slip, not a cell to leave out
    if name == "rule":
        get_rule(value)  # an unknown one is an error, not a cell to leave out
        return str(Path(value).resolve()) if str(value).endswith(".py") else str(value)
    if name in ("data", "data_root") and value is not None:
        return getattr(resolve(overrides={name: value}), name)
    return list(value) if isinstance(value, tuple) else value


def covers(new: Values, old: Values) -> bool:
    """Return whether everything that `old` asks for is asked for by `new`."""
    return new.keys() == old.keys() and all(value in new[name] for name in old for value in old[name])


# -- the product ------------------------------------------------------------------------------------------------------


def make_cells(
    asked: Sequence[Values], free: Mapping[str, Any], out: Path
) -> tuple[list[Cell], dict[str, list[str]], list[str]]:
    """Return the cells of all products, in order, each in its folder in `out`.

    Seeds are outermost, so that an interrupted sweep holds whole comparisons; then come the fields in the order of
    `Config`, the last one changing fastest. A run folder in `out` whose configuration is equal but for fields in `FREE`
    is a cell's, whatever its name. Where several rules are asked for, an option that has no meaning for one of them is
    not given to it.

    Returns:
        The cells; what is left out, as names by reason; and a sentence for every rule that has no use for an option.

    Raises:
        UserError: a folder of a cell's name holds another configuration.
    """
    existing = {run.path: run.config for run in runs_in(out)}
    claimed = {path.name: config for path, config in existing.items()}
    cells: list[Cell] = []
    left_out: dict[str, list[str]] = {}
    notes: list[str] = []
    for values in asked:
        varied = [name for name in values if len(values[name]) > 1]
        names = [name for name in _ORDER if name in values]
        rules = {rule: get_rule(rule) for rule in values.get("rule", ["blockwise"])}
        for combination in itertools.product(*(values[name] for name in names)):
            given = dict(zip(names, combination, strict=True))
            file = given.get("rule", "blockwise")
            rule = rules[file]
            dropped = [n for n in rule.meaningless if given.get(n) is not None and len(rules) > 1]
            notes += [f"{rule.name} has no {n} to choose: {rule.meaningless[n].partition(';')[0]}" for n in dropped]
            named = {n: given[n] if n != "rule" else rule.name for n in varied if n not in dropped}
            said = label(named) or rule.name
            kept = {n: value for n, value in given.items() if n not in ("rule", "preset", *dropped)}
            try:
                config = resolve(rule.name, given.get("preset"), {**kept, **free})
            except UserError as error:
                left_out.setdefault(str(error), []).append(said)
                continue
            if any(same(config, cell.config) for cell in cells):
                continue
            path = _place(config, out / folder_name(named, config.seed), existing, claimed)
            claimed[path.name] = config
            cells.append(Cell(config, path, said, file if file.endswith(".py") else None))
    return cells, left_out, list(dict.fromkeys(notes))


def runs_in(out: Path) -> list[runs.Run]:
    """Return the run folders in a folder, in the order of their names."""
    return [runs.load_run(file.parent) for file in sorted(Path(out).glob("*/config.json"))]


def same(here: Config, there: Config) -> bool:
    """Return whether two configurations give the same numbers: whether they are equal but for fields in `FREE`."""
    return _difference(here, there) is None


def _difference(here: Config, there: Config) -> str | None:
    names = (name for name in Config.names() if name not in FREE)
    return next((name for name in names if getattr(here, name) != getattr(there, name)), None)


def _place(config: Config, path: Path, existing: Mapping[Path, Config], claimed: Mapping[str, Config]) -> Path:
    equal = [folder for folder, there in existing.items() if same(config, there)]
    if equal:
        # of copies, the one that is furthest
        return max(equal, key=lambda folder: ((folder / "probe.json").exists(), runs.checkpoint_step(folder)))
    if path.name in claimed:
        there = claimed[path.name]
        field = _difference(config, there)
        assert field is not None
        raise UserError(
            f"{path} holds {field}={getattr(there, field)!r}, but {getattr(config, field)!r} is asked for; "
            "give both values to have both, or choose another --out"
        )
    return path


# -- names ------------------------------------------------------------------------------------------------------------


def folder_name(varied: Mapping[str, Any], seed: int) -> str:
    """Return the name of a cell's folder: what varies in its sweep, then the seed; `granularity4-reach2-seed0`.

    Different values have different names. They hold lower-case letters, digits and `_ . + = -`; a value that is
    long, or has other characters, is cut short and gets a code of six digits. `+` stands for a comma, `=` for a colon.
    """
    name = "-".join(part for part in (label(varied), f"seed{seed}") if part)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 20]}.{_code(name)}-seed{seed}"


def label(varied: Mapping[str, Any]) -> str:
    """Return what varies, but for the seed, as part of a name."""
    return "-".join(_part(name, varied[name]) for name in _ORDER[1:] if name in varied)


def _part(name: str, value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{name}{value!r}"
    if isinstance(value, str) or value is None:
        text = "default" if value is None else value
    else:
        text = json.dumps(value, sort_keys=True)
    if isinstance(value, list) and not any(isinstance(part, list | dict) for part in value):
        text = ",".join(str(part) for part in value)
    plain = text.replace(",", "+").replace(":", "=")
    if not re.fullmatch(r"[a-z0-9_.,:]+", text) or len(plain) > _LONGEST_VALUE:
        # of a path only its end says something
        words = re.sub(r"[^a-z0-9]+", "_", text.lower().rstrip("/").rpartition("/")[2])[:16].strip("_")
        plain = f"{words}.{_code(json.dumps(value, sort_keys=True))}"
    return plain if name == "rule" else f"{name}_{plain}"


def _code(text: str) -> str:
    return f"{key(text) % 16**6:06x}"


# -- what is left out -------------------------------------------------------------------------------------------------


def in_sentences(left_out: Mapping[str, Iterable[str]], shown: int = 3) -> list[str]:
    """Return a sentence per reason, which names the first few cells that it leaves out."""
    sentences = []
    for reason, names in left_out.items():
        different = list(dict.fromkeys(names))  # not once per seed
        first, rest = different[:shown], len(different) - shown
        more = f" and {rest} more are" if rest > 0 else " are" if len(first) > 1 else " is"
        sentences.append(f"{', '.join(first)}{more} left out: {reason}")
    return sentences
