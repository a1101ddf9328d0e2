"""Which objective, head and readout every tap has: the rule's, what the user asked for, and what fits together."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from localsim.errors import UserError, one_of
from localsim.rules.heads import HEADS
from localsim.rules.objectives import OBJECTIVES, make_objective
from localsim.rules.rule import Rule

# what a tap reads where only the kind of thing that its head takes is known
_PLAIN_READOUT = {"vector": "global", "map": "map", "patches": "patches"}
_DEFAULT_PATCHES = "16:8"
# objectives that are given a classifier read one logit per class, which these vector heads do not give
_WITHOUT_LOGITS = ("projector", "none")

T = TypeVar("T")


def choose(rule: Rule, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings objective, head, readout, their options and patches, resolved for a rule.

    The rule's head stays as long as it gives what the objective reads; otherwise the objective's own takes its place.
    The rule's readout stays as long as the head takes it. The rule's options go with what they are options of. Images
    are cut into patches if a tap reads patches, and the rule's patches are dropped if a head needs whole images.

    Args:
        rule: where defaults come from.
        given: what the user asked for, by field of `Config`; lists are comma-separated, from the lowest tap up.

    Raises:
        UserError: an unknown name or option, or an objective and a head that do not fit.
    """
    usual = _known(rule.objective, "objective", OBJECTIVES)
    if rule.head is not None:
        _known(rule.head, "head", HEADS)
    objectives = _known(given["objective"], "objective", OBJECTIVES) if "objective" in given else usual
    heads = _known(given["head"], "head", HEADS) if "head" in given else [_head(rule, name) for name in objectives]
    pairs = _together(objectives, heads, "objective", "head")
    for objective, head in pairs:
        if not _suits(objective, head):
            what = "logits" if HEADS[head].gives in _reads(objective) else " or ".join(_reads(objective))
            fitting = ", ".join(name for name in HEADS if _suits(objective, name))
            raise UserError(f"head {head} gives no {what}, which objective {objective} reads; allowed: {fitting}")
    readouts = listed(given["readout"], "readout") if "readout" in given else [_readout(rule, name) for name in heads]
    # a list that was given stays one: whether there are as many taps shows when the network is built
    chosen: dict[str, Any] = {
        what: ",".join(names if what in given else _collapsed(names))
        for what, names in (("objective", objectives), ("head", heads), ("readout", readouts))
    }
    same_objectives = _collapsed(objectives) == _collapsed(usual)
    same_heads = _collapsed(heads) == _collapsed([_head(rule, name) for name in usual])
    asked_of_objective, asked_of_head = given.get("objective_options", {}), given.get("head_options", {})
    ours = merged(rule.settings.get("objective_options", {}) if same_objectives else {}, asked_of_objective)
    theirs = merged(rule.settings.get("head_options", {}) if same_heads else {}, asked_of_head)
    if len(set(objectives)) == len(set(heads)) == 1:
        ours = {**getattr(HEADS[heads[0]], "implies", {}), **ours}
        for option in _shared(objectives[0], heads[0]):
            # said once, meant for both: what the head makes is what the objective reads
            told = {**ours, **theirs, **asked_of_head, **asked_of_objective}
            if option in told and not (option in asked_of_objective and option in asked_of_head):
                ours, theirs = {**ours, option: told[option]}, {**theirs, option: told[option]}
    for place in (0.0, 1.0):
        for objective, head in pairs:
            here = options_at(ours, objective, objectives, place)
            make_objective(objective, here)
            _check_shared(objective, head, here, options_at(theirs, head, heads, place))
    chosen |= {"objective_options": ours, "head_options": theirs}
    return {**chosen, **_patches(rule, given, heads, readouts)}


def listed(text: str, what: str) -> list[str]:
    """Return the names in a comma list; UserError if it is not text, or one of them is empty."""
    names = [name.strip() for name in text.split(",")] if isinstance(text, str) else []
    if not all(names) or not names:
        raise UserError(f"{what} is {text!r}; allowed: a name, or one per tap, comma-separated, from the lowest up")
    return names


def at_tap(names: Sequence[str], tap: int, num_taps: int, what: str) -> str:
    """Return the entry of a tap: the only one, or the tap's own; UserError if there are too few or too many."""
    if len(names) not in (1, num_taps):
        raise UserError(f"{len(names)} {what}s are listed, but there are {num_taps} taps; give one, or one per tap")
    return names[0] if len(names) == 1 else names[tap]


def options_at(options: Mapping[str, Any], name: str, names: Sequence[str], place: float) -> dict[str, Any]:
    """Return the options of one tap's objective or head.

    Args:
        options: by option; where taps differ, by name and then by option. A value {"from": a, "to": b} runs linearly
            from the lowest tap to the highest.
        name: the tap's objective or head.
        names: those of all taps.
        place: 0 for the lowest tap, 1 for the highest.
    """
    if len(set(names)) > 1:
        for key, value in options.items():
            if key not in names or not isinstance(value, Mapping):
                raise UserError(
                    f"options {dict(options)!r} are not understood; where taps differ, allowed: options by name, for "
                    f"{', '.join(dict.fromkeys(names))}"
                )
        options = options.get(name, {})
    return {option: _interpolated(name, option, value, place) for option, value in options.items()}


def _interpolated(name: str, option: str, value: Any, place: float) -> Any:
    if not isinstance(value, Mapping):
        return value
    low, high = value.get("from"), value.get("to")
    if set(value) != {"from", "to"} or type(low) not in (int, float) or type(high) not in (int, float):
        raise UserError(
            f'option {option} of {name} is {dict(value)!r}; allowed: a value, or {{"from": number, "to": number}}'
        )
    return low + place * (high - low)  # type: ignore[operator]


def _known(text: str, what: str, allowed: Mapping[str, Any]) -> list[str]:
    names = listed(text, what)
    for name in names:
        if name not in allowed:
            raise one_of(what, name, allowed)
    return names


def _reads(objective: str) -> list[str]:
    kind: Any = OBJECTIVES[objective]
    return kind.reads.split(" or ")


def _suits(objective: str, head: str) -> bool:
    kind: Any = OBJECTIVES[objective]
    without_logits = kind.head == "classifier" and head in _WITHOUT_LOGITS
    return HEADS[head].gives in _reads(objective) and not without_logits


def _head(rule: Rule, objective: str) -> str:
    kind: Any = OBJECTIVES[objective]
    own = {OBJECTIVES[name].head for name in listed(rule.objective, "objective")}  # type: ignore[attr-defined]
    # a head that the rule's objective has by default anyway goes with that objective
    return kind.head if rule.head is None or rule.head in own or not _suits(objective, rule.head) else rule.head


def merged(usual: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with those that were given in their place, one by one (by name, where taps differ)."""
    result = dict(usual)
    for key, value in given.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and not {"from", "to"} & set(value)
        result[key] = {**result[key], **value} if both else value
    return result


def _shared(objective: str, head: str) -> dict[str, tuple[Any, Any]]:
    """Return the options that an objective and a head both have, with their defaults."""
    kind: Any = OBJECTIVES[objective]
    ours = {field.name: field.default for field in dataclasses.fields(kind)}
    theirs = {name: option.default for name, option in inspect.signature(HEADS[head]).parameters.items()}
    return {name: (ours[name], theirs[name]) for name in ours if name in theirs}


def _check_shared(objective: str, head: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise UserError if objective and head disagree on an option of one name: each would misread the other."""
    for option, (our_default, their_default) in _shared(objective, head).items():
        here, there = ours.get(option, our_default), theirs.get(option, their_default)
        if here != there:
            raise UserError(
                f"{option} is {here} for objective {objective}, but {there} for head {head}; "
                "give it once, in objective_options or head_options"
            )


def _patches(rule: Rule, given: Mapping[str, Any], heads: Sequence[str], readouts: Sequence[str]) -> dict[str, Any]:
    """Return the setting patches where it is not the rule's; UserError if a head needs whole images."""
    whole = [name for name in heads if HEADS[name].takes == "map" or hasattr(HEADS[name], "context")]
    usual = rule.settings.get("patches", "none")
    if "patches" in given:
        patches = given["patches"]
    elif "patches" in readouts:
        patches = _DEFAULT_PATCHES if usual == "none" else usual
    else:
        patches = "none" if whole else usual
    if whole and patches != "none":
        raise UserError(f"head {whole[0]} needs whole images, but patches is {patches}; allowed: none")
    return {} if patches == usual else {"patches": patches}


def _readout(rule: Rule, head: str) -> str:
    takes = HEADS[head].takes
    kind = rule.readout if rule.readout in _PLAIN_READOUT else "vector"
    return rule.readout if kind == takes else _PLAIN_READOUT[takes]


def _together(ours: Sequence[T], theirs: Sequence[T], what: str, other: str) -> list[tuple[T, T]]:
    if 1 not in (len(ours), len(theirs)) and len(ours) != len(theirs):
        raise UserError(f"{len(ours)} {what}s and {len(theirs)} {other}s are listed; give one, or one per tap, of each")
    number = max(len(ours), len(theirs))
    return list(zip([*ours] * (number // len(ours)), [*theirs] * (number // len(theirs)), strict=True))


def _collapsed(names: list[str]) -> list[str]:
    return names[:1] if len(set(names)) == 1 else names
