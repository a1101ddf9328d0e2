"""Tables of sweeps with known numbers, for tests of what is made of them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from localsim.analysis.sweep_rows import SweepRow
from localsim.analysis.sweeps import SweepTable

CUTS = {1: [4], 2: [2, 2], 4: [1, 1, 1, 1]}
"""Unit blocks of the stages of a trunk of four."""


def made_up_rows(
    granularity: int = 2, reach: int | None = 1, seed: int = 0, accuracy: float = 0.5, **changes: Any
) -> list[SweepRow]:
    """Return the rows of a run whose last stage has this accuracy, each stage below it a hundredth less."""
    units, span = CUTS[granularity], reach or 1
    last = len(units)
    rows = []
    for stage, unit in enumerate(accumulate(units), start=1):
        here = accuracy - (last - stage) / 100
        bare = 0.2 + seed / 100 - unit / 100
        row: dict[str, Any] = {
            "run": f"granularity{granularity}-reach{reach}-seed{seed}",
            "rule": "blockwise",
            "regime": f"blockwise granularity={granularity} reach={reach}",
            "granularity": granularity,
            "reach": reach,
            "seed": seed,
            "image_size": 32,
            "batch_size": 8,
            "settings": {},
            "data": "cifar10",
            "backbone": "four_units",
            "stage": stage,
            "num_stages": last,
            "unit": unit,
            "depth": unit / 4,
            "path": 4 // granularity * span,
            "stage_path": 4 // granularity * min(span, last - stage + 1),
            "held_bytes": 2**20 * (2 + 4 // granularity * span),
            "trunk_parameters": 1000,
            "tap_parameters": 10**6 * (last - span + 1),
            "seconds_per_step": 0.5,
            "steps": 10,
            "probe": "linear",
            "features": "raw",
            "accuracy": here,
            "low": here - 0.02,
            "high": here + 0.03,
            "untrained": bare,
            "untrained_low": bare - 0.01,
            "untrained_high": bare + 0.01,
            "calibrated": bare + 0.05,
            "calibrated_low": bare + 0.04,
            "calibrated_high": bare + 0.06,
            "gain": here - bare,
            "gain_low": here - bare - 0.02,
            "gain_high": here - bare + 0.02,
            "calibrated_gain": here - bare - 0.05,
            "calibrated_gain_low": here - bare - 0.07,
            "calibrated_gain_high": here - bare - 0.03,
            "n_test": 1000,
            "n_train": 500,
            "chance": 0.1,
        }
        rows.append(SweepRow(**{**row, **changes}))
    return rows


def made_up_table(
    *, seeds: int = 2, granularities: tuple[int, ...] = (1, 2, 4), reaches: tuple[int, ...] = (1, 2)
) -> SweepTable:
    """Return the table of a grid, without the cells that reach further than there are stages.

    The last stage's accuracy is 0.4 + granularity / 100 + reach / 10 + seed / 50.
    """
    return SweepTable(
        tuple(
            row
            for granularity in granularities
            for reach in reaches
            for seed in range(seeds)
            if reach <= granularity
            for row in made_up_rows(granularity, reach, seed, 0.4 + granularity / 100 + reach / 10 + seed / 50)
        )
    )
