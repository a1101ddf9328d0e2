"""What a sweep will do: what each of its cells costs, how far it is, and how long the rest takes."""

from __future__ import annotations

import gc
import heapq
import json
import socket
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch

from localsim import runs
from localsim.config import FREE, Config
from localsim.cost_table import aligned
from localsim.errors import UserError
from localsim.rng import key
from localsim.sweep_cells import Cell


@dataclass(frozen=True)
class Measured:
    """What is known of a configuration before it is trained; the seed does not matter.

    Attributes:
        stages: how many.
        path: the longest gradient path, in unit blocks.
        steps: of the whole training.
        probed: whether a finished run of it has a probe.
        held_bytes: activations that autograd holds at the peak; None where nothing is trained.
        seconds: of one step, as measured; None if it was not.
    """

    stages: int
    path: int
    steps: int
    probed: bool
    held_bytes: int | None = None
    seconds: float | None = None


def measure(config: Config) -> Measured:
    """Build the network, open the images and rehearse a step, as the run will; UserError if that cannot be done."""
    from localsim.experiment import prepare
    from localsim.schedule import Schedule

    prepared = prepare(config)
    try:
        net, loader = prepared.net, prepared.loader
        known = Measured(
            len(net.stages), net.credit.longest_path(net.units_per_stage), 0, _is_probed(config, prepared.data.test)
        )
        if (cost := prepared.cost) is None:
            return known
        steps = Schedule.of(config, loader.steps_per_epoch, len(net.taps)).total_steps
        return Measured(known.stages, known.path, steps, known.probed, cost.held_bytes, cost.seconds)
    finally:
        del prepared  # before the next one is built
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def predict(config: Config) -> Measured:
    """Say the same without computing a step, for another machine: no seconds, and memory as `localsim cost` does."""
    from localsim.assembly import build_network
    from localsim.cost import cost
    from localsim.opening import open_data, open_loader
    from localsim.schedule import Schedule

    # drawn for real where the weights decide the feedback
    with nullcontext() if config.transport == "feedback_alignment" else torch.device("meta"):
        net = build_network(config)
    data = open_data(config)
    loader = open_loader(config, data, torch.device("cpu"))
    steps, held = 0, None
    if len(net.taps):
        steps = Schedule.of(config, loader.steps_per_epoch, len(net.taps)).total_steps
        try:
            held = cost(config).held_bytes
        except UserError:  # of a rule whose step does not run on tensors without values
            held = None
    path = net.credit.longest_path(net.units_per_stage)
    return Measured(len(net.stages), path, steps, _is_probed(config, data.test), held)


def _is_probed(config: Config, test_images: object) -> bool:
    return config.probe_protocol != "none" and test_images is not None


def fingerprint(config: Config, device: str | None, threads: int | None) -> str:
    """Return what a measurement depends on, in short: the configuration but for its seed, and where it is measured."""
    values = {name: value for name, value in config.to_json().items() if name not in (*FREE, "seed")}
    where = [device or config.device, threads or torch.get_num_threads(), socket.gethostname()]
    return f"{key(json.dumps([values, where], sort_keys=True)):016x}"


# -- states -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """A cell, what it costs, and how far it is.

    Attributes:
        cell: the configuration and its folder.
        measured: what it costs.
        step: steps that its newest checkpoint has seen.
        state: `finished`, `begun`, `new`, `elsewhere` (another process trains it) or `queued` (on a cluster).
        job: the id of its job on a cluster, if it has one that has not ended.
    """

    cell: Cell
    measured: Measured
    step: int
    state: str
    job: str | None = None

    @property
    def in_words(self) -> str:
        """The state, for the table."""
        words = {"begun": f"at step {self.step}", "elsewhere": f"at step {self.step}, in another process"}
        return f"job {self.job}" if self.state == "queued" else words.get(self.state, self.state)


def look_at(cell: Cell, measured: Measured, job: str | None = None) -> Planned:
    """Return how far a cell is, by its run folder."""
    step = runs.checkpoint_step(cell.path)
    if _is_finished(cell.path, step, measured):
        state, job = "finished", None
    elif _is_locked(cell.path / "lock"):
        state = "elsewhere"
    elif job is not None:
        state = "queued"
    else:
        state = "begun" if step else "new"
    return Planned(cell, measured, step, state, job)


def _is_finished(path: Path, step: int, measured: Measured) -> bool:
    if not (path / "config.json").exists() or step < measured.steps:
        return False
    return not measured.probed or (path / "probe.json").exists()


def _is_locked(lock: Path) -> bool:
    if not lock.exists():
        return False
    try:
        with filelock.FileLock(lock, timeout=0):
            return False
    except filelock.Timeout:
        return True


# -- time -------------------------------------------------------------------------------------------------------------


def factor(took: Iterable[Sequence[float]]) -> float | None:
    """Return wall time over measured training time of cells that have ended, by their median; None without one.

    Args:
        took: for every cell the seconds that it took, probes and all, and those that its steps alone should have taken.
    """
    ratios = [wall / expected for wall, expected in took if expected > 0]
    return statistics.median(ratios) if ratios else None


def seconds_left(planned: Planned, max_steps: int | None, ratio: float | None) -> float:
    """Return how long a cell still trains, as far as it was measured."""
    steps = min(planned.measured.steps, max_steps or planned.measured.steps) - planned.step
    return max(0, steps) * (planned.measured.seconds or 0.0) * (ratio or 1.0)


def all_together(seconds: Iterable[float], jobs: int) -> float:
    """Return when jobs of these lengths are over, each begun in order as soon as one of `jobs` places is free."""
    ends = [0.0] * jobs
    for length in seconds:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def minutes(seconds: float) -> str:
    """Return a time as a phrase."""
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan_text(
    cells: Sequence[Planned], *, jobs: int, max_steps: int | None, took: Mapping[str, Sequence[float]]
) -> str:
    """Return the table of cells, how many are in which state, and how long the rest takes."""
    ratio = factor(took.values())
    head = ["cell", "state", "stages", "path", "held MiB", "steps", "s/step", "min left"]
    rows, left = [], []
    for one in cells:
        here = one.measured
        seconds = seconds_left(one, max_steps, ratio) if one.state != "finished" else 0.0
        left += [seconds] if one.state in ("begun", "new") else []
        rows.append(
            [
                one.cell.name,
                one.in_words,
                str(here.stages),
                str(here.path),
                "-" if here.held_bytes is None else f"{here.held_bytes / 2**20:,.0f}",
                str(here.steps),
                "-" if here.seconds is None else f"{here.seconds:.2f}",
                "-" if here.seconds is None else f"{seconds / 60:.1f}",
            ]
        )
    counts = Counter(one.state for one in cells)
    states = ("finished", "begun", "new", "elsewhere", "queued")
    told = ", ".join(f"{counts[state]} {state}" for state in states if counts[state])
    lines = [aligned([head, *rows], left=2), "", f"{len(cells)} cells: {told}"]
    if any(left):
        at_once = "one at a time" if jobs == 1 else f"{jobs} at a time"
        total = minutes(all_together(left, jobs))
        lines.append(
            f"about {total} of training, {at_once}; probes come on top"
            if ratio is None
            else f"about {total} with probes, {at_once}: {ratio:.2f} times the training alone, as in the "
            f"{len(took)} cells that have ended"
        )
    return "\n".join(lines)
