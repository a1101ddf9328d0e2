"""Section: where the network is cut, and which loss may change which stage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localsim.analysis import plots
from localsim.analysis.report.elements import Note, Part, Section, Table, Title, picture, said
from localsim.analysis.report.reported import Reported, by_regime
from localsim.credit import Credit
from localsim.errors import UserError


def section(runs: Sequence[Reported]) -> Section:
    """Return the section."""
    parts: list[Part] = []
    for regime, (run, *_) in by_regime(runs).items():
        parts.append(Title(regime))
        try:
            parts += _of_regime(run, regime)
        except UserError as error:
            parts.append(Note(f"Its cuts and credit cannot be drawn: {said(error)}"))
    return Section(
        "credit", "Cuts and credit",
        "Which loss (tap) may change which stage, by how much, and what every stage is made of. This is what the "
        "configuration says, and the engine trains no other way; seeds do not matter to it. Shown are gradients of "
        "stages: readouts and heads learn from their own loss only.",
        parts,
    )  # fmt: skip


def _of_regime(run: Reported, regime: str) -> list[Part]:
    credit, units, cuts = run.credit, run.units, run.cuts
    rows = [
        [str(cut.stage), cut.first, cut.last, str(cut.num_units), str(cut.channels), str(cut.stride),
         f"{cut.map_size[0]} x {cut.map_size[1]}", f"{cut.num_parameters:,}", f"{cut.held_bytes / 2**20:.2f}",
         str(credit.path_to(stage, units))]
        for stage, cut in enumerate(cuts)
    ]  # fmt: skip
    table = Table(
        f"The stages of {regime}. Gradient path: unit blocks that the longest gradient crosses which ends in the stage "
        "(0: it is never changed). Held: activations that autograd keeps of the stage's own, for an image in float32.",
        ["stage", "from", "to", "unit blocks", "channels", "stride", "map", "parameters", "held MiB/image",
         "gradient path"],
        rows, names=(0, 1, 2),
    )  # fmt: skip
    if not credit.num_taps:
        return [Note(f"{regime} has no tap: nothing is trained."), table]
    names = [str(stage + 1) for stage in range(len(units))]
    # of a long name only the rule: the drawing leaves it so much room
    figure = plots.gradient_paths([(f"{run.run.config.rule}\n{len(units)} stages", credit.matrix, credit.taps, names)])
    caption = f"Gradient paths of {regime}: arrows run from each loss back over the stages that it may change."
    return [picture(figure, _alt(credit, units, regime), caption), _matrix(credit, regime), table]


def _matrix(credit: Credit, regime: str) -> Table:
    rows = [
        [f"tap on stage {top + 1}",
         *(f"{weight:g}" if stage <= top else "–" for stage, weight in enumerate(credit.matrix[tap]))]
        for tap, top in enumerate(credit.taps)
    ]  # fmt: skip
    return Table(
        f"Credit matrix of {regime}: the weight with which a tap's loss changes a stage; a dash where a stage lies "
        "above the tap, so that it never could.",
        ["tap", *(f"stage {stage + 1}" for stage in range(credit.num_stages))], rows,
    )  # fmt: skip


def _alt(credit: Credit, units: Sequence[int], regime: str) -> str:
    told = []
    for tap, top in enumerate(credit.taps):
        changed = ", ".join(str(stage + 1) for stage in np.flatnonzero(credit.matrix[tap]))
        told.append(f"the loss on stage {top + 1} changes {f'stage {changed}' if changed else 'no stage'}")
    shown = told if len(told) <= 8 else [*told[:7], f"and so on, {len(told)} losses in all"]
    path = credit.longest_path(units)
    return (f"{regime}: {len(units)} stages in a row, input to the left; {'; '.join(shown)}. "
            f"The longest gradient crosses {path} of {sum(units)} unit blocks.")  # fmt: skip
