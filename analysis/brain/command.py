"""From run folders and recordings to tables and figures: what `localsim brain` does, as functions."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from localsim.analysis.brain.scores import BrainScores
from localsim.analysis.brain.scoring import check_recordings, metric_for, open_recordings, score
from localsim.analysis.catalogue import NAMED
from localsim.analysis.regimes import LAYERS
from localsim.analysis.spatial import POOLED
from localsim.errors import UserError
from localsim.rng import key
from localsim.runs import Run, load_run


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
    folder = folder_for(runs, out)
    for one in metrics:
        if (folder / one.name).exists():
            raise UserError(f"{folder / one.name} exists already; choose another --out, or move it away")
        check_recordings(opened, one, resamples=resamples, choose_stage=choose_stage, seed=seed)
    subjects = open_runs(runs, rule=rule, data=data, data_root=data_root, device=device)
    made = []
    with tempfile.TemporaryDirectory() as temporary:
        for one in metrics:
            began = time.monotonic()
            scores = score(
                *subjects,
                recordings=opened,
                metric=one,
                layers=layers if layers in LAYERS else {"modules": layers.split(",")},
                regions=wanted,
                bins=bins,
                controls=[] if controls == "none" else controls.split(","),
                over_training=over_training,
                choose_stage=choose_stage,
                resamples=resamples,
                seed=seed,
                spatial=spatial,
                image_size=image_size,
                device=device,
                cache=cache or temporary,
                progress=True,
            )
            kept = scores.save(folder)
            print(f"{scores}\n\n{time.monotonic() - began:.0f} s; tables and figures in {kept}\n")
            made.append(scores)
    return made


def open_runs(
    runs: Sequence[str], *, rule: str | None, data: str | None, data_root: str | None, device: str | None
) -> list[Run | str]:
    """Return runs, where their data and device are now, and names of networks as they are."""
    if rule is not None:
        from localsim.rules import get_rule

        get_rule(rule)
    return [
        path if path.startswith(NAMED) else load_run(path).moved(data=data, data_root=data_root, device=device)
        for path in runs
    ]


def folder_for(runs: Sequence[str], out: str | None) -> Path:
    """Return the folder for tables of these runs, by default one named after them; UserError if there cannot be one."""
    paths = [Path(run) if Path(run).name not in ("", "..") else Path(run).resolve() for run in runs]
    names = "+".join(path.name.replace(":", "-") for path in paths) or "controls"
    # file systems allow names of 255 bytes
    named = names if len(names) <= 100 else f"{names[:90]}-{key(names) % 16**6:06x}"
    folder = Path("brain") / named if out is None else Path(out)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"no folder can be made in {there}; choose another --out")
    return folder
