"""What the fuzzed tests share: counted cases, a run to damage, and what may come of a case: success or a sentence."""

from __future__ import annotations

import contextlib
import io
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny import train_in

from localsim import experiment
from localsim.cli import main
from localsim.errors import UserError

TIMES = int(os.environ.get("LOCALSIM_FUZZ", "1"))
"""LOCALSIM_FUZZ=20 makes twenty times as many cases, and others every time; without it they are always the same."""
LONGEST = 30
"""Seconds: a case that takes longer counts as one that hangs."""
MOST = 1000
"""Characters that a sentence may have."""
STEPS = 2
"""That the run has been trained for; it has a checkpoint of each."""


CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much, HealthCheck.large_base_example]


def fuzz(number: int, cases: st.SearchStrategy[Any], check: Callable[[Any], object]) -> None:
    """Call `check(case)` for at least `number` drawn cases, each within `LONGEST` seconds."""
    seen = 0

    # not shrunk: cases are small, and a failure should show at once
    @settings(deadline=None, derandomize=TIMES == 1, max_examples=number * TIMES, database=None,
              phases=[Phase.generate], suppress_health_check=CHECKS)  # fmt: skip
    @given(cases)
    def one(case: Any) -> None:
        nonlocal seen
        seen += 1
        began = time.monotonic()
        check(case)
        assert time.monotonic() - began < LONGEST

    one()
    assert seen >= number * TIMES


def make_run(path: Path) -> Path:
    """Train a run that takes a second, of a network that is built in milliseconds, with both kinds of buffers."""
    train_in(path, backbone="vgg6", backbone_width=0.05, granularity=2, augmentation="crop_flip", epochs=1,
             train_images=8 * STEPS, warmup_epochs=0.2, probe_protocol="none", checkpoint_minutes=0)  # fmt: skip
    return path


def without_pictures(patched: Any) -> None:
    """Leave out what takes most of a command's second, and reads nothing that is fuzzed."""
    patched.setattr(experiment, "draw_views", lambda *_: None)
    patched.setattr(experiment, "draw_credit", lambda *_: None)
    patched.setattr(experiment.plots, "save", lambda *_: None)


def outcome(do: Callable[[], Any]) -> Any:
    """Return what `do()` returns, or the UserError that it raises; whatever else it raises is a failure."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return do()
    except UserError as error:
        assert_sentence(str(error))
        return error


def refused(do: Callable[[], Any]) -> str:
    """Return the sentence with which `do()` is refused."""
    error = outcome(do)
    assert isinstance(error, UserError), error
    return str(error)


def command(*arguments: str) -> tuple[int, str]:
    """Return the exit code of a command and what it says on stderr besides its progress: a sentence, if it is not 0."""
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        warnings.simplefilter("always")
        try:
            code = main(arguments)
        except SystemExit as stopped:
            assert isinstance(stopped.code, int)
            code = stopped.code
    assert code in (0, 1, 2)
    lines = [line for line in said.getvalue().splitlines() if not line.startswith("step ")]
    for line in lines:
        assert line.startswith("localsim"), lines
        assert_sentence(line)
    assert lines or code == 0
    return code, "\n".join(lines)


def assert_sentence(text: str) -> None:
    assert text.strip() and "\n" not in text and "Traceback" not in text, text
    assert len(text) <= MOST + len("localsim: "), text
