"""Disks that are full, slow or read-only, and checkpoints that are cut short, under runs on two processes."""

from __future__ import annotations

import errno
import time
from functools import partial

import pytest
from disturbed import (
    KINDS,
    assert_goes_on,
    assert_same_end,
    assert_told,
    before_step,
    both,
    fail_after,
    obey_permissions,
    run_on,
    slow_disk,
    steps_kept,
)


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        (
            "data",
            "save_file",
            r"the checkpoint after step 6 could not be written \(No space left on device\); ",
        ),
        ("blocks", "append_metrics", r"No space left on device; "),
    ],
)
def test_a_full_disk_ends_all_processes_and_leaves_nothing_half_written(tmp_path, undisturbed, kind, name, told):
    path = tmp_path / "run"
    full = {0: partial(fail_after, 5, name, errno.ENOSPC)}
    writer, other = run_on(2, path, disturb=full, timeout_seconds=60, checkpoint_minutes=0, **KINDS[kind])
    assert_told(writer, code=1, sentence="^localsim: " + told + r".*00000005 is kept; .*--resume$")
    assert other.code == 1 and "Traceback" not in other.said and "localsim: " not in other.said, "one says it, for both"
    assert steps_kept(path) == [4, 5]
    assert not list(path.rglob("*.partial*"))
    assert_goes_on(path, undisturbed[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_is_cut_short_is_set_aside_on_all_processes(tmp_path, undisturbed, kind):
    path = tmp_path / "run"
    assert [one.code for one in run_on(2, path, checkpoint_minutes=0, max_steps=6, **KINDS[kind])] == [0, 0]
    state = path / "checkpoints" / "00000006" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    said = assert_goes_on(path, undisturbed[kind])
    assert "00000006 is damaged and was set aside as damaged-00000006; the run goes on from step 5" in said
    assert "continued after step 5 of 8" in said


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_trained(tmp_path):
    (tmp_path / "file").touch()
    ended = run_on(2, tmp_path / "file" / "run", logs=tmp_path)
    assert_told(*ended, code=2, sentence=r"^localsim: .*file.*Not a directory")
    (tmp_path / "locked").mkdir(mode=0o555)
    obey = dict.fromkeys((0, 1), obey_permissions)
    path = tmp_path / "locked" / "runs" / "run"
    ended = run_on(2, path, disturb=obey, logs=tmp_path)
    assert_told(*ended, code=2, sentence=rf"^localsim: run folder {path} cannot be written: Permission denied$")


def test_a_folder_that_becomes_read_only_ends_all_processes_with_a_sentence(tmp_path, undisturbed):
    path = tmp_path / "run"
    locks = partial(before_step, 5, partial((path / "checkpoints").chmod, 0o555))
    try:
        ended = run_on(2, path, disturb={0: partial(both, obey_permissions, locks)}, timeout_seconds=60)
    finally:
        (path / "checkpoints").chmod(0o755)
    assert_told(*ended, code=1, sentence=r"^localsim: Permission denied: .*00000004 is kept; put the .*with --resume$")
    assert steps_kept(path) == [4]
    assert_goes_on(path, undisturbed["data"])


def test_a_slow_disk_is_waited_for_below_the_time_out(tmp_path, undisturbed):
    path = tmp_path / "run"
    ended = run_on(2, path, disturb={0: partial(slow_disk, 2.0)}, timeout_seconds=60)
    assert [one.code for one in ended] == [0, 0], ended
    assert_same_end(path, undisturbed["data"])


def test_a_disk_that_is_slower_than_the_time_out_ends_all_and_leaves_the_checkpoint_whole(tmp_path, undisturbed):
    path = tmp_path / "run"
    start = time.monotonic()
    ended = run_on(2, path, disturb={0: partial(slow_disk, 7.0)}, timeout_seconds=4)
    assert time.monotonic() - start < 60
    assert_told(*ended, code=1, sentence=r"has lost another, which is gone or has not answered within 4 s .*--resume$")
    assert steps_kept(path) == [4]
    assert_goes_on(path, undisturbed["data"])
