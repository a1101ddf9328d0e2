"""Prints the tables of docs/results.md from probed runs: `python docs/results_table.py RUN...`.

Runs that were cut differently are compared at the same depth: where a stage ends at the same unit block.
"""

from __future__ import annotations

import sys
from itertools import accumulate

from localsim.analysis.stage_probe import ProbeRow
from localsim.assembly import build_trunk
from localsim.runs import Run, load_run


def depths(run: Run) -> list[int]:
    """Return after how many unit blocks each stage of a run ends."""
    return list(accumulate(len(units) for units in build_trunk(run.config)[1]))


def cell(row: ProbeRow) -> str:
    return f"{100 * row.accuracy:.1f} [{100 * row.low:.1f}, {100 * row.high:.1f}]"


def main(paths: list[str]) -> None:
    runs = [load_run(path) for path in paths]
    shared = sorted(set.intersection(*(set(depths(run)) for run in runs)))
    for probe in ("linear", "knn"):
        print(f"\n{probe} probe of raw stage output, accuracy in % [95 % interval]\n")
        print("| regime | " + " | ".join(f"after unit block {depth}" for depth in shared) + " |")
        print("|---" * (len(shared) + 1) + "|")
        seen = set()
        for run in runs:
            table = run.probe()
            assert table is not None, f"{run.path} has not been probed"
            for network in table.networks:
                rows = {row.stage: row for row in table.select(network=network, probe=probe, features="raw")}
                # the untrained network of a seed is the same in every run, the calibrated one has the rule's noise
                name = f"{network} ({run.config.rule})" if network == "calibrated" else network
                if name not in seen:
                    seen.add(name)
                    cells = [cell(rows[depths(run).index(depth) + 1]) for depth in shared]
                    print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
