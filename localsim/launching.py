"""Training the cells of a sweep in processes of their own: on this machine, or as jobs of a Slurm cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localsim.errors import Interrupted, UserError

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

LOG = "log.txt"
"""In a cell's run folder: everything that its processes printed."""

_POLL_SECONDS = 0.1


def cell_command(
    path: Path, rule_file: str | None, settings: Mapping[str, Any], device: str | None = None
) -> list[str]:
    """Return the command that trains the run in a folder to its end, from its newest checkpoint or from the start.

    Args:
        path: a run folder with its `config.json`.
        rule_file: the file of a rule of one's own.
        settings: by field of `Config`, of those in `config.FREE`.
        device: takes the place of the settings' one.
    """
    command = [sys.executable, "-m", "localsim", "run", "--resume", "--out", str(path)]
    command += ["--rule", rule_file] if rule_file else []
    given = dict(settings) if device is None else {**settings, "device": device}
    for name, value in given.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    return command


def cores() -> int:
    """Return how many processor cores this process may use."""
    with suppress(AttributeError):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_of_each(jobs: int) -> int | None:
    """Return how many threads each of several jobs should take; None where torch's own choice stands."""
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, cores() // jobs)


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty, without what a progress bar overwrote."""
    if not log.exists():
        return "it printed nothing"
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


# -- on this machine --------------------------------------------------------------------------------------------------


def run_all(
    commands: Mapping[Path, Callable[[str | None], list[str]]],
    devices: Sequence[str | None],
    *,
    began: Callable[[Path], None],
    ended: Callable[[Path, int, float], None],
) -> None:
    """Run a command for every run folder, as many at once as there are devices, and write what they print to `LOG`.

    Args:
        commands: from the device that is free to the command, by run folder, in the order in which they are started.
        devices: one per process at once; None leaves the choice to the process.
        began: called with the folder when its process is started.
        ended: called with the folder, the exit code and the seconds it took; not for what a signal stopped.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; the processes got SIGTERM and have ended. A second one ends them at once.
    """
    threads = threads_of_each(len(devices))
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    waiting, free = list(commands), list(devices)
    running: dict[Path, tuple[subprocess.Popen[bytes], str | None, float]] = {}
    told = 0  # signals that were passed on
    with _counted_signals() as signals:
        try:
            while running or (waiting and not signals):
                while waiting and free and not signals:
                    path, device = waiting.pop(0), free.pop(0)
                    running[path] = (_start(commands[path](device), path, environment), device, time.monotonic())
                    began(path)
                time.sleep(_POLL_SECONDS)
                if len(signals) > told:
                    told = len(signals)
                    for process, *_ in running.values():
                        process.send_signal(signal.SIGTERM)
                for path, (process, device, start) in list(running.items()):
                    if (code := process.poll()) is not None:
                        del running[path]
                        free.append(device)
                        if not (signals and code):
                            ended(path, code, time.monotonic() - start)
        finally:
            for process, *_ in running.values():  # something else went wrong here: leave nobody behind
                process.terminate()
            for process, *_ in running.values():
                process.wait()
    if signals:
        raise Interrupted


def _start(command: Sequence[str], path: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with (path / LOG).open("ab") as log:
        # a session of its own: Ctrl-C in a terminal would reach it beside our signal, and two stop it at once
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


@contextmanager
def _counted_signals() -> Iterator[list[int]]:
    """Collect the numbers of Ctrl-C, SIGTERM and a closed terminal, in the main thread, as far as they are heeded."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__]
    before = {number: signal.getsignal(number) for number in (signal.Signals[name] for name in names)}
    heeded = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in heeded:
        signal.signal(number, lambda caught_one, _frame: caught.append(caught_one))
    try:
        yield caught
    finally:
        for number, handler in heeded.items():
            signal.signal(number, handler)


# -- on a cluster -----------------------------------------------------------------------------------------------------


@dataclass
class ClusterJob:
    """What a job of the cluster does: it trains a run to its end, and checkpoints when its time is over.

    submitit pickles it, calls it on a node and, shortly before a time limit or when a job is preempted, calls
    `checkpoint` and queues what this returns.
    """

    command: list[str]
    path: Path
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __call__(self) -> None:
        # Slurm sends these to every process of a job. They are for submitit, which then asks for a checkpoint; blocked
        # signals stay blocked in a process that is started meanwhile
        theirs = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
        signal.pthread_sigmask(signal.SIG_BLOCK, theirs)
        try:
            self.process = _start(self.command, self.path, os.environ)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, theirs)
        if code := self.process.wait():
            raise RuntimeError(f"exit code {code}: {last_line(self.path / LOG)}")

    def checkpoint(self) -> DelayedSubmission:
        """Stop the training after its step, with a checkpoint, and return what goes on from there."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            # not wait(): a signal may have called this within the wait of __call__, which holds Popen's lock
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(ClusterJob(self.command, self.path))


def submit_all(
    commands: Mapping[Path, Callable[[], list[str]]], folder: Path, cluster: str, options: Mapping[str, Any]
) -> Iterator[tuple[Path, str]]:
    """Submit a job for every run folder through submitit, and yield the folder and the job's id.

    Args:
        commands: by run folder, called when its job is submitted.
        folder: where submitit keeps its files; all nodes must see it.
        cluster: `slurm`, or another that submitit knows, such as `local`.
        options: of `submitit.AutoExecutor.update_parameters`; Slurm's own, such as `partition`, with or without the
            prefix `slurm_`.

    Raises:
        UserError: submitit is not installed, there is no such cluster here, or an option is unknown or missing.
    """
    submitit = _submitit()
    if "timeout_min" not in options:
        raise UserError("a job of a cluster needs a time limit in minutes: --slurm-set timeout_min=240")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a prefix is missing, which it then adds
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            executor.update_parameters(name="localsim", **options)
        except (RuntimeError, ValueError, NameError, AssertionError, TypeError) as error:
            raise UserError(f"cluster {cluster!r} cannot be used: {' '.join(str(error).split())}") from error
    for path, command in commands.items():
        yield path, executor.submit(ClusterJob(command(), path)).job_id


def still_queued(jobs: Mapping[str, Mapping[str, str]], folder: Path) -> dict[str, str]:
    """Return the ids of the jobs that wait or run, by cell, of those that `submit_all` submitted.

    Args:
        jobs: by cell, the `id` of its last job and the `cluster` it went to.
        folder: where submitit keeps its files.
    """
    if not jobs:
        return {}
    submitit = _submitit()
    executors = submitit.core.plugins.get_executors()
    # all of them before the first is asked about: one call to Slurm then serves for all
    made = {name: executors[job["cluster"]].job_class(folder, job["id"]) for name, job in jobs.items()}
    return {name: job.job_id for name, job in made.items() if not job.done()}


def _submitit() -> Any:
    try:
        import submitit
        import submitit.core.plugins
    except ImportError:
        raise UserError("jobs of a cluster need submitit: pip install 'localsim[slurm]'") from None
    return submitit
