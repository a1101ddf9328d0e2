"""Section: what a linear probe reads from every stage."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from localsim.analysis.canvas import COLOURS, new_figure, panel_grid, percent, styled, wrapped
from localsim.analysis.controls import CONTROLS
from localsim.analysis.report.elements import Fold, Note, Part, Section, Table, Text, listed, picture, said
from localsim.analysis.report.reported import Reported, by_regime
from localsim.analysis.stage_probe import ProbeRow, ProbeTable
from localsim.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = {"untrained": ("#555555", "s", "--"), "calibrated": (COLOURS[1], "D", ":")}
TRAINED = (COLOURS[0], "o", "-")
KINDS = {("linear", "raw"): "linear probe of the stage's output, averaged over positions",
         ("linear", "readout"): "linear probe of what the stage's tap reads",
         ("knn", "raw"): "k-NN on the stage's output, averaged over positions",
         ("knn", "readout"): "k-NN on what the stage's tap reads"}  # fmt: skip


def section(runs: Sequence[Reported]) -> Section:
    """Return the section."""
    parts: list[Part] = []
    tables: dict[str, ProbeTable] = {}
    without: list[Reported] = []
    for run in runs:
        try:
            found = run.probe
        except UserError as error:
            parts.append(Note(said(error)))
            continue
        if found is None or not found.rows:
            without.append(run)
        else:
            tables[run.label] = found
    if without:
        words = "Not probed: " + "; ".join(run.label for run in without) + ". This does it:"
        parts.append(Note(words, f"localsim probe {shlex.join(run.name for run in without)}"))
    probed = [run for run in runs if run.label in tables]
    if probed:
        first = next(iter(tables.values())).rows[0]
        drawn = {
            regime: [(_depths(run, tables[run.label]), tables[run.label]) for run in mine]
            for regime, mine in by_regime(probed).items()
        }
        figure = _panels(drawn, first.chance)
        parts.append(picture(
            figure, _alt(tables),
            "Accuracy of a linear probe of every stage's output, averaged over positions, against depth, a panel for "
            "each regime and a line for each seed. Bars are 95 % intervals over test images. Only what lies above both "
            "controls was learned.",
        ))  # fmt: skip
        for run in probed:
            parts += _tables(run.label, tables[run.label])
    return Section(
        "probes", "Probes by stage",
        "Accuracy of classifiers on the frozen stages, on test images, beside two networks of the same seed that have "
        "learned nothing: untrained, and calibrated, which is the untrained one with the batch-norm statistics of "
        "training images. Intervals are 95 % over test images of one network, paired for gains; they say nothing about "
        "other seeds, nor about other data.",
        parts,
    )  # fmt: skip


def _lines(table: ProbeTable) -> dict[str, list[ProbeRow]]:
    """Return the linear probes of raw features by network, lowest stage first."""
    return {
        name: sorted(table.select(network=name, features="raw", probe="linear"), key=lambda row: row.stage)
        for name in table.networks
    }


def _depths(run: Reported, table: ProbeTable) -> dict[int, float]:
    """Return the share of the unit blocks that lie in and below each stage; equal steps where nobody can say."""
    stages = sorted({row.stage for row in table.rows})
    try:
        ends = np.cumsum(run.units) / sum(run.units)
    except UserError:
        ends = np.array([])
    if len(ends) != len(stages):
        ends = np.arange(1, len(stages) + 1) / len(stages)
    return dict(zip(stages, ends.tolist(), strict=True))


@styled
def _panels(regimes: dict[str, list[tuple[dict[int, float], ProbeTable]]], chance: float) -> Figure:
    columns = 1 if len(regimes) == 1 else 2
    rows = -(-len(regimes) // columns)
    figure, _ = new_figure(6.4, 1.1 + 2.2 * rows, axes=False)
    handles = {}
    panels = panel_grid(figure, len(regimes), columns, share_y=True)
    for axes, (regime, runs) in zip(panels, regimes.items(), strict=True):
        for seed, (depths, table) in enumerate(runs):
            for number, (name, found) in enumerate(_lines(table).items()):
                values = np.array([(row.accuracy, row.low, row.high) for row in found]).reshape(-1, 3)
                colour, marker, dashes = LOOKS.get(name, TRAINED)
                aside = 0.012 * (number - 1) + 0.004 * seed
                handles[name if name in CONTROLS else "trained"] = axes.errorbar(
                    [depths[row.stage] + aside for row in found], values[:, 0],
                    yerr=np.abs(values[:, 1:].T - values[:, 0]), color=colour, marker=marker, linestyle=dashes,
                    markersize=4, linewidth=1.3, elinewidth=1,
                )  # fmt: skip
        handles["chance"] = axes.axhline(chance, color="#888888", linewidth=1, linestyle=(0, (1, 2)))
        axes.set_title(wrapped(regime), fontsize=9.5)
        axes.set_xlim(0, 1.06)
        axes.yaxis.set_major_formatter(percent)
    for axes in panels[-columns:]:  # a label of the figure would lie under the legend
        axes.set_xlabel("depth (share of the unit blocks)")
    figure.supylabel("accuracy", fontsize=10)
    order = [name for name in ("trained", *CONTROLS, "chance") if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=4)
    return figure


def _alt(tables: dict[str, ProbeTable]) -> str:
    told = []
    for label, table in tables.items():
        ends = [
            f"{name} {found[0].accuracy:.2f} at stage 1, {found[-1].accuracy:.2f} at stage {found[-1].stage}"
            for name, found in reversed(_lines(table).items())
            if found
        ]
        told.append(f"{label}: {', '.join(ends)}")
    return f"Linear probe accuracy against depth. {listed(told, 5)}"


def _tables(label: str, table: ProbeTable) -> list[Part]:
    made = {kind: _table(label, table, *kind) for kind in KINDS if table.select(probe=kind[0], features=kind[1])}
    others = [one for kind, one in made.items() if kind != ("linear", "raw")]
    parts: list[Part] = [made["linear", "raw"]] if ("linear", "raw") in made else []
    if others:
        parts.append(Fold(f"Other probes of {label}: readouts, nearest neighbours", others))
    settings = table.rows[0].settings
    named = ("protocol", "image_size", "n_train", "seed")
    told = ", ".join(f"{name} {settings[name]}" for name in named if name in settings)
    return [*parts, Text(f"How {label} was probed: {told}.")] if told else parts


def _table(label: str, table: ProbeTable, probe: str, features: str) -> Table:
    first = table.select(probe=probe, features=features)[0]
    heads, stages = table.by_stage(probe, features, none="–")
    return Table(
        f"{label}: {KINDS[probe, features]}. Accuracy with 95 % interval over n = {first.n_test} test images; chance "
        f"is {first.chance:.3g}.",
        ["stage", *heads], [[str(stage), *cells] for stage, cells in stages.items()],
    )  # fmt: skip
