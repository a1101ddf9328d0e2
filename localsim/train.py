"""The training loop. Read it from top to bottom: that is the order in which things happen."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from localsim import engine, runs
from localsim.board import open_board
from localsim.config import Config
from localsim.data import Batch, ViewLoader
from localsim.distributed import parts
from localsim.distributed.norms import divide
from localsim.distributed.team import Team
from localsim.errors import Interrupted, TrainingFailed, UserError
from localsim.memory import HeldBytes
from localsim.monitor import Monitor
from localsim.network import Embedding, LocalNetwork, tensors_of
from localsim.rng import key
from localsim.schedule import Schedule, acting_together
from localsim.sources import Source, batches, check_cache, forget_caches, open_source, set_modes
from localsim.stopping import stop_signals

OnMetrics = Callable[[Mapping[str, Any]], None]
"""A function that is shown every row of metrics, see `localsim.run`."""


def train(
    net: LocalNetwork,
    loader: ViewLoader,
    config: Config,
    path: Path,
    *,
    num_classes: int,
    progress: bool = True,
    on_metrics: OnMetrics | None = None,
    team: Team | None = None,
) -> int:
    """Train a network from its newest checkpoint in the run folder `path`, or from step 0, to the end.

    Every random draw is keyed by seed and step, so a resumed run computes what an uninterrupted one would have.

    Args:
        net: on the device it is trained on.
        loader: two augmented views per image.
        config: see `localsim.config.Config`.
        path: a run folder whose lock the caller holds.
        num_classes: for the online probe; 0 without labels.
        progress: show a progress bar (plain lines when stderr is not a terminal).
        on_metrics: called with every row of metrics, right after it was written.
        team: the processes that train together, of which one writes the folder; by default this one alone.

    Returns:
        The number of steps the network has seen.

    Raises:
        TrainingFailed: a loss is not finite or a tap has collapsed; the last good checkpoint is kept.
        Interrupted: by Ctrl-C or SIGTERM, after the step and a checkpoint.
        ProcessLost: another process is gone or does not answer.
        UserError: a checkpoint cannot be read or written.
    """
    team = team or Team()
    schedule = Schedule.of(config, loader.steps_per_epoch, len(net.taps))
    monitor = Monitor(net, num_classes, stops=config.on_collapse == "stop")
    step, optimizer = _restore(path, net, config, schedule, monitor, team)
    peers, relay = team.peers, team.relay
    monitor.peers = peers

    def apply(_parameters: list[nn.Parameter]) -> None:
        # gradients exist only where they are final, so one optimiser steps just the stage or tap that is done
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def on_stage(stage: int, outputs: list[Tensor], alive: tuple[int, ...]) -> None:
        if relay is not None:  # first: others wait for it
            relay.on_stage(stage, outputs)
        monitor.on_stage(stage, outputs, alive)

    def is_late() -> bool:
        return time.monotonic() - saved_at > 60 * config.checkpoint_minutes

    hooks = engine.Hooks(on_stage=on_stage, on_tap=monitor.on_tap, on_final=apply)
    show_on_board = open_board(path, step) if team.writes else None
    saved_at = logged_at = time.monotonic()
    images_since_log = 0
    with stop_signals(team.alone) as stop, _Progress(schedule.last_step, step, progress) as bar:
        while step < schedule.last_step:
            phase = schedule.phase(step)
            # batches enter where the lowest stage runs, and come to the others through it
            if relay is not None and relay.below is not None:
                source: Source = relay
            else:
                source = open_source(net, loader, config, path, phase)
            set_modes(net, phase)
            for epoch, batch in batches(source, step, min(phase.stop, schedule.last_step), loader.steps_per_epoch):
                images_since_log += team.begin(batch, stop.is_set(), is_late())
                rate = schedule.rate(step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                # not at max_steps: a run that is stopped and resumed must write the lines of one that is not
                logs = (step + 1) % config.log_every == 0 or step + 1 == phase.stop
                monitor.start_step(step + 1, batch.labels)
                try:
                    with HeldBytes(net.parameters()) if logs else contextlib.nullcontext() as held:
                        _one_step(net, batch, config, step, hooks, phase.taps, source.start, team)
                    net.end_step()
                    if logs:
                        monitor.check(net, batch.views[0], config.precision, phase.taps, source.start, relay)
                except TrainingFailed as error:
                    raise _failure(error, path, step, team) from None
                step += 1
                row = _row(team, monitor, held.peak if held else 0) if logs else None
                if row is not None:
                    held_bytes = row.pop("held_bytes")
                    row = {
                        "step": step,
                        "epoch": epoch,
                        "lr": rate,
                        **row,
                        "images_per_second": images_since_log / (time.monotonic() - logged_at),
                        "held_bytes": held_bytes,
                    }
                    runs.append_metrics(path, row)
                    if show_on_board is not None:
                        show_on_board(row)
                    if on_metrics is not None:
                        on_metrics(row)
                    bar.show(row)
                    logged_at, images_since_log = time.monotonic(), 0
                bar.advance(step)
                ends = step in (schedule.last_step, phase.stop) or step % loader.steps_per_epoch == 0
                stops, late = team.agreed(stop.is_set(), is_late())
                if ends or late or stops:
                    snapshot = _is_due(config.snapshot_every, step, loader.steps_per_epoch)
                    if _keep(path, step, net, optimizer, monitor, team, step == schedule.last_step, snapshot):
                        saved_at = time.monotonic()
                if stops:
                    # the first to leave may have all others ended, by torchrun for one
                    team.finish()
                    raise team.quiet(Interrupted())
            del source  # files that it maps keep their room on the disk
    team.finish()
    divide(net, None)
    if step == schedule.total_steps and team.writes:
        forget_caches(path)
    return step


def _row(team: Team, monitor: Monitor, held_bytes: int) -> dict[str, Any] | None:
    """Return what all processes have for a line of metrics, where it is written."""
    told = team.collect({**monitor.flush(), "held_bytes": held_bytes})
    if told is None:
        return None
    (_, first), *others = told
    row: dict[str, Any] = {name: dict(value) if isinstance(value, dict) else value for name, value in first.items()}
    for _, more in others:
        for name, value in more.items():
            row[name] = {**row[name], **value} if isinstance(value, dict) else max(row[name], value)
    return row


def _keep(
    path: Path,
    step: int,
    net: LocalNetwork,
    optimizer: torch.optim.Optimizer,
    monitor: Monitor,
    team: Team,
    is_last: bool,
    snapshot: bool,
) -> bool:
    """Write a checkpoint unless a tap is under suspicion of collapse, the last one in any case; False for none.

    Raises:
        TrainingFailed: a weight is not finite.
    """
    here = [(name, parameter) for name, parameter in net.named_parameters() if not parameter.is_meta]
    bad = next((name for name, parameter in here if not parameter.isfinite().all()), None)
    state = parts.state_of(net, team.stages, optimizer, monitor.state())
    told = team.collect({"bad": bad, "healthy": monitor.healthy, "state": state})
    if told is None:
        return True
    if bad := next((part["bad"] for _, part in told if part["bad"]), None):
        raise _failure(f"{bad} is not finite after step {step}; a lower --lr may help", path, step - 1, team)
    if not is_last and not all(part["healthy"] for _, part in told):
        return False
    whole = parts.joined(net, [(stages, part["state"]) for stages, part in told])
    runs.save_checkpoint(path, step, whole)
    if snapshot:
        runs.save_snapshot(path, step, whole)
    return True


def _is_due(every: int, step: int, steps_per_epoch: int) -> bool:
    """Return whether `every` epochs have ended once more after `step` steps; never for 0."""
    return every > 0 and step % (every * steps_per_epoch) == 0


@dataclass(frozen=True)
class StepCost:
    """What one step was measured to cost: wall-clock seconds, and bytes that autograd held at the peak.

    `widths` has the number of embedding dimensions of every tap that acted.
    """

    seconds: float
    held_bytes: int
    widths: Mapping[int, int]


def rehearse(net: LocalNetwork, batch: Batch, config: Config) -> StepCost:
    """Measure a step without learning from it: gradients are dropped, buffers put back; leaves training mode on.

    Of a sequential schedule the last phase is measured, which runs all stages.

    Raises:
        UserError: a tap cannot be trained on cached features.
    """
    check_cache(net, config)
    # by name: a step may add buffers (feedback weights that are drawn when they are first needed)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.train()
    seconds = 0.0
    held = HeldBytes(net.parameters())
    taps = acting_together(config, len(net.taps))[-1]
    widths: dict[int, int] = {}

    def measure(tap: int, embeddings: tuple[Embedding, ...], _loss: Tensor) -> None:
        widths[tap] = tensors_of(embeddings[0])[0].shape[1]

    hooks = engine.Hooks(on_tap=measure, on_final=_drop)
    for attempt in ("cold", "warm"):
        start = time.monotonic()
        with held if attempt == "cold" else contextlib.nullcontext():
            losses = _one_step(net, batch, config, 0, hooks, taps)
        for loss in losses.values():
            loss.item()  # waits for an accelerator
        seconds = time.monotonic() - start
        if seconds > 5:
            break
    with torch.no_grad():
        for name, before in buffers.items():
            net.get_buffer(name).copy_(before)
    return StepCost(seconds, held.peak, widths)


def _one_step(
    net: LocalNetwork,
    batch: Batch,
    config: Config,
    step: int,
    hooks: engine.Hooks,
    taps: Sequence[int],
    start: int = 0,
    team: Team | None = None,
) -> dict[int, Tensor]:
    views = batch.views
    if config.channels_last:
        views = tuple(view.contiguous(memory_format=torch.channels_last) for view in views)
    draws = key(config.seed, "step", step)
    # all taps: then the stages above the highest tap are run too, and watched
    chosen = None if len(taps) == len(net.taps) else taps
    elsewhere = {} if team is None else {"stop": team.stages.stop, "peers": team.peers, "links": team.relay}
    return engine.backward(
        net,
        *views,
        labels=batch.labels,
        key=draws,
        precision=config.precision,
        hooks=hooks,
        taps=chosen,
        start=start,
        **elsewhere,
    )


def _failure(reason: object, path: Path, step: int, team: Team) -> TrainingFailed:
    """Return the error of a step that failed after `step` good ones, and drop the checkpoint that it started from.

    No step has succeeded from a checkpoint of this very step: it may already hold what failed. A process that does not
    write the folder leaves it alone; the one that does drops the checkpoint when it hears of the failure.
    """
    if team.writes:
        newest = runs.drop_untried_checkpoint(path, step)
        kept = f"{newest} is kept" if newest else "no checkpoint yet"
    else:
        kept = "the last good checkpoint, if there is one, is kept"
    failure = TrainingFailed(f"{reason}; {kept}")
    vars(failure)["step"] = step
    return failure


def _drop(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _restore(
    path: Path, net: LocalNetwork, config: Config, schedule: Schedule, monitor: Monitor, team: Team
) -> tuple[int, torch.optim.Optimizer]:
    """Take part in the team with the state of the newest checkpoint; return its step, and the optimiser."""
    step = team.same_step(runs.checkpoint_step(path))
    folder = path / "checkpoints" / f"{step:08d}" if step else None
    with team.together():
        if team.writes:
            runs.forget_metrics_after(path, step)
        if folder is not None:
            if not folder.is_dir():
                raise UserError(f"{folder} is not seen here; the run folder must lie where all processes see it")
            runs.load_weights(net, folder)
    with team.together():
        team.take_part(net)
        optimizer = schedule.optimizer(net, config)
        if folder is not None:
            state = runs.load_training_state(
                folder, optimizer, lambda whole: parts.optimizer_part(net, team.stages, whole)
            )
            try:
                monitor.load_state(state, net.device)
            except UserError as error:
                raise UserError(f"{folder / 'monitor.pt'}: {error}") from None
            parts.keep_only_of_monitor(net, team.stages, monitor)
    return step, optimizer


class _Progress:
    """A bar on a terminal, a plain line per metrics row elsewhere, or nothing."""

    def __init__(self, total: int, start: int, wanted: bool) -> None:
        self.total, self.wanted, self.began, self.start = total, wanted, time.monotonic(), start
        self.bar = tqdm(total=total, initial=start, unit="step") if wanted and sys.stderr.isatty() else None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def show(self, row: dict[str, Any]) -> None:
        losses = " ".join(f"{name} {value:.3f}" for name, value in row["loss"].items())
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {losses}, {row['images_per_second']:.0f} images/s")
        elif self.wanted:
            done = row["step"] - self.start
            left = (time.monotonic() - self.began) / done * (self.total - row["step"])
            print(
                f"step {row['step']}/{self.total}  loss {losses}  lr {row['lr']:.2g}  "
                f"{row['images_per_second']:.0f} images/s  {left / 60:.1f} min left",
                file=sys.stderr,
                flush=True,
            )
