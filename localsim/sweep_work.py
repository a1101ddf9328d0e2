"""A sweep that is carried out: what its folder keeps, training what is not finished, and the table at the end."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsim import runs
from localsim.errors import Interrupted, UserError
from localsim.files import write_json
from localsim.launching import LOG, cell_command, last_line, run_all, submit_all
from localsim.sweep_cells import Cell, Values
from localsim.sweep_plan import Planned, all_together, factor, look_at, minutes, seconds_left

if TYPE_CHECKING:
    from localsim.analysis.sweeps import SweepTable

Say = Callable[[str], None]


@dataclass
class Kept:
    """What `sweep.json` holds.

    Attributes:
        asked: lists of values, one mapping for every call that asked for something new.
        settings: those that change no numbers, as they were last given.
        measured: costs of configurations, by fingerprint.
        took: seconds that a cell took in all, and that its steps alone should have taken, by name.
        jobs: the last job of a cell on a cluster, by name.
        rule_files: hashes of the files of one's own rules, by path.
    """

    asked: list[Values] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    took: dict[str, list[float]] = field(default_factory=dict)
    jobs: dict[str, dict[str, str]] = field(default_factory=dict)
    rule_files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, out: Path) -> Kept:
        """Return what a folder's `sweep.json` holds, nothing where there is none; UserError if it is damaged."""
        file = out / "sweep.json"
        if not file.exists():
            return cls()
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{f.name: values[f.name] for f in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from None

    def check_rule_file(self, file: str) -> None:
        """Remember what a file of a rule holds; UserError if it held something else: a configuration only names it."""
        found = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        if self.rule_files.setdefault(file, found) != found:
            raise UserError(
                f"{file} has changed since this sweep began, and its cells would not compare; choose another --out, "
                "or put the file back"
            )

    def write(self, out: Path) -> None:
        """Write `sweep.json`."""
        write_json(out / "sweep.json", asdict(self))


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the lock of a sweep's folder, which is made; UserError if another sweep has it."""
    taken = f"another sweep is at work in {out}; wait for it, or see how far it is with --plan"
    with runs.locked(out / "sweep.lock", "sweep", taken):
        yield


@dataclass
class Work:
    """The cells of a sweep while they are trained.

    Attributes:
        out: the sweep's folder, whose lock the caller holds.
        kept: what is written to its `sweep.json` as the sweep goes on.
        planned: all cells, as they are now.
        max_steps: of every cell in this call; None is to the end.
        devices: of each process that runs at once; None leaves it to the cell.
        say: where sentences go.
        failed: the last line of every cell that failed, by name.
    """

    out: Path
    kept: Kept
    planned: list[Planned]
    max_steps: int | None
    devices: Sequence[str | None]
    say: Say
    failed: dict[str, str] = field(default_factory=dict)
    began_at: dict[Path, float] = field(default_factory=dict)

    def train(self) -> None:
        """Train what is not finished, here; Interrupted, with a sentence, if a signal stops it."""
        commands = {one.cell.path: partial(self._begin, one.cell) for one in self._to_do()}
        try:
            run_all(commands, self.devices, began=self._began, ended=self._ended)
        except Interrupted:
            done = sum(one.state == "finished" for one in self.planned)
            told = f"{done} of {len(self.planned)} cells are finished"
            raise Interrupted(f"{told}; continue with: localsim sweep --out {self.out}") from None

    def submit(self, cluster: str, options: Mapping[str, Any]) -> None:
        """Submit what is not finished as jobs of a cluster; see `launching.submit_all`."""
        to_do = {one.cell.path: one for one in self._to_do()}
        for path, one in to_do.items():
            if job := self.kept.jobs.get(one.cell.name):
                self.say(f"{one.cell.name}: job {job['id']} has ended: {last_line(path / LOG)}")
        if not to_do:
            return
        commands = {path: partial(self._begin, one.cell, None) for path, one in to_do.items()}
        for path, number in submit_all(commands, self.out / "slurm", cluster, options):
            one = to_do[path]
            self.kept.jobs[one.cell.name] = {"cluster": cluster, "id": number}
            self.kept.write(self.out)
            self._becomes(one, replace(one, state="queued", job=number))
            self.say(f"{one.cell.name} is job {number}")

    def conclude(self) -> SweepTable | None:
        """Print and save the table of what is finished, name what is not, and return the table."""
        finished = [one.cell.path for one in self.planned if one.state == "finished"]
        probed = [path for path in finished if (path / "probe.json").exists()]
        table = None
        if probed:
            from localsim.analysis.sweeps import sweep_table

            try:
                table = sweep_table([runs.load_run(path) for path in probed])
                self.say(f"\n{table}\n\ntable and figures in {table.save(self.out)}")
            except UserError as error:  # of cells that do not compare, of several backbones say
                self.say(f"there is no table of all cells: {error}")
        else:
            self.say("no cell is finished and probed: there is no table")
        for one in self.planned:
            if why := self.failed.get(one.cell.name):
                self.say(f"{one.cell.name} failed after step {one.step}: {why}; see {one.cell.path / LOG}")
            elif one.state != "finished":
                self.say(f"{one.cell.name} is not finished: {one.in_words}")
        return table

    def _to_do(self) -> list[Planned]:
        return [one for one in self.planned if one.state in ("begun", "new")]

    def _becomes(self, before: Planned, now: Planned) -> None:
        self.planned = [now if one is before else one for one in self.planned]

    def _number(self, path: Path) -> str:
        paths = [one.cell.path for one in self.planned]
        return f"[{paths.index(path) + 1}/{len(paths)}] {path.name}"

    def _begin(self, cell: Cell, device: str | None) -> list[str]:
        if not (cell.path / "config.json").exists():
            runs.start_run(cell.path, cell.config)
        settings = self.kept.settings | ({} if self.max_steps is None else {"max_steps": self.max_steps})
        return cell_command(cell.path, cell.rule_file, settings, device)

    def _began(self, path: Path) -> None:
        self.began_at[path] = time.monotonic()
        self.say(f"{self._number(path)} {'continued' if runs.checkpoint_step(path) else 'started'}")

    def _ended(self, path: Path, code: int, seconds: float) -> None:
        (was,) = (one for one in self.planned if one.cell.path == path)
        now = look_at(was.cell, was.measured)
        self._becomes(was, now)
        if code:
            self.failed[now.cell.name] = last_line(path / LOG)
            self.say(f"{self._number(path)} failed after {minutes(seconds)}: {self.failed[now.cell.name]}")
            return
        if was.measured.seconds:
            self.kept.took[now.cell.name] = [seconds, (now.step - was.step) * was.measured.seconds]
            self.kept.write(self.out)
        left = f"; about {minutes(self._seconds_left())} left" if self._pending() else ""
        self.say(f"{self._number(path)} {_ending(now)} in {minutes(seconds)}{left}")

    def _pending(self) -> list[Planned]:
        over = (*self.failed, *(name for name in self.kept.took if self.max_steps is not None))
        return [one for one in self._to_do() if one.cell.name not in over]

    def _seconds_left(self) -> float:
        ratio, now = factor(self.kept.took.values()), time.monotonic()
        left = [
            max(0.0, seconds_left(one, self.max_steps, ratio) - (now - self.began_at.get(one.cell.path, now)))
            for one in self._pending()
        ]
        return all_together(left, len(self.devices))


def _ending(one: Planned) -> str:
    """Return how a cell has ended, with the accuracy of its last stage beside the untrained network's."""
    if one.state != "finished":
        return f"stopped at step {one.step} of {one.measured.steps}"
    table = runs.load_run(one.cell.path).probe()
    if table is None:
        return "finished"
    rows = table.select(features="raw", probe="linear", stage=one.measured.stages)
    scores = ", ".join(f"{row.network} {row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in rows)
    return f"finished (linear probe of the last stage: {scores})"
