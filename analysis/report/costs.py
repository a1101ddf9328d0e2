"""Section: what a step of each configuration costs, predicted and measured."""

from __future__ import annotations

from collections.abc import Sequence

from localsim.analysis.cost_plots import cost_figure
from localsim.analysis.report.elements import Fold, Note, Part, Section, Table, listed, picture, said
from localsim.analysis.report.reported import Reported, by_regime
from localsim.cost import Cost, cost
from localsim.cost_table import COLUMNS, in_words
from localsim.errors import UserError


def section(runs: Sequence[Reported]) -> Section:
    """Return the section."""
    parts: list[Part] = []
    found: dict[str, Cost] = {}
    regimes = by_regime(runs)
    for regime, (run, *_) in regimes.items():
        try:
            found[regime] = cost(run.run.config)
        except UserError as error:
            parts.append(Note(f"The cost of {regime} is not predicted: {said(error)}"))
    if found:
        meanings = Table("What the columns of predicted cost mean.", ["column", "meaning"],
                         [[column.head, column.meaning] for column in COLUMNS], names=(0, 1))  # fmt: skip
        parts += [_predicted(found), Fold("What the columns mean", [meanings])]
        parts.append(_measured(found, regimes))
    if len(found) > 1:
        parts.append(picture(
            cost_figure(list(found.values())), _alt(found),
            "Predicted cost against the number of stages, a line for each rule: held activations at the peak of a "
            "step, arithmetic of a step, longest gradient path.",
        ))  # fmt: skip
    return Section(
        "cost", "Cost",
        "What one training step takes: predicted from the configuration alone, by running the engine's own step on "
        "tensors without values, and held memory also as the runs measured it. Predictions are exact counts and have "
        "no intervals; they leave out temporary buffers, weights and the optimiser's state, and say nothing of time.",
        parts,
    )  # fmt: skip


def _predicted(found: dict[str, Cost]) -> Table:
    shared = [
        [regime, str(len(one.stages)), f"{one.backbone}, {one.image_size} px",
         f"{in_words('batch_size', one.batch_size)}, {in_words('views', one.views)}", one.precision,
         *(column.value(one) for column in COLUMNS)]
        for regime, one in found.items()
    ]  # fmt: skip
    return Table(
        "Predicted cost of a step of each regime. Held: activations that autograd holds at the peak; path and lock: in "
        "unit blocks; up, down, context: what stages send each other.",
        ["regime", "stages", "network", "batch", "precision", *(column.head for column in COLUMNS)],
        shared, names=(0, 2, 3, 4),
    )  # fmt: skip


def _measured(found: dict[str, Cost], regimes: dict[str, list[Reported]]) -> Table:
    rows = []
    for regime, one in found.items():
        for run in regimes[regime]:
            held = [row["held_bytes"] for row in run.metrics if isinstance(row.get("held_bytes"), int | float)]
            measured = max(held, default=0) / 2**20
            predicted = one.held_bytes / 2**20
            ratio = f"{measured / predicted:.3f}" if measured and predicted else "–"
            rows.append([run.label, f"{predicted:.1f}", f"{measured:.1f}" if measured else "–", ratio])
    return Table(
        "Held memory, predicted and measured: activations that autograd keeps at the peak, in MiB. Measured is the "
        "most at any line of metrics. Where the two differ, the run was made by another version of localsim, or with "
        "compile, or on a device that keeps other buffers.",
        ["run", "predicted MiB", "measured MiB", "measured / predicted"], rows,
    )  # fmt: skip


def _alt(found: dict[str, Cost]) -> str:
    told = [
        f"{regime}, {len(one.stages)} stages: {one.held_bytes / 2**20:.1f} MiB held, "
        f"{(one.forward_flops + one.backward_flops) / 1e9:.3g} GFLOP, gradient path {one.gradient_path} unit blocks"
        for regime, one in found.items()
    ]
    return f"Predicted cost. {listed(told)}"
