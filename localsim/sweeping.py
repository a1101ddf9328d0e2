"""`localsim sweep`: a grid of configurations, each trained in a process of its own, and one table of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from localsim import runs
from localsim.errors import UserError, out_of_memory
from localsim.launching import still_queued, threads_of_each
from localsim.opening import open_device
from localsim.sweep_cells import Cell, as_values, covers, in_sentences, make_cells
from localsim.sweep_plan import Measured, Planned, fingerprint, look_at, measure, plan_text, predict
from localsim.sweep_work import Kept, Say, Work, alone

if TYPE_CHECKING:
    from localsim.analysis.sweeps import SweepTable
    from localsim.runs import Run


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder and what is in it.

    Attributes:
        path: the folder.
        cells: in order, each with its configuration, its run folder, what it costs and how far it is.
        failed: the last line that a cell printed, for every one that failed in this call, by name.
        table: of all finished cells; None where none is finished and probed, and for a plan.
    """

    path: Path
    cells: tuple[Planned, ...]
    failed: Mapping[str, str]
    table: SweepTable | None

    @property
    def runs(self) -> list[Run]:
        """The finished cells, opened for reading."""
        return [runs.load_run(one.cell.path) for one in self.cells if one.state == "finished"]


def sweep(
    rule: Any = None,
    *,
    out: str | Path,
    seeds: int | None = None,
    plan: bool = False,
    jobs: int | None = None,
    devices: Sequence[str] | None = None,
    slurm: bool | str = False,
    slurm_set: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Sweep:
    """Train every combination of lists of settings, each in a run folder of its own, and return one table of them.

    What is finished is skipped and what was begun is continued, whoever began it: cells are found by their
    configuration. What was asked of the folder before is carried on with too, alone where only `out` is given.

    Args:
        rule: a name or the path of a file, or a list of them; `blockwise` if not given.
        out: the folder of the sweep; every cell is a run folder in it, such as `granularity4-reach2-seed0`.
        seeds: how many seeds, from 0; in place of `seed=[...]`. One seed, 0, if neither is given.
        plan: only say what would be done, and leave the folder as it is.
        jobs: how many cells are trained at once, 1 if not given; they share the cores.
        devices: train one cell at a time on each of these, e.g. `["cuda:0", "cuda:1"]`.
        slurm: submit the cells as jobs, through submitit, and return; a text is the name of another of its clusters.
        slurm_set: of every job, e.g. `{"timeout_min": 240, "partition": "gpu", "gpus_per_node": 1}`.
        quiet: print nothing.
        settings: fields of `localsim.config.Config`, e.g. `granularity=[1, 2, 4], epochs=10`. A list means several
            values; for a field that is a list itself (`projector`), a list of lists does.

    Raises:
        UserError: something asked for cannot be done, no combination makes sense, or a folder of a cell's name holds
            another configuration.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the cells in training were checkpointed.
    """
    say: Say = (lambda _text: None) if quiet else lambda text: print(text, flush=True)
    out = Path(out)
    places = _places(jobs, devices, slurm, slurm_set, settings.get("device"))
    asked, free = as_values({"rule": rule, **settings, "seed": _seeds(seeds, settings.get("seed"))})
    max_steps = free.pop("max_steps", None)
    if (out / "config.json").exists():
        raise UserError(f"{out} is a run folder; a sweep needs a folder of its own, give another --out")
    with ExitStack() as stack:
        if out.exists() and not plan:
            stack.enter_context(alone(out))
        kept = Kept.read(out)
        kept.settings |= free
        if asked:
            asked = {"seed": [0], **asked}
            kept.asked = [*(old for old in kept.asked if not covers(asked, old)), asked]
        if not kept.asked:
            raise UserError(f"{out} holds no sweep yet; say what varies, e.g. --granularity 1,2,4 --seeds 3")
        cells, left_out, notes = make_cells(kept.asked, kept.settings, out)
        for file in dict.fromkeys(cell.rule_file for cell in cells if cell.rule_file):
            kept.check_rule_file(file)
        costs, reasons = _costs(cells, kept, None if slurm else places)
        for label, reason in reasons.items():
            left_out.setdefault(reason, []).append(label)
        notes += in_sentences(left_out)
        if not costs:
            raise UserError(notes[-1])
        planned = [look_at(cell, costs[cell.name]) for cell in cells if cell.name in costs]
        open_jobs = {one.cell.name: kept.jobs[one.cell.name] for one in planned
                     if one.state != "finished" and one.cell.name in kept.jobs}  # fmt: skip
        queued = still_queued(open_jobs, out / "slurm")
        # again, and only now: a job that has left the queue meanwhile may have finished its cell
        planned = [look_at(one.cell, one.measured, queued.get(one.cell.name)) if one.cell.name in open_jobs else one
                   for one in planned]  # fmt: skip
        text = plan_text(planned, jobs=len(places), max_steps=max_steps, took=kept.took)
        say("\n".join([text, *([""] if notes else []), *notes, ""]))
        if plan:
            return Sweep(out, tuple(planned), {}, None)
        if not out.exists():
            stack.enter_context(alone(out))
        kept.write(out)
        work = Work(out, kept, planned, max_steps, places, say)
        if slurm:
            work.submit("slurm" if slurm is True else slurm, slurm_set or {})
        else:
            work.train()
        table = work.conclude()
        return Sweep(out, tuple(work.planned), work.failed, table)


def _seeds(seeds: int | None, seed: Any) -> Any:
    if seeds is None:
        return seed
    if seed is not None:
        raise UserError("seeds and seed contradict each other; seeds 3 means seeds 0, 1 and 2")
    if type(seeds) is not int or seeds < 1:
        raise UserError(f"seeds is {seeds!r}; allowed: whole numbers above 0")
    return list(range(seeds))


def _places(
    jobs: int | None,
    devices: Sequence[str] | None,
    slurm: bool | str,
    slurm_set: Mapping[str, Any] | None,
    device: Any,
) -> list[str | None]:
    """Return the device of each process that runs at once; None leaves it to the configuration."""
    if jobs is not None and (type(jobs) is not int or jobs < 1):
        raise UserError(f"jobs is {jobs!r}; allowed: whole numbers above 0")
    if slurm and (jobs is not None or devices):
        raise UserError("jobs and devices have no meaning with slurm, which decides what runs when and where")
    if slurm_set and not slurm:
        raise UserError("slurm_set has no meaning without slurm")
    if not devices:
        return [None] * (jobs or 1)
    if jobs is not None or device is not None:
        raise UserError("devices decides how many cells are trained at once, and where; leave out jobs and device")
    for name in devices:
        open_device(name)
    return list(devices)


def _costs(
    cells: Sequence[Cell], kept: Kept, places: Sequence[str | None] | None
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Return what every cell costs, by name, and why the others cannot be trained, by label.

    Cells that differ in their seeds alone are measured once, on the first device; what `sweep.json` knows is not
    measured again. Without devices, for a cluster, nothing is computed here.
    """
    threads = threads_of_each(len(places)) if places else None
    device = places[0] if places else "cluster"
    before = torch.get_num_threads()
    costs: dict[str, Measured] = {}
    reasons: dict[str, str] = {}
    impossible: dict[str, str] = {}
    torch.set_num_threads(threads or before)
    try:
        for cell in cells:
            mark = fingerprint(cell.config, device, threads)
            if mark not in kept.measured and mark not in impossible:
                here = replace(cell.config, device=device) if places and device else cell.config
                try:
                    kept.measured[mark] = asdict(measure(here) if places else predict(here))
                except UserError as error:
                    impossible[mark] = str(error)
                except (MemoryError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    impossible[mark] = "a step does not fit into memory here"
            if mark in impossible:
                reasons[cell.label] = impossible[mark]
            else:
                costs[cell.name] = Measured(**kept.measured[mark])
    finally:
        torch.set_num_threads(before)
    return costs, reasons
