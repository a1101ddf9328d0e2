"""Runs against a benchmark of Brain-Score: every layer of every network, beside the untrained ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from localsim.analysis.brain.brainscore import BenchmarkScore, brain_model, open_benchmark, score_benchmark
from localsim.analysis.brain.command import folder_for, open_runs
from localsim.analysis.regimes import LAYERS, layers_to_read, open_subjects
from localsim.analysis.spatial import POOLED
from localsim.analysis.tables import as_csv
from localsim.errors import UserError
from localsim.files import write_text

COLUMNS = ("benchmark", "regime", "seed", "layer", "raw", "ceiling", "value", "model")


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
    """Score all layers of runs, and of their untrained networks, on a benchmark of Brain-Score; print and keep a table.

    Each layer in turn stands for the benchmark's region. The largest of these scores is no fair score of a network, as
    the benchmark's own data chose the layer: choose it on other recordings, with `localsim brain --recordings`.

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
            of no region; the table is there already; or as `open_runs` says.
    """
    table = folder_for(runs, out) / f"{benchmark}.csv"
    if table.exists():
        raise UserError(f"{table} exists already; choose another --out, or move it away")
    opened = open_runs(runs, rule=rule, data=data, data_root=data_root, device=device)
    if not opened:
        raise UserError("there is nothing to score; give a run, or a network such as torchvision:resnet50")
    judge = open_benchmark(benchmark)
    region = str(getattr(judge, "region", None) or "")
    if not region:
        raise UserError(f"benchmark {benchmark} is of no cortical region; allowed: neural benchmarks")
    rows: list[dict[str, Any]] = []
    for subject in open_subjects(opened, controls=controls):
        assert subject.open is not None  # a path or a name is never features
        shown = subject.open().whole(image_size)
        choice = layers_to_read(subject.run, layers if layers in LAYERS else {"modules": layers.split(",")})
        points = shown.points.choose(*(choice.get(kind) for kind in ("stages", "units", "readouts", "modules")))
        for point in points:
            model = brain_model(shown, {region: point.key}, degrees=degrees, spatial=spatial)
            found = score_benchmark(judge, model)
            rows.append(_row(found, benchmark, subject.regime, subject.seed))
            print(f"{subject.regime} {found}", flush=True)
    write_text(table, as_csv(rows, COLUMNS))
    print(f"\ntable in {table}; a layer that is best here was chosen by these data: take it from other recordings")
    return rows


def _row(found: BenchmarkScore, benchmark: str, regime: str, seed: int | None) -> dict[str, Any]:
    return {
        "benchmark": benchmark, "regime": regime, "seed": seed, "layer": found.layer, "raw": found.raw,
        "ceiling": found.ceiling, "value": found.value, "model": found.model,
    }  # fmt: skip
