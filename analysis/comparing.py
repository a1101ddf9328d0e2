"""From run folders to tables and figures: what `localsim compare` does, as a function."""

from __future__ import annotations

from collections.abc import Sequence

from localsim.analysis.comparison import Comparison, compare
from localsim.analysis.on_runs import (
    chosen_controls,
    chosen_layers,
    folder_for,
    open_runs,
    print_and_save,
    refuse_existing,
)
from localsim.analysis.similarity import get_measure
from localsim.analysis.similarity.measure import Measure


def compare_runs(
    runs: Sequence[str],
    *,
    measure: str = "cka_debiased",
    layers: str = "ends",
    spatial: str = "mean",
    images: int = 1000,
    controls: str = "untrained",
    over_training: bool = False,
    resamples: int = 200,
    permutations: int = 100,
    seed: int = 0,
    rule: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    cache: str | None = None,
    out: str | None = None,
) -> list[Comparison]:
    """Compare runs by one or several measures, print the profiles, and keep tables and figures in a folder.

    Args:
        runs: folders, or names of networks as `features` takes them.
        measure: one name, or several with commas; the networks are run once for all of them.
        layers: one of `regimes.LAYERS`, or names of modules with commas.
        controls: one or both of `regimes.CONTROLS` with a comma, or `none`.
        rule: the file of a rule of one's own; executed.
        data, data_root, device: where the runs' images lie and the networks run now.
        out: the folder, with a folder for each measure; by default in `comparisons/`, named after the runs.
        spatial, images, over_training, resamples, permutations, seed, cache: see `compare` and `features`.

    Raises:
        UserError: something asked for cannot be done; the folder of a measure is there already.
    """
    measures = [get_measure(name) for name in dict.fromkeys(measure.split(","))]
    folder = folder_for("comparisons", runs, out)
    for one in measures:
        refuse_existing(folder / one.name)
    subjects = open_runs(runs, rule=rule, data=data, data_root=data_root, device=device)

    def comparison(one: Measure, kept: str) -> Comparison:
        return compare(
            *subjects,
            images=images,
            measure=one,
            layers=chosen_layers(layers),
            controls=chosen_controls(controls),
            over_training=over_training,
            resamples=resamples,
            permutations=permutations,
            seed=seed,
            spatial=spatial,
            device=device,
            cache=kept,
            progress=True,
        )

    return print_and_save(measures, comparison, folder, cache, "table and figures")
