"""Faults that begin in one process: a number that is none, a lost reader of images, a clock that is wrong."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
from disturbed import (
    KINDS,
    assert_goes_on,
    assert_same_end,
    assert_told,
    before_step,
    both,
    jump_clock,
    kill_an_image_worker,
    poison_images,
    poison_weights,
    run_on,
    say_saved,
    steps_kept,
)
from PIL import Image


@pytest.mark.parametrize(("kind", "poison"), [("data", poison_images), ("blocks", poison_weights)])
def test_a_loss_that_is_no_number_on_one_process_fails_all_and_keeps_the_last_good_checkpoint(
    tmp_path, undisturbed, kind, poison
):
    """In an image that process 1 alone has; in a stage that it alone runs. Checkpoint 5 led to the failure."""
    path = tmp_path / "run"
    disturb = {1: partial(before_step, 4, poison)}  # takes effect at the next step
    ended = run_on(2, path, disturb=disturb, timeout_seconds=60, checkpoint_minutes=0, **KINDS[kind])
    sentence = r"^localsim: the loss of tap stage\d is (nan|inf) at step 6; a lower --lr may help; .*is kept$"
    assert_told(*ended, code=1, sentence=sentence)
    assert "".join(one.said for one in ended).count("localsim: ") == 1, "one of them says it"
    assert steps_kept(path)[-1] == 4
    assert_goes_on(path, undisturbed[kind])


def test_a_reader_of_images_that_is_killed_ends_the_run_with_a_sentence(tmp_path):
    draw = np.random.default_rng(0)
    for number in range(40):  # of which a fifth is set aside
        folder = tmp_path / "images" / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (16 + number % 3, 20, 3), dtype=np.uint8)  # sizes differ: read on the way
        Image.fromarray(pixels).save(folder / f"{number}.png")
    # more batches than are read ahead
    settings = {"preset": "folder", "data": tmp_path / "images", "workers": 1, "test_images": 8, "batch_size": 4,
                "epochs": 1, "checkpoint_minutes": 0}  # fmt: skip
    whole, path = tmp_path / "whole", tmp_path / "run"
    assert [one.code for one in run_on(2, whole, **settings)] == [0, 0]
    ended = run_on(2, path, disturb={1: partial(before_step, 2, kill_an_image_worker)}, timeout_seconds=60, **settings)
    gone = r"^localsim: a process that reads images is gone \(DataLoader worker .*\); .*0000000\d is kept; .*--resume$"
    assert_told(*ended, code=1, sentence=gone)
    assert_goes_on(path, whole)


@pytest.mark.parametrize(("kind", "decides"), [pytest.param("data", 0, marks=pytest.mark.slow), ("blocks", 1)])
def test_when_a_checkpoint_is_due_is_decided_by_one_clock_and_changes_no_bit(tmp_path, undisturbed, kind, decides):
    """That of the process where a batch's first images enter; hours that pass on another are not counted."""
    hours = partial(jump_clock, 7200.0)
    for wrong, saved in ((1 - decides, [4, 8]), (decides, [1, 2, 3, 4, 5, 6, 7, 8])):
        path = tmp_path / f"wrong on {wrong}"
        disturb = {wrong: hours} if wrong else {wrong: partial(both, hours, say_saved)}
        ended = run_on(2, path, disturb={0: say_saved, **disturb}, checkpoint_minutes=60, **KINDS[kind])
        assert [one.code for one in ended] == [0, 0], ended
        assert [int(step) for step in re.findall(r"saved (\d+)", ended[0].said)] == saved
        assert_same_end(path, undisturbed[kind])
