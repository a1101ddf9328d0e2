"""Compares the networks of docs/rules_on_cifar.py and draws the figures of docs/results.md.

`python docs/analysis_on_cifar.py OUT --data-root DIR --to FOLDER` reads the runs that
`python docs/rules_on_cifar.py OUT --data-root DIR --rules RULES` has made, with `--seed 1` a second time, and writes
figures and tables to FOLDER: similarity of all stages, their geometry, and the alignment of updates with
backpropagation, also, as a control, where the last loss has an untrained head. `--only` chooses among these.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from scipy.stats import sem, t

from localsim.analysis import alignment_over_training, compare, gradient_alignment, plots, stage_geometry
from localsim.analysis.tables import as_csv
from localsim.analysis.updates import AlignmentTable
from localsim.files import write_text
from localsim.opening import open_data, open_device, open_loader
from localsim.runs import Run, load_run

RULES = ("untrained", "end_to_end", "blockwise", "loco", "layerwise", "greedy_infomax")
PARTS = ("similarity", "geometry", "updates", "control")
BATCHES = 8


def similarity(runs: list[Run], images: int, to: Path, cache: Path) -> None:
    for measure, over_training, permutations in (("cka_debiased", True, 50), ("rsa", False, 0)):
        comparison = compare(
            *runs,
            images=images,
            measure=measure,
            over_training=over_training,
            resamples=100,
            permutations=permutations,
            cache=cache,
        )
        kept = comparison.save(to)
        write_text(kept / "profiles.txt", f"{comparison}\n")
        print(comparison)


def all_geometry(runs: list[Run], images: int, to: Path, cache: Path) -> None:
    described, rows = {}, []
    for run in (run for run in runs if run.config.seed == 0):
        found = stage_geometry(run, layers="ends", images=images, cache=cache)
        described[run.config.rule] = [(layer.depth, quantities) for layer, quantities in found.items()]
        for layer, quantities in found.items():
            where = {"rule": run.config.rule, "layer": layer.name, "depth": layer.depth}
            rows += [where | asdict(row) for row in quantities]
    columns = ("rule", "layer", "depth", "quantity", "value", "low", "high", "n")
    write_text(to / "geometry.csv", as_csv(rows, columns))
    save(plots.geometry_by_stage(described), to / "geometry")


def updates(runs: list[Run], to: Path) -> None:
    tables: dict[str, AlignmentTable] = {}
    for run in runs:
        if run.config.seed == 0 and run.step and run.config.rule != "end_to_end":  # which is the reference itself
            tables[run.config.rule] = alignment_over_training(run)
            write_text(to / f"updates-{run.config.rule}.csv", tables[run.config.rule].to_csv())
            print(f"{tables[run.config.rule]}\n")
    save(plots.update_alignment(tables), to / "updates")


def updates_control(runs: list[Run]) -> None:
    """Print the alignment at the end of training with the last loss's own head, and with that head as initialised."""
    print("| rule | head of the last loss | stage | cosine |\n|---|---|---|---|")
    for run in runs:
        if run.config.seed or not run.step or run.config.rule == "end_to_end":
            continue
        data = open_data(run.config)
        loader = open_loader(run.config, data, open_device(run.config.device))
        for which in ("trained", "as initialised"):
            net = run.network()
            if which != "trained":
                net.taps[-1].load_state_dict(run.network("untrained").taps[-1].state_dict())
            cosines: dict[int, list[float]] = {}
            for number, batch in zip(range(BATCHES), loader.epoch(0), strict=False):
                for row in gradient_alignment(net, *batch.views, labels=batch.labels, key=number):
                    if row.level == "stage" and row.stage is not None and row.cosine is not None:
                        cosines.setdefault(row.stage, []).append(row.cosine)
            for stage, values in cosines.items():
                half = t.ppf(0.975, len(values) - 1) * sem(values)
                print(f"| {run.config.rule} | {which} | {stage} | {fmean(values):.3f} ± {half:.3f} |")


def save(figure, path: Path) -> None:
    for suffix in (".png", ".svg"):
        plots.save(figure, path.with_suffix(suffix))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--data-root")
    parser.add_argument("--to", type=Path, required=True, help="folder for figures and tables")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--only", default=",".join(PARTS), help=", ".join(PARTS))
    chosen = parser.parse_args()
    paths = [chosen.out / f"{rule}{suffix}" for rule in RULES for suffix in ("", "-s1")]
    runs = [load_run(path).moved(data_root=chosen.data_root) for path in paths if path.exists()]
    parts = chosen.only.split(",")
    if "similarity" in parts:
        similarity(runs, chosen.images, chosen.to, chosen.to / "cache")
    if "geometry" in parts:
        all_geometry(runs, chosen.images, chosen.to, chosen.to / "cache")
    if "updates" in parts:
        updates(runs, chosen.to)
    if "control" in parts:
        updates_control(runs)


if __name__ == "__main__":
    main()
