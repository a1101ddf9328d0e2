"""How much training is behind a snapshot: epochs, and how often how many weights were changed."""

from __future__ import annotations

from collections.abc import Sequence

from localsim.assembly import build_credit, build_trunk
from localsim.opening import open_data
from localsim.runs import Run
from localsim.schedule import Schedule


def training_behind(run: Run, steps: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Return for each step of a run the epochs and the weight updates that lie behind it.

        updates(step) = sum_i |theta_i| * #{steps so far in which a loss that may change stage i was trained}

    over the stages of the trunk, heads left out: the number of synaptic changes of Geiger, Schrimpf, Marques & DiCarlo
    2022 (Wiring Up Vision, ICLR, section 3), on which rules that train one stage after the other differ from those that
    train all at once.

    Args:
        run: with a training set that can be opened.
        steps: of training, 0 for untrained.
    """
    config = run.config
    steps_per_epoch = len(open_data(config).train) // config.batch_size
    backbone, stages = build_trunk(config)  # without heads, which may be many times as large
    credit = build_credit(config, len(stages))
    if not credit.num_taps:
        return {step: (step / steps_per_epoch, 0.0) for step in steps}
    phases = Schedule.of(config, steps_per_epoch, credit.num_taps).phases
    sizes = [
        sum(parameter.numel() for unit in units for parameter in backbone.units[unit].parameters()) for units in stages
    ]
    found = {}
    for step in steps:
        updates = 0.0
        for phase in phases:
            reached = credit.matrix[list(phase.taps)].sum(0) > 0
            done = min(max(step - phase.start, 0), phase.stop - phase.start)
            updates += done * sum(size for size, changed in zip(sizes, reached, strict=True) if changed)
        found[step] = (step / steps_per_epoch, float(updates))
    return found
