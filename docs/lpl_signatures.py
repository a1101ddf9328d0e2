"""Trains LPL and its ablations on CIFAR-10 and prints the signatures of collapse: docs/results.md, "LPL".

`python docs/lpl_signatures.py OUT --data-root DIR` makes a run folder per condition in OUT and skips those that are
finished. Halvagal & Zenke 2023, Fig. 3: without decorrelation representations fall into few dimensions, without the
Hebbian (variance) term onto a point, without prediction accuracy falls with depth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import localsim
from localsim.analysis.extract import RAW, collect_features
from localsim.analysis.geometry import participation_ratio
from localsim.data import plain_batches
from localsim.network import LocalNetwork
from localsim.opening import open_data
from localsim.runs import Run, load_run

CONDITIONS = {
    "LPL": {},
    "shuffled positives": {"positives": "shuffled"},
    "predictive term off": {"pull": 0.0},
    "decorrelation off": {"decorrelation": 0.0},
    "Hebbian (variance) term off": {"push": 0.0},
}
SETTINGS = {
    "preset": "cifar10",
    "train_images": 10_000,
    "test_images": 5_000,
    "probe_images": 5_000,
    "epochs": 4,
    "on_collapse": "continue",  # to see it through
}


def participation(run: Run, net: LocalNetwork) -> list[float]:
    """Return the participation ratio of every stage's pooled output on the test images."""
    config = run.config
    data = open_data(config)
    assert data.test is not None
    batches = plain_batches(data.test, size=config.image_size, batch_size=250, mean=data.mean, std=data.std)
    features, _ = collect_features(net, batches, precision=config.precision)
    return [participation_ratio(features[stage, RAW].numpy()) for stage in range(len(net.stages))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-root")
    parser.add_argument("--epochs", type=int, default=SETTINGS["epochs"])
    chosen = parser.parse_args()
    rows: dict[str, tuple[list[str], list[float]]] = {}
    for name, options in CONDITIONS.items():
        path = chosen.out / "-".join(["lpl", *(f"{option}={value}" for option, value in options.items())])
        if not (path / "probe.json").exists():
            resume = (path / "config.json").exists()
            given = {} if resume else {**SETTINGS, "epochs": chosen.epochs, "objective_options": options}
            localsim.run("lpl", out=path, resume=resume, data_root=chosen.data_root, **given)
        run = load_run(path)
        table = run.probe()
        assert table is not None
        for network, net in (("untrained", run.network("untrained")), ("lpl", run.network())):
            shown = name if network == "lpl" else "untrained"
            if shown not in rows:
                probed = table.select(network=network, probe="linear", features="raw")
                cells = [f"{100 * row.accuracy:.1f} ± {50 * (row.high - row.low):.1f}" for row in probed]
                rows[shown] = cells, participation(run, net)
    layers = range(1, 1 + len(next(iter(rows.values()))[0]))
    for title, which in (("linear probe, accuracy in %", 0), ("participation ratio", 1)):
        print(f"\n| {title} | " + " | ".join(f"layer {layer}" for layer in layers) + " |")
        print("|---" * (len(layers) + 1) + "|")
        for name, row in rows.items():
            cells = [value if isinstance(value, str) else f"{value:.1f}" for value in row[which]]
            print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
