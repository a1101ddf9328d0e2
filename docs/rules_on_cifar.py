"""Trains every rule on CIFAR-10 at equal budget and prints the table of docs/results.md.

`python docs/rules_on_cifar.py OUT --data-root DIR` makes a run folder per rule in OUT and skips those that are
finished, `--table` only prints. Rules that have a backbone of their own keep it; all others share a ResNet-18, and all
see the same images equally often.
"""

from __future__ import annotations

from cifar_runs import BUDGET, arguments, cell, heading, make_run

from localsim.rules import own_rules
from localsim.runs import Run, load_run

SETTINGS = {
    **BUDGET,
    "zero_init_residual": False,  # else an untrained residual network is a chain of strided shortcuts
    "snapshot_every": 1,  # for what changes over training
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


def table(runs: dict[str, Run]) -> str:
    """Return linear-probe accuracy of every stage of every rule, after the untrained network of each backbone."""
    probed = {name: run.probe() for name, run in runs.items()}
    deepest = max(len(run.network("untrained").stages) for run in runs.values())
    lines = [heading("network", ["backbone", *(f"stage {i + 1}" for i in range(deepest))])]
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
    parser = arguments(__doc__)
    parser.add_argument("--rules", default=",".join(rule.name for rule in own_rules()))
    parser.add_argument("--seed", type=int, default=0, help="runs of another seed than 0 are named RULE-sSEED")
    parser.add_argument("--table", action="store_true", help="print the table of the runs that are finished")
    chosen = parser.parse_args()
    names = chosen.rules.split(",")
    folders = {name: chosen.out / (f"{name}-s{chosen.seed}" if chosen.seed else name) for name in names}
    for name, path in ({} if chosen.table else folders).items():
        make_run(path, name, chosen.data_root, **{**settings(name), "epochs": chosen.epochs, "seed": chosen.seed})
    print(table({name: load_run(path) for name, path in folders.items() if (path / "probe.json").exists()}))


if __name__ == "__main__":
    main()
