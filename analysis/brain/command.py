"""From run folders and recordings to tables and figures: what `localsim brain` does, as functions."""

from __future__ import annotations

from collections.abc import Sequence

from localsim.analysis.brain.asked import check_recordings, metric_for, open_recordings
from localsim.analysis.brain.metrics import NeuralMetric
from localsim.analysis.brain.scores import BrainScores
from localsim.analysis.brain.scoring import score
from localsim.analysis.on_runs import (
    chosen_controls,
    chosen_layers,
    folder_for,
    open_runs,
    print_and_save,
    refuse_existing,
)
from localsim.analysis.spatial import POOLED


def score_runs(
    runs: Sequence[str],
    *,
    recordings: Sequence[str],
    metric: str | None = None,
    layers: str = "ends",
    regions: str | None = None,
    bins: str = "mean",
    spatial: str = POOLED,
    image_size: int | None = None,
    controls: str = "untrained,pixels,gabor,shuffled",
    over_training: bool = False,
    choose_stage: bool = False,
    resamples: int | None = None,
    seed: int = 0,
    rule: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    cache: str | None = None,
    out: str | None = None,
) -> list[BrainScores]:
    """Score runs against recordings by one or several metrics, print tables, and keep them with figures in a folder.

    Args:
        runs: folders, or names of networks as `features` takes them.
        recordings: folders, see `load_recordings`.
        metric: one name, or several with commas; networks are run once for all of them.
        layers: one of `regimes.LAYERS`, or names of modules with commas.
        regions: names with commas; by default all.
        controls: of `scoring.CONTROLS`, with commas, or `none`.
        rule: the file of a rule of one's own; executed.
        data, data_root, device: where the runs' own images lie and the networks run now.
        out: the folder, with a folder for each metric; by default in `brain/`, named after the runs.
        bins, spatial, image_size, over_training, choose_stage, resamples, seed, cache: see `score`.

    Raises:
        UserError: something asked for cannot be done; the folder of a metric is there already.
    """
    wanted = None if regions is None else regions.split(",")
    opened = open_recordings(recordings, bins=bins, regions=wanted)
    asked = [None] if metric is None else list(dict.fromkeys(metric.split(",")))
    metrics = [metric_for(opened, name) for name in asked]
    folder = folder_for("brain", runs, out)
    for one in metrics:
        refuse_existing(folder / one.name)
        check_recordings(opened, one, resamples=resamples, choose_stage=choose_stage, seed=seed)
    subjects = open_runs(runs, rule=rule, data=data, data_root=data_root, device=device)

    def scores(one: NeuralMetric, kept: str) -> BrainScores:
        return score(
            *subjects,
            recordings=opened,
            metric=one,
            layers=chosen_layers(layers),
            regions=wanted,
            bins=bins,
            controls=chosen_controls(controls),
            over_training=over_training,
            choose_stage=choose_stage,
            resamples=resamples,
            seed=seed,
            spatial=spatial,
            image_size=image_size,
            device=device,
            cache=kept,
            progress=True,
        )

    return print_and_save(metrics, scores, folder, cache, "tables and figures")
