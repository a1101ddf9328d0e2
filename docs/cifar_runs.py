"""What the scripts behind docs/results.md share: a small CIFAR-10 budget, and runs that are made once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import localsim
from localsim.analysis.stage_probe import ProbeRow
from localsim.errors import UserError
from localsim.runs import Run, load_run

BUDGET: dict[str, Any] = {
    "preset": "cifar10",
    "train_images": 10_000,
    "test_images": 5_000,
    "probe_images": 5_000,
    "epochs": 4,
    "on_collapse": "continue",  # to see it through
}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of where runs are kept, where the data lie and for how long to train."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-root")
    parser.add_argument("--epochs", type=int, default=BUDGET["epochs"])
    return parser


def make_run(path: Path, rule: str, data_root: str | None, **settings: Any) -> Run:
    """Return the run in the folder `path`: as it is where it is finished, else continued or begun.

    Raises:
        UserError: the run there was trained for another number of epochs, or cannot be continued with these settings.
    """
    if not (path / "probe.json").exists():
        resume = (path / "config.json").exists()
        return localsim.run(rule, out=path, resume=resume, data_root=data_root, **settings)
    run = load_run(path)
    if run.config.epochs != settings["epochs"]:
        raise UserError(
            f"{path} was trained for {run.config.epochs} epochs, not {settings['epochs']}; give another OUT"
        )
    return run


def cell(row: ProbeRow) -> str:
    """Return an accuracy in % with half its 95 % interval."""
    return f"{100 * row.accuracy:.1f} ± {50 * (row.high - row.low):.1f}"


def heading(first: str, columns: list[str]) -> str:
    """Return the first two lines of a table."""
    return f"| {first} | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|"
