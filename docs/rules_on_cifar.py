"""Trains every rule on CIFAR-10 at equal budget and prints the table of docs/results.md.

`python docs/rules_on_cifar.py OUT --data-root DIR` makes a run folder per rule in OUT and skips those that are
finished, `--table` only prints. Rules that have a backbone of their own keep it; all others share a ResNet-18, and all
see the same images equally often.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import localsim
from localsim.analysis.stage_probe import ProbeRow
from localsim.rules import own_rules
from localsim.runs import Run, load_run

SETTINGS = {
    "preset": "cifar10",
    "train_images": 10_000,
    "test_images": 5_000,
    "probe_images": 5_000,
    "epochs": 4,
    "zero_init_residual": False,  # else an untrained residual network is a chain of strided shortcuts
    "on_collapse": "continue",
}
SHARED = {"backbone": "resnet18"}
# 32 pixels hold 3 x 3 of the published patches: one prediction, one row further than the neighbour
PATCHED = {"image_size": 32}


def settings(name: str) -> dict:
    """Return what a rule is run with."""
    (rule,) = [rule for rule in own_rules() if rule.name == name]
    chosen = {**SETTINGS, **({} if "backbone" in rule.settings else SHARED)}
    if "patches" in rule.settings:
        chosen |= PATCHED
    return {name: value for name, value in chosen.items() if name not in rule.meaningless}


def cell(row: ProbeRow) -> str:
    assert row.gain is not None or row.network in ("untrained", "calibrated")
    return f"{100 * row.accuracy:.1f} ± {50 * (row.high - row.low):.1f}"


def table(runs: dict[str, Run]) -> str:
    """Return linear-probe accuracy of every stage of every rule, after the untrained network of each backbone."""
    probed = {name: run.probe() for name, run in runs.items()}
    deepest = max(len(run.network("untrained").stages) for run in runs.values())
    lines = ["| network | backbone | " + " | ".join(f"stage {i + 1}" for i in range(deepest)) + " |"]
    lines.append("|---" * (deepest + 2) + "|")
    seen = set()
    for name, run in runs.items():
        found = probed[name]
        assert found is not None
        for network in found.networks:
            config = run.config
            # the calibrated one has its rule's noise and views too; one of each cut is enough to show
            control = (network, config.backbone, config.granularity, config.patches)
            if network in ("untrained", "calibrated"):
                if control in seen:
                    continue
                seen.add(control)
            rows = found.select(network=network, probe="linear", features="raw")
            cells = [cell(row) for row in rows] + [""] * (deepest - len(rows))
            shown = f"`{name}`" if network == name else f"{network} (as for `{name}`)"
            lines.append(f"| {shown} | {config.backbone} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-root")
    parser.add_argument("--rules", default=",".join(rule.name for rule in own_rules()))
    parser.add_argument("--epochs", type=int, default=SETTINGS["epochs"])
    parser.add_argument("--table", action="store_true", help="print the table of the runs that are finished")
    chosen = parser.parse_args()
    names = chosen.rules.split(",")
    for name in [] if chosen.table else names:
        path = chosen.out / name
        if not (path / "probe.json").exists():
            resume = (path / "config.json").exists()
            given = {} if resume else {**settings(name), "epochs": chosen.epochs}
            localsim.run(name, out=path, resume=resume, data_root=chosen.data_root, **given)
    print(table({name: load_run(chosen.out / name) for name in names if (chosen.out / name / "probe.json").exists()}))


if __name__ == "__main__":
    main()
