"""SIGTERM from a scheduler, to one process or to all: all stop after the same step, with a checkpoint."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from disturbed import (
    KINDS,
    SETTINGS,
    Crew,
    assert_goes_on,
    before_step,
    raise_signals,
    run_on,
    start_agent,
    steps_kept,
)
from tiny import python

TERM = signal.SIGTERM


@pytest.mark.parametrize(
    ("kind", "signals"),
    [
        ("data", {1: [TERM]}),
        ("blocks", {0: [TERM]}),
        ("blocks", {1: [TERM]}),
        ("data", {0: [TERM], 1: [TERM, TERM]}),
    ],
    ids=["data, one", "blocks, top", "blocks, bottom", "data, all, one twice"],
)
def test_sigterm_stops_all_after_the_same_step_with_a_checkpoint(tmp_path, undisturbed, kind, signals):
    """Twice, as from a scheduler and from torchrun that passes on what it got itself."""
    path = tmp_path / "run"
    told = {rank: partial(before_step, 2, partial(raise_signals, *numbers)) for rank, numbers in signals.items()}
    ended = run_on(2, path, disturb=told, timeout_seconds=60, **KINDS[kind])
    assert [one.code for one in ended] == [130, 130], ended
    assert "".join(one.said for one in ended).count("localsim: stopped; continue with --resume") == 1
    assert 3 <= steps_kept(path)[-1] < 8, "after the batches that were under way"
    assert_goes_on(path, undisturbed[kind])


def test_a_second_sigterm_some_seconds_later_ends_a_process_at_once():
    code = "from localsim import stopping; import os, signal, time\nstopping.ONE_SIGNAL_SECONDS = 0.5\n"
    code += "with stopping.stop_signals(alone=False) as stop:\n"
    code += "    os.kill(os.getpid(), 15); os.kill(os.getpid(), 15); print(stop.is_set(), flush=True)\n"
    code += "    time.sleep(0.6); os.kill(os.getpid(), 15); print('still here')\n"
    with python(code) as process:
        said, _ = process.communicate(timeout=120)
    assert (process.returncode, said) == (-TERM, "True\n")


def _wait_for_a_checkpoint(started: Crew, path: Path) -> None:
    while not (path / "checkpoints" / f"{4:08d}").exists():
        assert started.workers[0].exitcode is None, started.logs[0].read_text()
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_sigterm_to_the_agent_of_torchrun_keeps_a_checkpoint(tmp_path, undisturbed):
    """The agent itself, with processes that are forked."""
    path = tmp_path / "run"
    with start_agent(2, path, seconds_of_steps=0.3, timeout_seconds=60) as started:
        _wait_for_a_checkpoint(started, path)
        started.send(TERM, 0)
        (agent,) = started.ended(90)
    assert agent.code not in (0, None) and "stopped; continue with --resume" in agent.said, agent
    assert 4 < steps_kept(path)[-1] < 8
    assert_goes_on(path, undisturbed["data"])


def test_what_happened_is_said_before_torchrun_ends_all_processes(tmp_path):
    """It looks ten times a second whether one has ended, and then sends SIGTERM to the others."""
    path = tmp_path / "run"
    with start_agent(2, path, seconds_of_steps=0.3, timeout_seconds=60) as started:
        _wait_for_a_checkpoint(started, path)
        os.kill(_children(started.workers[0].pid)[-1], signal.SIGKILL)
        (agent,) = started.ended(90)
    assert re.search(r"localsim: process \d of 2 has lost another, .* is kept; start .* with --resume", agent.said), (
        agent
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sigterm_to_torchrun_keeps_a_checkpoint(tmp_path, undisturbed, kind):
    """As a user starts it; also to all processes at once, as Slurm sends it."""
    path = tmp_path / "run"
    settings = {**SETTINGS, "train_images": 4000, **KINDS[kind], "timeout_seconds": 60}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    process = subprocess.Popen(
        [*torchrun, "-m", "localsim", "run", "--out", str(path), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 240
    while not (path / "metrics.jsonl").exists() or not (path / "metrics.jsonl").read_bytes():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    for pid in _children(process.pid):
        os.kill(pid, TERM)
    process.send_signal(TERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "localsim: stopped; continue with --resume" in said, said
    step = steps_kept(path)[-1]
    assert 0 < step < 500 and re.search(rf"step {step - step % 2}/1000", said)
