"""Whole runs: the same bits with stages spread over processes, and checkpoints that go on on other numbers of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import on_processes, train_together
from tiny import TINY, assert_same_tensors, checkpoint_tensors

import localsim
from localsim import runs
from localsim.credit import Credit

STEPS = 50
SETTINGS: dict[str, Any] = {
    **TINY,
    "rule": "blockwise",
    "backbone": "small",
    "granularity": 4,
    "train_images": TINY["batch_size"] * STEPS,
    "epochs": 1,
    "warmup_epochs": 0.1,
    "log_every": 5,
    "probe_protocol": "none",
}


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the metrics without what the clock and the memory of one process decide."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in row.items() if n not in ("images_per_second", "held_bytes")} for row in lines]


def assert_same_run(here: Path, there: Path) -> None:
    """Assert equality bit for bit: weights, optimiser, monitor and metrics."""
    assert_same_tensors(checkpoint_tensors(here), checkpoint_tensors(there))
    folders = [runs.newest_checkpoint(path) for path in (here, there)]
    assert folders[0] is not None and folders[1] is not None
    for name in ("optimizer.pt", "monitor.pt"):
        one, other = (runs.load_plain(folder / name) for folder in folders if folder is not None)
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert rows(here) == rows(there)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Fifty steps in one process that nothing disturbed; not to be changed."""
    path = tmp_path_factory.mktemp("together") / "alone"
    on_processes(1, train_together, [{**SETTINGS, "out": path}])
    return path


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_stages_spread_over_processes_make_the_run_of_one(alone, tmp_path, processes):
    on_processes(processes, train_together, [{**SETTINGS, "out": tmp_path / "spread", "parallel": "blocks"}])
    assert_same_run(tmp_path / "spread", alone)
    (start,) = json.loads((tmp_path / "spread" / "environment.json").read_text())
    assert start["processes"] == processes
    assert "by place: stage" in (tmp_path / "spread" / "plan.txt").read_text()


def test_a_run_goes_on_spread_otherwise_to_the_same_bits(alone, tmp_path):
    """One process, then two, then three, then one again."""
    out = tmp_path / "moved"
    on_processes(1, train_together, [{**SETTINGS, "out": out, "max_steps": 12}])
    for processes, stop in ((2, 27), (3, 41)):
        settings = {"out": out, "resume": True, "parallel": "blocks", "max_steps": stop}
        on_processes(processes, train_together, [settings])
        assert localsim.load_run(out).step == stop
    on_processes(1, train_together, [{"out": out, "resume": True}])
    assert_same_run(out, alone)


def test_stages_above_the_highest_tap_run_elsewhere_too(tmp_path):
    """Nothing is learned there, and nobody waits for what does not come."""
    settings = {**SETTINGS, "credit": Credit([[1, 0, 0, 0]], (0,)), "max_steps": 12}
    on_processes(1, train_together, [{**settings, "out": tmp_path / "one"}])
    on_processes(2, train_together, [{**settings, "out": tmp_path / "two", "parallel": "blocks"}])
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_a_divided_batch_can_be_divided_otherwise(tmp_path):
    """Two shares, then two shares of two groups of stages, then one process; equal but for rounding."""
    out = tmp_path / "shares"
    gentle = {"optimizer": "sgd", "lr": 0.01}
    on_processes(1, train_together, [{**SETTINGS, **gentle, "out": tmp_path / "one"}])
    on_processes(2, train_together, [{**SETTINGS, **gentle, "out": out, "max_steps": 15}])
    on_processes(4, train_together, [{"out": out, "resume": True, "parallel": "blocks:2", "max_steps": 30}])
    on_processes(1, train_together, [{"out": out, "resume": True}])
    mine, theirs = (checkpoint_tensors(path) for path in (out, tmp_path / "one"))
    assert mine.keys() == theirs.keys()
    assert max((mine[name] - x).abs().max() for name, x in theirs.items() if x.is_floating_point()) < 1e-3
    for row, expected in zip(rows(out), rows(tmp_path / "one"), strict=True):
        for name in ("loss", "effective_rank", "embedding_rank"):
            assert row[name] == pytest.approx(expected[name], rel=0.02), (row["step"], name)
        # of 40 images, one may be classified otherwise
        assert row["online_probe"] == pytest.approx(expected["online_probe"], abs=0.026), row["step"]
