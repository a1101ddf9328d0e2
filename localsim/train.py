"""The training loop. Read it from top to bottom: that is the order in which things happen."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from localsim.errors import Interrupted, TrainingFailed
from localsim.memory import HeldBytes
from localsim.monitor import Monitor
from localsim.network import Embedding, LocalNetwork, tensors_of
from localsim.rng import key
from localsim.schedule import Schedule, acting_together
from localsim.sources import batches, check_cache, forget_caches, open_source, set_modes

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

    Returns:
        The number of steps the network has seen.

    Raises:
        TrainingFailed: a loss is not finite or a tap has collapsed; the last good checkpoint is kept.
        Interrupted: by Ctrl-C or SIGTERM, after the step and a checkpoint.
        UserError: a checkpoint cannot be read or written.
    """
    schedule = Schedule.of(config, loader.steps_per_epoch, len(net.taps))
    monitor = Monitor(net, num_classes, stops=config.on_collapse == "stop")
    optimizer = schedule.optimizer(net, config)
    step = _restore(path, net, optimizer, monitor)

    def apply(_parameters: list[nn.Parameter]) -> None:
        # gradients exist only where they are final, so one optimiser steps just the stage or tap that is done
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    hooks = engine.Hooks(on_stage=monitor.on_stage, on_tap=monitor.on_tap, on_final=apply)
    show_on_board = open_board(path, step)
    saved_at = logged_at = time.monotonic()
    images_since_log = 0
    with _stop_signals() as stop, _Progress(schedule.last_step, step, progress) as bar:
        while step < schedule.last_step:
            phase = schedule.phase(step)
            source = open_source(net, loader, config, path, phase)
            set_modes(net, phase)
            for epoch, batch in batches(source, step, min(phase.stop, schedule.last_step), loader.steps_per_epoch):
                rate = schedule.rate(step)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                # not at max_steps: a run that is stopped and resumed must write the lines of one that is not
                logs = (step + 1) % config.log_every == 0 or step + 1 == phase.stop
                monitor.start_step(step + 1, batch.labels)
                try:
                    with HeldBytes(net.parameters()) if logs else contextlib.nullcontext() as held:
                        _one_step(net, batch, config, step, hooks, phase.taps, source.start)
                    net.end_step()
                    if logs:
                        monitor.check(net, batch.views[0], config.precision, phase.taps, source.start)
                except TrainingFailed as error:
                    raise _failure(error, path, step) from None
                step += 1
                images_since_log += len(batch.indices)
                if logs:
                    seconds = time.monotonic() - logged_at
                    row = {
                        "step": step,
                        "epoch": epoch,
                        "lr": rate,
                        **monitor.flush(),
                        "images_per_second": images_since_log / seconds,
                        "held_bytes": held.peak if held else 0,
                    }
                    runs.append_metrics(path, row)
                    show_on_board(row)
                    if on_metrics is not None:
                        on_metrics(row)
                    bar.show(row)
                    logged_at, images_since_log = time.monotonic(), 0
                bar.advance(step)
                ends = step in (schedule.last_step, phase.stop) or step % loader.steps_per_epoch == 0
                late = time.monotonic() - saved_at > 60 * config.checkpoint_minutes
                if step == schedule.last_step or ((ends or late or stop.is_set()) and monitor.healthy):
                    if bad := [name for name, p in net.named_parameters() if not p.isfinite().all()]:
                        raise _failure(
                            f"{bad[0]} is not finite after step {step}; a lower --lr may help", path, step - 1
                        )
                    runs.save_checkpoint(path, step, net, optimizer, monitor.state())
                    if _is_due(config.snapshot_every, step, loader.steps_per_epoch):
                        runs.save_snapshot(path, step, net)
                    saved_at = time.monotonic()
                if stop.is_set():
                    raise Interrupted
            del source  # files that it maps keep their room on the disk
    if step == schedule.total_steps:
        forget_caches(path)
    return step


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
) -> dict[int, Tensor]:
    views = batch.views
    if config.channels_last:
        views = tuple(view.contiguous(memory_format=torch.channels_last) for view in views)
    draws = key(config.seed, "step", step)
    # all taps: then the stages above the highest tap are run too, and watched
    chosen = None if len(taps) == len(net.taps) else taps
    return engine.backward(
        net, *views, labels=batch.labels, key=draws, precision=config.precision, hooks=hooks, taps=chosen, start=start
    )


def _failure(reason: object, path: Path, step: int) -> TrainingFailed:
    """Return the error of a step that failed after `step` good ones, and drop the checkpoint that it started from.

    No step has succeeded from a checkpoint of this very step: it may already hold what failed.
    """
    kept = runs.drop_untried_checkpoint(path, step)
    return TrainingFailed(f"{reason}; " + (f"{kept} is kept" if kept else "no checkpoint yet"))


def _drop(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _restore(path: Path, net: LocalNetwork, optimizer: torch.optim.Optimizer, monitor: Monitor) -> int:
    folder = runs.newest_checkpoint(path)
    if folder is None:
        runs.forget_metrics_after(path, 0)
        return 0
    runs.load_weights(net, folder)
    monitor.load_state(runs.load_training_state(folder, optimizer), net.device)
    step = int(folder.name)
    runs.forget_metrics_after(path, step)
    return step


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the step; a second one stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
