"""Processes that are killed or cut off: the others end in time with a sentence, the run goes on to the same bits."""

from __future__ import annotations

import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from disturbed import (
    KINDS,
    STEPS,
    assert_same_end,
    assert_told,
    before_step,
    crew,
    files,
    raise_signals,
    run_on,
    slow_groups,
    steps_kept,
)

import localsim

LOST = r"^localsim: process \d of 2 has lost another, which is gone or has not answered within {} s \(.+\); "
GO_ON = r".*00000004 is kept; start all processes again with --resume$"


def _step(kind: str, rank: int) -> int:
    """Return a step before which process `rank` may go, with checkpoint 4 there and checkpoint 8 not."""
    return 7 if kind == "blocks" and rank == 1 else 5  # the bottom stages are up to three batches ahead


def resume(num: int, path: Path, **settings: Any) -> None:
    ended = run_on(num, path, resume=True, **settings)
    assert [one.code for one in ended] == [0] * num, ended


@pytest.mark.parametrize(("kind", "rank"), [("data", 0), ("data", 1), ("blocks", 0), ("blocks", 1)])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path, undisturbed, kind, rank):
    """Rank 0 writes the folder and hosts the store; under `blocks` it has the top stages, rank 1 the bottom ones."""
    path, settings = tmp_path / "run", KINDS[kind]
    dies = partial(before_step, _step(kind, rank), partial(raise_signals, signal.SIGKILL))
    start = time.monotonic()
    ended = run_on(2, path, disturb={rank: dies}, timeout_seconds=60, **settings)
    assert time.monotonic() - start < 60, "a connection that is closed is noticed at once"
    assert ended[rank].code == -signal.SIGKILL
    assert_told(ended[1 - rank], code=1, sentence=LOST.format(60) + GO_ON)
    assert steps_kept(path) == [4]
    copy = shutil.copytree(path, tmp_path / "copy")
    resume(2, path, **settings)
    assert_same_end(path, undisturbed[kind])
    if rank == 1:  # on another number of processes
        resume(1, copy, parallel="data")
        assert localsim.load_run(copy).step == STEPS
        if kind == "blocks":
            assert_same_end(copy, undisturbed[kind])


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("data", 0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("data", 1), ("blocks", 0), ("blocks", 1))),
    ],
)
def test_a_process_that_is_cut_off_ends_the_others_within_the_time_out_and_harms_nothing_later(
    tmp_path, undisturbed, kind, rank
):
    """A stopped process keeps its connections open and never answers, as behind a network that is cut."""
    path, settings = tmp_path / "run", KINDS[kind]
    stops = partial(before_step, _step(kind, rank), partial(raise_signals, signal.SIGSTOP))
    with crew(2, path, disturb={rank: stops}, timeout_seconds=4, **settings) as started:
        stopped = started.wait_until_stopped(rank)
        (other,) = started.ended(90, [1 - rank])
        # a wait for the other, and one for what it may have said of itself
        assert time.monotonic() - stopped < 2 * 4 + 10
        assert_told(other, code=1, sentence=LOST.format(4) + GO_ON)
        if rank == 0:  # the writer has the lock, be it stopped
            (refused,) = run_on(1, path, resume=True, parallel="data")
            assert refused.code == 2 and "is being written by another process" in refused.said
        before = files(path)
        started.send(signal.SIGCONT, rank)
        (late,) = started.ended(90, [rank])
        assert_told(late, code=1, sentence=LOST.format(4) + GO_ON)
        assert files(path) == before, "it writes nothing any more"
    assert steps_kept(path) == [4]
    resume(2, path, **settings)
    assert_same_end(path, undisturbed[kind])


def test_groups_of_processes_that_are_never_made_are_not_waited_for_beyond_the_time_out(tmp_path):
    """gloo tries five times, a time-out each, to connect with a process that died while it did the same."""
    start = time.monotonic()
    ended = run_on(2, tmp_path / "run", disturb={0: partial(slow_groups, 60)}, timeout_seconds=4)
    assert time.monotonic() - start < 45
    assert_told(
        *ended, code=1, sentence=LOST.format(4) + r".*no checkpoint yet; start all processes again with --resume$"
    )
