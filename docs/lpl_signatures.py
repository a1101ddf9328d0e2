"""Trains LPL and its ablations on CIFAR-10 and prints the signatures of collapse: docs/results.md, "LPL".

`python docs/lpl_signatures.py OUT --data-root DIR` makes a run folder per condition in OUT and skips those that are
finished; `--only "LPL,predictive term off"` makes and prints these alone. Halvagal & Zenke 2023, Fig. 3: without
decorrelation representations fall into few dimensions, without the Hebbian (variance) term onto a point, without
prediction accuracy falls with depth.
"""

from __future__ import annotations

from cifar_runs import BUDGET, arguments, cell, heading, make_run

from localsim.analysis.extract import RAW, collect_features
from localsim.analysis.geometry import participation_ratio
from localsim.data import plain_batches
from localsim.network import LocalNetwork
from localsim.opening import open_data
from localsim.runs import Run

CONDITIONS = {
    "LPL": {},
    "shuffled positives": {"positives": "shuffled"},
    "predictive term off": {"pull": 0.0},
    "decorrelation off": {"decorrelation": 0.0},
    "Hebbian (variance) term off": {"push": 0.0},
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
    parser = arguments(__doc__)
    parser.add_argument("--only", metavar="NAME,NAME", default=",".join(CONDITIONS))
    chosen = parser.parse_args()
    names = chosen.only.split(",")
    for name in names:
        if name not in CONDITIONS:
            parser.error(f"there is no condition {name!r}; allowed: {', '.join(CONDITIONS)}")
    rows: dict[str, tuple[list[str], list[float]]] = {}
    for name in names:
        options = CONDITIONS[name]
        path = chosen.out / "-".join(["lpl", *(f"{option}={value}" for option, value in options.items())])
        given = {**BUDGET, "epochs": chosen.epochs, "objective_options": options}
        run = make_run(path, "lpl", chosen.data_root, **given)
        table = run.probe()
        assert table is not None
        for network, net in (("untrained", run.network("untrained")), ("lpl", run.network())):
            shown = name if network == "lpl" else "untrained"
            if shown not in rows:
                probed = table.select(network=network, probe="linear", features="raw")
                rows[shown] = [cell(row) for row in probed], participation(run, net)
    layers = [f"layer {number}" for number in range(1, 1 + len(rows["untrained"][0]))]
    for title, which in (("linear probe, accuracy in %", 0), ("participation ratio", 1)):
        print("\n" + heading(title, layers))
        for name, row in rows.items():
            cells = [value if isinstance(value, str) else f"{value:.1f}" for value in row[which]]
            print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
