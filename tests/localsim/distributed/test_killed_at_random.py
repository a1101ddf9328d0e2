"""`kill -9` at random moments of short runs: every one goes on to the bits of a run that nothing disturbed.

`pytest -m "slow or not slow" -s tests/localsim/distributed/test_killed_at_random.py` makes all fifty, and prints what
each of them hit.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from disturbed import STEPS, assert_same_end, crew, run_on, steps_kept

# reach 2: then messages go down too
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "two data-parallel": (2, {}),
    "two block-parallel": (2, {"parallel": "blocks", "reach": 2}),
}
EVERY_STEP: dict[str, Any] = {"checkpoint_minutes": 0}
NUMBER = dict(zip(KINDS, (16, 17, 17), strict=True))
CASES = [
    pytest.param(kind, seed, marks=pytest.mark.slow if seed >= 2 else [])
    for kind, number in NUMBER.items()
    for seed in range(number)
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, tuple[Path, float]]:
    """A run of every kind, and how many seconds it takes from one checkpoint to the next."""
    made = {}
    for number, (kind, (num, settings)) in enumerate(KINDS.items()):
        path = tmp_path_factory.mktemp("undisturbed") / str(number)
        with crew(num, path, **EVERY_STEP, **settings) as started:
            _wait_for(path / "checkpoints" / f"{1:08d}")
            first = time.monotonic()
            _wait_for(path / "checkpoints" / f"{STEPS:08d}")
            made[kind] = path, (time.monotonic() - first) / (STEPS - 1)
            assert [one.code for one in started.ended()] == [0] * num
    return made


def _wait_for(path: Path, *, or_for: Path | None = None, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not (path.exists() or (or_for is not None and or_for.exists())):
        assert time.monotonic() < until, f"{path} has not come"
        time.sleep(0.0005)


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_a_run_that_is_killed_at_a_random_moment_goes_on_to_the_same_bits(tmp_path, undisturbed, kind, seed):
    """A checkpoint is written after every step, so that many kills come while one is being written."""
    (num, settings), (whole, seconds) = KINDS[kind], undisturbed[kind]
    path = tmp_path / "run"
    draw = random.Random(f"{kind} {seed}")
    after, share, writing = draw.randrange(STEPS - 1), draw.random(), draw.random() < 0.5
    victims = draw.choice([[0], [num - 1], list(range(num))])
    named, partial = (path / "checkpoints" / name for name in (f"{after:08d}", f".{after + 1:08d}.partial"))
    begun = f"checkpoint {after + 1} was begun" if writing else f"checkpoint {after} was there"
    case = f"{kind}, seed {seed}: {victims} killed {share / (1 + writing):.2f} of a step after {begun}"
    with crew(num, path, **EVERY_STEP, timeout_seconds=60, **settings) as started:
        if writing:  # which may be done before it is seen
            _wait_for(partial, or_for=path / "checkpoints" / f"{after + 1:08d}")
        else:
            _wait_for(named if after else path / "config.json")
        until = time.monotonic() + share * seconds * (0.5 if writing else 1)
        while time.monotonic() < until and not (path / "checkpoints" / f"{STEPS - 1:08d}").exists():
            time.sleep(0.001)
        started.send(signal.SIGKILL, *victims)
        ended = started.ended(90)
    left, cut = steps_kept(path), [file.name for file in path.rglob(".*.partial*")]
    print(f"{case}; exit codes {[one.code for one in ended]}; checkpoints {left}; cut short: {cut}")
    assert [ended[rank].code for rank in set(victims)] == [-signal.SIGKILL] * len(set(victims)), (case, ended)
    assert all(one.code in (-signal.SIGKILL, 1) and "Traceback" not in one.said for one in ended), (case, ended)
    again = run_on(num, path, resume=True)
    assert [one.code for one in again] == [0] * num, (case, again)
    try:
        assert_same_end(path, whole)
    except AssertionError as error:
        raise AssertionError(case) from error
    assert not list((path / "checkpoints").rglob(".*")), "nothing half-written is left"
