"""Runs against a benchmark of Brain-Score: every layer of every network, or the layer that recordings chose for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from localsim.analysis.brain.asked import open_recordings
from localsim.analysis.brain.brainscore import (
    BenchmarkScore,
    brain_models,
    open_benchmark,
    region_layers_from,
    score_benchmark,
)
from localsim.analysis.brain.command import score_runs
from localsim.analysis.brain.scores import BrainScores
from localsim.analysis.controls import CONTROLS
from localsim.analysis.on_runs import chosen_controls, chosen_layers, folder_for, open_runs, refuse_existing
from localsim.analysis.regimes import Subject, layers_to_read, open_subjects
from localsim.analysis.sources import Source
from localsim.analysis.spatial import POOLED
from localsim.analysis.tables import as_csv
from localsim.errors import UserError
from localsim.files import write_text
from localsim.runs import Run

COLUMNS = ("benchmark", "regime", "seed", "layer", "chosen_by", "raw", "ceiling", "value", "model")


def score_benchmarks(
    runs: Sequence[str],
    benchmark: str,
    *,
    layers: str = "ends",
    spatial: str = POOLED,
    image_size: int | None = None,
    degrees: float = 8,
    controls: Sequence[str] = ("untrained",),
    rule: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    out: str | None = None,
) -> list[dict[str, Any]]:
    """Score all layers of runs, and of their controls, on a benchmark of Brain-Score; print and keep a table.

    Each layer in turn stands for the benchmark's region; a network runs once for all of them. The largest of these
    scores is no fair score of a network, as the benchmark's own data chose the layer: `score_chosen_layers` takes the
    layer from recordings.

    Args:
        runs: folders, or names of networks as `features` takes them.
        benchmark: Brain-Score's identifier, such as `MajajHong2015public.IT-pls`.
        layers: one of `regimes.LAYERS`, or names of modules with commas.
        spatial: how maps become vectors, see `localsim.analysis.spatial`.
        image_size: pixels to show the images at; by default what each network was trained on.
        degrees: width of the networks' field of view in degrees of visual angle.
        controls: of `localsim.analysis.controls.CONTROLS`.
        rule: the file of a rule of one's own; executed.
        data, data_root, device: where the runs' own images lie and the networks run now.
        out: a folder for the table; by default in `brain/`, named after the runs.

    Returns:
        Rows with the columns `COLUMNS`: `raw` has its sign, `value` is ceiled by Brain-Score, which loses it.

    Raises:
        UserError: Brain-Score is not installed, has no such benchmark, or its data cannot be fetched; the benchmark is
            of no region; a control is no network; the table is there already; or as `open_runs` says.
    """
    for control in controls:
        if control not in CONTROLS:
            raise UserError(f"control {control!r} has no meaning for a benchmark; allowed: {', '.join(CONTROLS)}, none")
    table = _new_table(runs, benchmark, out)
    opened = _some_runs(runs, rule=rule, data=data, data_root=data_root, device=device)
    judge, region = _open(benchmark)

    def every(subject: Subject, shown: Source) -> list[str]:
        choice = layers_to_read(subject.run, chosen_layers(layers))
        points = shown.points.choose(*(choice.get(kind) for kind in ("stages", "units", "readouts", "modules")))
        return [point.key for point in points]

    subjects = open_subjects(opened, controls=controls)
    settings = {"degrees": degrees, "spatial": spatial}
    rows = _score(judge, benchmark, region, subjects, every, "", image_size, settings)
    write_text(table, as_csv(rows, COLUMNS))
    print(f"\ntable in {table}; a layer that is best here was chosen by these data: take it from other recordings, by "
          "giving --recordings too")  # fmt: skip
    return rows


def score_chosen_layers(
    runs: Sequence[str],
    benchmark: str,
    *,
    recordings: Sequence[str],
    regions: str | None = None,
    bins: str = "mean",
    controls: str = "untrained,pixels,gabor,shuffled",
    degrees: float = 8,
    spatial: str = POOLED,
    image_size: int | None = None,
    seed: int = 0,
    rule: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    out: str | None = None,
    **settings: Any,
) -> tuple[list[BrainScores], list[dict[str, Any]]]:
    """Score runs against recordings, let these choose a layer of each network, and score it on a benchmark.

    Of each network, the layer with the best score for the benchmark's region, by the first metric, stands for it. As
    other data chose it, its score on the benchmark is a fair one.

    Args:
        benchmark, degrees: see `score_benchmarks`.
        controls: as `score_runs` takes them; those that are networks are scored on the benchmark, too.
        bins: `mean`: layers are chosen by the mean over time bins.
        runs, recordings, regions, spatial, image_size, seed, rule, data, data_root, device, out: see `score_runs`.
        settings: its other arguments, which concern recordings only.

    Returns:
        What `score_runs` returns, and rows with the columns `COLUMNS`, one per network.

    Raises:
        UserError: the recordings have no region of the benchmark's, or their time bins are not averaged; as
            `score_benchmarks` and `score_runs` say. What can be told before a network has run is.
    """
    table = _new_table(runs, benchmark, out)
    if bins == "each":
        raise UserError("bins each leaves open which time bin chooses the layer for a benchmark; allowed: mean")
    where = {"rule": rule, "data": data, "data_root": data_root, "device": device}
    opened = _some_runs(runs, **where)
    recorded = open_recordings(recordings, bins=bins, regions=None if regions is None else regions.split(","))
    judge, region = _open(benchmark)
    present = list(dict.fromkeys(area for one in recorded for area in one.areas))
    if region not in present:
        raise UserError(f"benchmark {benchmark} is of region {region}, but the recordings are of {', '.join(present)}; "
                        f"give recordings of {region} to choose layers by")  # fmt: skip
    scores = score_runs(
        runs, recordings=recordings, regions=regions, bins=bins, controls=controls, spatial=spatial,
        image_size=image_size, seed=seed, out=out, **where, **settings,
    )  # fmt: skip
    names = [one.name for one in recorded if region in one.areas]

    def chosen(subject: Subject, _: Source) -> list[str]:
        return [region_layers_from(scores[0].matrix(subject.regime, subject.seed))[region]]

    subjects = open_subjects(
        opened, controls=[name for name in chosen_controls(controls) if name in CONTROLS], seed=seed
    )
    model = {"degrees": degrees, "spatial": spatial, "seed": seed}
    by = f"{scores[0].metric.name} of {region} in {', '.join(names)}"
    rows = _score(judge, benchmark, region, subjects, chosen, by, image_size, model)
    write_text(table, as_csv(rows, COLUMNS))
    print(f"\ntable in {table}; layers chosen by {by}")
    return scores, rows


def _score(
    judge: Any,
    benchmark: str,
    region: str,
    subjects: Sequence[Subject],
    choose: Callable[[Subject, Source], Sequence[str]],
    chosen_by: str,
    image_size: int | None,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for subject in subjects:
        assert subject.open is not None  # a path or a name is never features
        shown = subject.open().whole(image_size)
        for model in brain_models(shown, [{region: layer} for layer in choose(subject, shown)], **settings):
            found = score_benchmark(judge, model)
            rows.append(_row(found, benchmark, subject, chosen_by))
            print(f"{subject.regime} {found}", flush=True)
    return rows


def _new_table(runs: Sequence[str], benchmark: str, out: str | None) -> Path:
    return refuse_existing(folder_for("brain", runs, out) / f"{benchmark}.csv")


def _some_runs(
    runs: Sequence[str], *, rule: str | None, data: str | None, data_root: str | None, device: str | None
) -> list[Run | str]:
    if not runs:
        raise UserError("there is nothing to score; give a run, or a network such as torchvision:resnet50")
    return open_runs(runs, rule=rule, data=data, data_root=data_root, device=device)


def _open(benchmark: str) -> tuple[Any, str]:
    """Return a benchmark and its region; UserError if it is of none."""
    judge = open_benchmark(benchmark)
    region = str(getattr(judge, "region", None) or "")
    if not region:
        raise UserError(f"benchmark {benchmark} is of no cortical region; allowed: neural benchmarks")
    return judge, region


def _row(found: BenchmarkScore, benchmark: str, subject: Subject, chosen_by: str) -> dict[str, Any]:
    return {
        "benchmark": benchmark, "regime": subject.regime, "seed": subject.seed, "layer": found.layer,
        "chosen_by": chosen_by, "raw": found.raw, "ceiling": found.ceiling, "value": found.value, "model": found.model,
    }  # fmt: skip
