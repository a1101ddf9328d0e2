"""Prints the tables of docs/scaling.md: `python docs/scaling_table.py`, less than a minute on one core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from localsim.machines import machine
from localsim.placement import flops_by_stage, place_stages
from localsim.presets import resolve
from localsim.scaling import SPENT, Prediction, predict
from localsim.step_profile import profiles_of_shares


@dataclass(frozen=True)
class Learning:
    """A line of a table for every way to use a number of processes: how many groups of stages."""

    words: str
    rule: str
    ways: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)


BACKPROPAGATION = Learning("end-to-end, one piece", "end_to_end", (1,), {"granularity": 1})
MAIN = (
    BACKPROPAGATION,
    Learning("end-to-end, sums by unit block", "end_to_end", (1,), {"granularity": "block"}),
    Learning("blockwise, 4 stages", "blockwise", (1, 4), {"granularity": 4}),
    Learning("blockwise, 8 stages", "blockwise", (1, 8), {"granularity": 8}),
    Learning("LoCo, 4 stages", "loco", (1, 4), {"granularity": 4}),
)
SMALL = (
    BACKPROPAGATION,
    Learning("blockwise, 2 stages", "blockwise", (1, 2), {"granularity": 2}),
    Learning("blockwise, 4 stages", "blockwise", (1, 2), {"granularity": 4}),
    Learning("LoCo, 4 stages", "loco", (1, 2), {"granularity": 4}),
)
NUMBERS = (8, 64, 512)
CORE = "4.3e10,9.5e8,6.2e-5"
"""One core and gloo, near to what `here` has once said of the machine of docs/performance.md."""
TABLES = (
    # title, learning, preset, numbers of processes, machine
    ("The main configuration on `a100`:", MAIN, "imagenet", NUMBERS, "a100"),
    ("The main configuration on `a100-ethernet`:", MAIN, "imagenet", NUMBERS, "a100-ethernet"),
    ("The preset `quick` on `4.3e10,9.5e8,6.2e-5`:", SMALL, "quick", (2, 4), CORE),
)
QUICK = ((BACKPROPAGATION, "imagenet", NUMBERS, "a100"), (SMALL[1], "quick", (2, 4), CORE))
"""What the test of the page makes anew."""
HEADS = ("learning", "processes", "parallel", "groups", "ms/step", "images/s", "efficiency", *SPENT,
         "messages", "MB sent", "GiB")  # fmt: skip


def lines(learning: Learning, preset: str, numbers: Sequence[int], machines: Sequence[str]) -> dict[str, list[str]]:
    """Return the lines of Markdown for one kind of learning, by machine."""
    config = resolve(learning.rule, preset, learning.settings)
    used = [(number, groups) for number in numbers for groups in learning.ways]
    shared = profiles_of_shares(config, {1, *(number // groups for number, groups in used)})
    found = {}
    for name in machines:
        here = machine(name, config)
        (whole,) = shared[1]
        alone = predict(whole, here, [range(len(whole.stages))]).images_per_second
        found[name] = []
        for number, groups in used:
            (profile,) = shared[number // groups]
            made = predict(profile, here, place_stages(flops_by_stage([profile]), groups))
            found[name].append(row(learning.words, made, alone))
    return found


def row(words: str, made: Prediction, alone: float) -> str:
    """Return a line; `alone` is the images per second of one process."""
    cells = [
        words,
        str(made.processes),
        made.parallel,
        "+".join(str(len(group)) for group in made.groups),
        number(1000 * made.seconds),
        f"{made.images_per_second:,.{0 if made.images_per_second >= 1000 else 1}f}",
        f"{made.images_per_second / (made.processes * alone):.0%}",
        *(number(1000 * seconds) for seconds in made.spent.values()),
        str(sum(message.number for message in made.messages)),
        number(sum(message.bytes for message in made.messages) / 1e6),
        number(made.memory / 2**30),
    ]
    return "| " + " | ".join(cells) + " |"


def number(value: float) -> str:
    """Return a number with about three digits."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def heads() -> list[str]:
    """Return the first two lines of every table."""
    return ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]


def main() -> None:
    """Print all tables, one after the other."""
    made: dict[tuple[str, str], dict[str, list[str]]] = {}
    for title, learnings, preset, numbers, name in TABLES:
        on = [other for _, _, same, _, other in TABLES if same == preset]
        for one in learnings:
            if (one.words, preset) not in made:
                made[one.words, preset] = lines(one, preset, numbers, on)
        rows = [line for one in learnings for line in made[one.words, preset][name]]
        print("\n".join([title, "", *heads(), *rows, ""]))


if __name__ == "__main__":
    main()
