"""Runs to report on, made once: two regimes, one of two seeds, probed and not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_config, train_in

from localsim import runs as run_folders
from localsim.analysis.report import write_report
from localsim.analysis.stage_probe import probe

SHORT = {"epochs": 1, "train_images": 16, "warmup_epochs": 0, "granularity": 2}


@pytest.fixture(scope="session")
def reported_runs(tmp_path_factory) -> Path:
    """Return where the runs `one`, `two` (of another seed, not probed) and `end` lie."""
    folder = tmp_path_factory.mktemp("reported")
    for name, rule, seed in (("one", "blockwise", 0), ("two", "blockwise", 1), ("end", "end_to_end", 0)):
        path = folder / name
        settings = {"probe_protocol": "none", **SHORT, "seed": seed}
        if rule == "end_to_end":
            settings["granularity"] = "network"
        train_in(path, rule, **settings)
        (path / "plan.txt").write_text("training: 1 epochs, 2 steps of 8 images x 2 views, adamw\n")
        run_folders.record_environment(path)
        if name != "two":
            probe(run_folders.load_run(path), images=20)
    return folder


@pytest.fixture(scope="session")
def whole_page(reported_runs, tmp_path_factory) -> Path:
    """Return the page of all three runs, with everything on it."""
    runs = [reported_runs / name for name in ("one", "two", "end")]
    return write_report(runs, tmp_path_factory.mktemp("whole") / "page.html", images=40)


@pytest.fixture(scope="session")
def untrained_run(tmp_path_factory) -> Path:
    """Return a run that has a configuration and nothing else, as of a run that failed in its first step."""
    path = tmp_path_factory.mktemp("failed") / "failed"
    run_folders.start_run(path, tiny_config("blockwise", **SHORT))
    (path / "plan.txt").write_text("training: 1 epochs, 2 steps of 8 images x 2 views, adamw\n")
    (path / "environment.json").write_text(json.dumps([]))
    return path
