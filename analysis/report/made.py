"""Section: what was run, and what the runs differ in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from localsim.analysis.report.elements import Note, Part, Section, Table, Text
from localsim.analysis.report.reported import Reported, by_regime
from localsim.config import FREE, Config
from localsim.errors import UserError

HIDDEN = ("data", "data_root")
"""Settings that may hold a path of this machine."""
_HOW_MUCH: dict[str, Callable[[Config], str]] = {
    "backbone": lambda config: f"{config.backbone}, {config.image_size} px",
    "data": lambda config: shown_setting("data", config.data),
    "training images": lambda config: "all" if config.train_images is None else str(config.train_images),
    "epochs": lambda config: str(config.epochs),
    "batch": lambda config: str(config.batch_size),
    "optimiser": lambda config: config.optimizer,
}


def section(runs: Sequence[Reported]) -> Section:
    """Return the section."""
    parts: list[Part] = [_runs_table(runs)]
    differ = _differences(runs)
    if differ is not None:
        parts.append(differ)
    elif len(runs) > 1:
        parts.append(Text("All settings of these runs are the same."))
    for run in runs:
        if "unfinished" in run.state:
            done = f"of its newest checkpoint, after {run.run.step} steps"
            parts.append(Note(f"{run.label} has not come to its end: what is said of it below is {done}."))
        if not run.usable:
            parts.append(Note(f"{run.label} has no checkpoint: there is no trained network to look at."))
    return Section(
        "runs", "What was run",
        f"{_count(len(runs), 'run')} of {_count(len(by_regime(runs)), 'regime')}: runs of one regime differ in their "
        "seed alone. Settings are the resolved ones; steps done are those of the newest checkpoint, out of those that "
        "the schedule has. What a single run reaches is one draw: where a regime has one seed, nothing here says how "
        "far another seed would lie from it.",
        parts,
    )  # fmt: skip


def shown_setting(name: str, value: Any) -> str:
    """Return a setting as text, of a path only its last part."""
    if name in HIDDEN and isinstance(value, str) and Path(value).is_absolute():
        return f".../{Path(value).name}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _runs_table(runs: Sequence[Reported]) -> Table:
    """Return a row for each run; what all have in common is said once, in the caption."""
    common, apart = [], []
    for name, value in _HOW_MUCH.items():
        found = [value(run.run.config) for run in runs]
        if len(set(found)) == 1:
            common.append(f"{name} {found[0]}")
        else:
            apart.append((name, found))
    rows = []
    for number, run in enumerate(runs):
        try:
            cut = [str(len(run.units)), str(run.credit.num_taps),
                   f"{run.credit.longest_path(run.units)} of {sum(run.units)}"]  # fmt: skip
        except UserError:
            cut = ["–", "–", "–"]
        planned = "?" if run.planned is None else run.planned
        rows.append([
            run.name, run.regime, str(run.run.config.seed), *cut, *(found[number] for _, found in apart),
            f"{run.run.step} of {planned}" if run.trains else "0", run.state,
        ])  # fmt: skip
    head = ["run", "regime", "seed", "stages", "taps", "gradient path", *(name for name, _ in apart), "steps", "state"]
    shared = f" The same for all: {'; '.join(common)}." if common else ""
    return Table(
        f"The runs.{shared} Gradient path: the most unit blocks that a gradient crosses, of those that there are.",
        head, rows, names=(0, 1, *range(6, 6 + len(apart)), len(head) - 1),
    )  # fmt: skip


def _differences(runs: Sequence[Reported]) -> Table | None:
    """Return the settings in which the runs differ, those that decide numbers only; None where there are none."""
    plain = [run.run.config.to_json() for run in runs]
    apart = [name for name in plain[0] if name not in FREE and any(one[name] != plain[0][name] for one in plain)]
    if not apart:
        return None
    rows = [[name, *(shown_setting(name, one[name]) for one in plain)] for name in apart]
    return Table(
        f"The {_count(len(apart), 'setting')} in which the runs' configurations differ; all others are the same.",
        ["setting", *(run.name for run in runs)], rows, names=range(len(runs) + 1),
    )  # fmt: skip


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
