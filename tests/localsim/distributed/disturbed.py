"""Runs of one or several processes that are disturbed: forked from a server that has imported all they need.

A fresh process spends seconds on importing torch; a forked one begins at once, so that a test can afford many.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing as mp
import multiprocessing.forkserver
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import free_port
from tiny import assert_same_tensors, checkpoint_tensors, timeless
from torch.utils._pytree import keystr, tree_flatten_with_path

from localsim import checksums, experiment, runs
from localsim import train as training
from localsim.cli import main

Disturb = Callable[[], None]
"""What is done to a process before it begins its run, such as patching what a fault is to come out of."""

SETTINGS: dict[str, Any] = {
    "backbone": "vgg6", "image_size": 16, "projector": "[8,8]", "expand_width": 8, "train_images": 32,
    "test_images": 40, "batch_size": 8, "epochs": 2, "warmup_epochs": 0, "precision": "full", "log_every": 2,
    "granularity": 3, "probe_protocol": "none", "device": "cpu", "optimizer": "adamw", "lr": 3e-3,
}  # fmt: skip
"""Of runs of eight steps, four an epoch, that all stages have a loss in."""

STEPS = 8

KINDS: dict[str, dict[str, Any]] = {"data": {}, "blocks": {"parallel": "blocks"}}
"""What two processes divide; under `blocks` process 0 has the top stages."""

_PRELOADED = ["localsim.experiment", "localsim.cli", "torch.distributed.device_mesh", "torch._dynamo", "torchvision",
              "matplotlib.figure"]  # fmt: skip  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, minus the signal that killed it, and what it printed."""

    code: int | None
    said: str


class Crew:
    """The processes of one run, from their start on."""

    def __init__(self, workers: Sequence[Any], logs: Sequence[Path]) -> None:
        self.workers, self.logs = workers, logs

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to some of the processes, or all, if they are still there."""
        for rank in ranks or range(len(self.workers)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.workers[rank].pid, number)

    def ended(self, seconds: float = 60, ranks: Sequence[int] | None = None) -> list[Ended]:
        """Wait for some of the processes, or all, and return how they ended; a code of None is one that has not."""
        until = time.monotonic() + seconds
        chosen = list(range(len(self.workers)) if ranks is None else ranks)
        for rank in chosen:
            self.workers[rank].join(max(0, until - time.monotonic()))
        return [Ended(self.workers[rank].exitcode, self.logs[rank].read_text()) for rank in chosen]

    def wait_until_stopped(self, rank: int, seconds: float = 60) -> float:
        """Wait until SIGSTOP has come to a process; return the time, monotonic."""
        until = time.monotonic() + seconds
        while Path(f"/proc/{self.workers[rank].pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
            assert time.monotonic() < until, self.logs[rank].read_text()
            time.sleep(0.02)
        return time.monotonic()


@contextlib.contextmanager
def crew(
    num: int,
    out: Path,
    *,
    disturb: Mapping[int, Disturb] | None = None,
    resume: bool = False,
    logs: Path | None = None,
    **settings: Any,
) -> Iterator[Crew]:
    """Start `localsim run` on `num` processes with `SETTINGS` and others; whoever is left at the end is killed.

    Args:
        num: of processes, with the variables that torchrun sets if they are several.
        out: the run folder.
        disturb: by rank, what is done to a process first.
        resume: go on in the folder; then `settings` alone are given.
        logs: the folder for what the processes print, by default the run folder's own.
        settings: of the run.
    """
    given = settings if resume else {**SETTINGS, **settings}
    words = ["run", "--out", str(out), *(["--resume"] if resume else [])]
    words += [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num)}
    printed = [(logs or out.parent) / f"{out.name}-{time.monotonic_ns()}-{rank}.log" for rank in range(num)]
    workers = []
    for rank, log in enumerate(printed):
        log.touch()
        told = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)} if num > 1 else {}
        worker = _server().Process(target=_work, args=(words, told, log, (disturb or {}).get(rank)))
        worker.start()
        workers.append(worker)
    try:
        yield Crew(workers, printed)
    finally:
        for worker in workers:
            worker.kill()  # a stopped one too
            worker.join()


@contextlib.contextmanager
def start_agent(num: int, out: Path, *, seconds_of_steps: float, **settings: Any) -> Iterator[Crew]:
    """Do what `crew` does through torchrun's agent, which is the one process that is returned.

    Args:
        num: of processes that the agent starts, by forking.
        out: the run folder.
        seconds_of_steps: how long every step takes at least.
        settings: of the run.
    """
    words = ["run", "--out", str(out)]
    words += [word for name, value in {**SETTINGS, **settings}.items() for word in ("--set", f"{name}={value}")]
    log = out.with_name(f"{out.name}.log")
    log.touch()
    worker = _server().Process(target=_lead, args=(num, words, log, free_port(), seconds_of_steps))
    worker.start()
    try:
        yield Crew([worker], [log])
    finally:
        worker.kill()
        worker.join()


def _lead(num: int, words: list[str], log: Path, port: int, seconds: float) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(1, 1, num, rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{port}", max_restarts=0,
                          rdzv_configs={"rank": 0}, start_method="fork", monitor_interval=0.1)  # fmt: skip
    slow = partial(before_every_step, partial(time.sleep, seconds))
    elastic_launch(config, _work)(words, {}, log, slow)


def run_on(num: int, out: Path, **settings: Any) -> list[Ended]:
    """Do what `crew` does and wait until all processes have ended."""
    with crew(num, out, **settings) as started:
        return started.ended(120)


def undisturbed_runs(folders: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a new run of every one of `KINDS` that nothing disturbs."""
    made = {}
    for kind, settings in KINDS.items():
        made[kind] = folders.mktemp("undisturbed") / kind
        ended = run_on(2, made[kind], **settings)
        assert [one.code for one in ended] == [0, 0], ended
    return made


def assert_goes_on(path: Path, undisturbed: Path) -> str:
    """Resume a run on two processes, assert that it ends as the undisturbed one did, and return what it printed."""
    again = run_on(2, path, resume=True)
    assert [one.code for one in again] == [0, 0], again
    assert_same_end(path, undisturbed)
    return again[0].said


def _server() -> Any:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    with pytest.MonkeyPatch.context() as patched:
        for name in threads:  # a process that has threads must not fork
            patched.setenv(name, "1")
        multiprocessing.forkserver.ensure_running()
    return context


def _work(words: list[str], variables: Mapping[str, str], log: Path, disturb: Disturb | None) -> None:
    os.environ.update(variables)
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    # pictures take longer than the training
    experiment.draw_views = experiment.draw_credit = experiment.plots.loss_curves = lambda *_what: None  # type: ignore
    experiment.plots.save = lambda *_what: None
    training.open_board = lambda *_where: None
    if disturb is not None:
        disturb()
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)


# -- what comes out ---------------------------------------------------------------------------------------------------


def assert_same_end(path: Path, other: Path) -> None:
    """Assert that two finished runs have the same newest checkpoint, bit for bit, and the same lines of metrics."""
    assert steps_kept(path)[-1:] == steps_kept(other)[-1:] == [STEPS]
    assert_same_tensors(checkpoint_tensors(path), checkpoint_tensors(other))
    assert_same_tensors(_state(path), _state(other))
    assert timeless(runs.read_metrics(path)) == timeless(runs.read_metrics(other))


def _state(path: Path) -> dict[str, torch.Tensor]:
    """Return all numbers of the newest checkpoint's optimiser and monitor, by where they stand in it."""
    folder = runs.newest_checkpoint(path)
    assert folder is not None
    leaves = [(name, *leaf) for name in ("optimizer", "monitor")
              for leaf in tree_flatten_with_path(runs.load_plain(folder / f"{name}.pt"))[0]]  # fmt: skip
    return {f"{name}{keystr(at)}": torch.as_tensor(value) for name, at, value in leaves if value is not None}


def files(path: Path) -> dict[str, bytes]:
    """Return the contents of all files of a run folder, by name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def steps_kept(path: Path) -> list[int]:
    """Return the steps of all checkpoints; none may be half-written under the name of a whole one."""
    folders = checksums.step_folders(path / "checkpoints")
    assert all(checksums.is_whole(folder) for folder in folders)
    return [int(folder.name) for folder in folders]


def assert_told(*ended: Ended, code: int, sentence: str) -> None:
    """Assert that processes ended with a code, and that one or more said one sentence and none a traceback."""
    assert [one.code for one in ended] == [code] * len(ended), "\n".join(one.said for one in ended)
    told = [line for one in ended for line in one.said.splitlines() if line.startswith("localsim: ")]
    assert told and all(re.search(sentence, line) for line in told), told
    assert not any("Traceback" in one.said for one in ended), ended


# -- what disturbs a process, all to be called in it ------------------------------------------------------------------


def both(*all_of_them: Disturb) -> None:
    for disturb in all_of_them:
        disturb()


def before_step(step: int, act: Callable[[], object]) -> None:
    """Do something when the process is about to do a step, counted from 0."""
    real = training._one_step

    def one_step(net: Any, batch: Any, config: Any, number: int, *rest: Any) -> Any:
        if number == step and rest[3:]:  # the rehearsal has no team
            act()
        return real(net, batch, config, number, *rest)

    training._one_step = one_step


def before_every_step(act: Callable[[], object]) -> None:
    for step in range(STEPS):
        before_step(step, act)


def raise_signals(*numbers: int) -> None:
    for number in numbers:
        signal.raise_signal(number)


def poison_images() -> None:
    """Put an infinite number into this process's first image of the batch whose step is about to begin."""
    real = training._one_step

    def one_step(net: Any, batch: Any, *rest: Any) -> Any:
        batch.views[0][0] = float("inf")
        return real(net, batch, *rest)

    training._one_step = one_step


def poison_weights() -> None:
    """Make a weight of the lowest stage that runs here not a number, when the next step is about to begin."""
    real = training._one_step

    def one_step(net: Any, *rest: Any) -> Any:
        weights = next(p for p in net.parameters() if not p.is_meta)
        weights.data.view(-1)[0] = float("nan")
        return real(net, *rest)

    training._one_step = one_step


def kill_an_image_worker() -> None:
    mp.active_children()[0].kill()
    time.sleep(0.5)  # torch hears of it through SIGCHLD


def jump_clock(seconds: float) -> None:
    """Let the clock that decides when a checkpoint is due go forward so much whenever it is read."""
    now = iter(range(10**9))
    training.time = SimpleNamespace(monotonic=lambda: next(now) * seconds)  # type: ignore[assignment]


def say_saved() -> None:
    """Print the step of every checkpoint that is written."""
    real = runs.save_checkpoint

    def save_checkpoint(path: Path, step: int, state: Any) -> Path:
        print(f"saved {step}", flush=True)
        return real(path, step, state)

    runs.save_checkpoint = save_checkpoint


def fail_after(step: int, name: str, number: int) -> None:
    """Let a function of `localsim.runs` raise OSError `number` once checkpoint `step` is there."""
    real = getattr(runs, name)

    def failing(first: Any, second: Any, *rest: Any) -> Any:
        path = second if name == "save_file" else first
        if any(int(folder.name) >= step for folder in checksums.step_folders(_run_of(path) / "checkpoints")):
            raise OSError(number, os.strerror(number))
        return real(first, second, *rest)

    setattr(runs, name, failing)


def _run_of(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if (folder / "config.json").exists())


def slow_groups(seconds: float) -> None:
    """Let every group of processes beside that of all take so long to make."""
    real = dist.new_group

    def new_group(*given: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return real(*given, **options)

    dist.new_group = new_group


def slow_disk(seconds: float) -> None:
    """Let the first flush of a checkpoint to disk take so long."""
    real, slept = os.fsync, []

    def fsync(handle: int) -> None:
        if not slept and ".partial/" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            slept.append(time.sleep(seconds))
        real(handle)

    os.fsync = fsync


def obey_permissions() -> None:
    """Give up root's privilege to write where permissions forbid it (CAP_DAC_OVERRIDE)."""
    if os.geteuid() == 0:
        head = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
        masks = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, each in two halves
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.capget(head, masks) == 0, os.strerror(ctypes.get_errno())
        for place in (0, 1, 2):
            masks[place] &= ~(1 << 1)
        assert libc.capset(head, masks) == 0, os.strerror(ctypes.get_errno())
