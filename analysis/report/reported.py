"""Runs as a report sees them: with a name to show, and with all that can be read of them without computing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from localsim.analysis.regimes import regime_names
from localsim.analysis.stage_probe import ProbeTable
from localsim.assembly import build_credit, build_trunk, trunk_size
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.monitor import COLLAPSED_RANK
from localsim.partition import CutRow, cut_table
from localsim.runs import Run, opened_run

_STEPS = re.compile(r"^training: \d+ epochs, (?:(\d+) of )?(\d+) steps of ", re.MULTILINE)


@dataclass(frozen=True)
class Reported:
    """A run in a report.

    Attributes:
        run: the run, with data and device where they are now.
        name: its folder, without what lies above: the places of this machine are nobody's business.
        regime: see `regime_names`; runs of one regime differ in seed alone.
        label: regime and seed, and the name where two runs share both.
    """

    run: Run
    name: str
    regime: str
    label: str

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics that hold losses."""
        rows = [row for row in self.run.metrics() if isinstance(row, dict) and isinstance(row.get("step"), int)]
        return [row for row in rows if isinstance(row.get("loss"), dict)]

    @cached_property
    def starts(self) -> list[dict[str, Any]]:
        """What `environment.json` says of every start; UserError where it cannot be read."""
        path = self.run.path / "environment.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        except (OSError, ValueError):
            raise UserError(f"environment.json of {self.name} cannot be read") from None
        return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []

    @cached_property
    def probe(self) -> ProbeTable | None:
        """The stored probe; UserError where it cannot be read."""
        try:
            return self.run.probe()
        except TypeError:  # columns of another version
            raise UserError(f"probe.json of {self.name} is not of this version of localsim") from None

    @cached_property
    def cuts(self) -> list[CutRow]:
        """What every stage is made of; UserError where the configuration means no network."""
        import torch

        with torch.device("meta"):  # shapes are enough: no weights are drawn
            backbone, stages = build_trunk(self.run.config)
        return cut_table(backbone, stages, trunk_size(self.run.config))

    @cached_property
    def credit(self) -> Credit:
        """The credit matrix; UserError where the rule is not known here."""
        return build_credit(self.run.config, len(self.cuts))

    @property
    def units(self) -> list[int]:
        """The unit blocks of every stage."""
        return [row.num_units for row in self.cuts]

    @property
    def trains(self) -> bool:
        """Whether there is anything to train; where nobody can say, yes."""
        try:
            return self.credit.num_taps > 0
        except UserError:
            return True

    @property
    def usable(self) -> bool:
        """Whether there is a network to look at."""
        return self.run.step > 0 or not self.trains

    @cached_property
    def planned(self) -> int | None:
        """How many steps the whole schedule has, as the plan says; None where it does not."""
        path = self.run.path / "plan.txt"
        found = _STEPS.search(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
        return int(found[2]) if found else None

    @property
    def state(self) -> str:
        """Whether the run came to its end, in words."""
        done, planned = self.run.step, self.planned
        if not self.trains:
            return "nothing to train"
        if planned is None:
            return f"{done} steps, not said of how many"
        collapsed = [
            tap
            for tap, rank in (self.metrics[-1].get("embedding_rank") or {} if self.metrics else {}).items()
            if isinstance(rank, int | float) and rank < COLLAPSED_RANK
        ]
        fallen = f"; collapsed: {', '.join(collapsed)}" if collapsed else ""
        if done == planned:
            return "finished" + fallen
        stopped = f"unfinished: stopped or failed, or still running{fallen}"
        limit = self.run.config.max_steps
        return f"stopped by max_steps {limit}{fallen}" if limit is not None and done == limit else stopped


def open_reported(runs: Sequence[str | Path | Run], **moved: str | None) -> list[Reported]:
    """Return runs as a report sees them.

    Args:
        runs: folders, or runs.
        moved: `data`, `data_root`, `device`: where these are now.

    Raises:
        UserError: there are none, one is no run folder, or one is given twice.
    """
    if not runs:
        raise UserError("a report needs at least one run folder")
    opened = [opened_run(run).moved(**moved) for run in runs]
    places = [run.path.resolve() for run in opened]
    for place, run in zip(places, opened, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{run.path} is given twice; give every run once")
    regimes = regime_names([run.config for run in opened])
    names = _names(places)
    labels = [f"{regime}, seed {run.config.seed}" for regime, run in zip(regimes, opened, strict=True)]
    labels = [
        f"{label} ({name})" if labels.count(label) > 1 else label for label, name in zip(labels, names, strict=True)
    ]
    return [Reported(*one) for one in zip(opened, names, regimes, labels, strict=True)]


def usable_runs(runs: Sequence[Reported]) -> list[Reported]:
    """Return the runs that have a network to look at; UserError if none has."""
    usable = [run for run in runs if run.usable]
    if not usable:
        raise UserError("no run has a checkpoint")
    return usable


def by_regime(runs: Sequence[Reported]) -> dict[str, list[Reported]]:
    """Return the runs of each regime, in order."""
    found: dict[str, list[Reported]] = {}
    for run in runs:
        found.setdefault(run.regime, []).append(run)
    return found


def _names(places: Sequence[Path]) -> list[str]:
    """Return the fewest last parts of each path that tell it from the others."""
    return [
        next(
            ("/".join(place.parts[-parts:]) for parts in range(1, len(place.parts))
             if sum(other.parts[-parts:] == place.parts[-parts:] for other in places) == 1),
            place.name,
        )
        for place in places
    ]  # fmt: skip
