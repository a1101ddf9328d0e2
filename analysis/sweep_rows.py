"""The rows of a sweep's table: what every stage of a run learned, beside what the run cost and how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from localsim.analysis.controls import CONTROLS
from localsim.analysis.regimes import regime_names
from localsim.assembly import build_network
from localsim.config import FREE, Config
from localsim.errors import UserError
from localsim.runs import Run, opened_run

if TYPE_CHECKING:
    from localsim.analysis.stage_probe import ProbeRow, ProbeTable

SETTINGS = ("rule", "granularity", "reach", "seed", "image_size", "batch_size")
"""Settings that every row has as fields of its own."""
_ELSEWHERE = ("preset", "log_every", *FREE)  # neither decides what is learned


@dataclass(frozen=True)
class SweepRow:
    """One probe of one stage of one run, with the settings and costs of the run.

    Attributes:
        run: name of the run folder.
        rule, granularity, reach, seed: of its configuration.
        regime: its rule, and what sets it apart from runs of the same rule; seeds share it.
        image_size, batch_size: likewise; images, of each of which a step sees several views, count once.
        settings: every other field of the configuration that varies over the runs of the table.
        data, backbone: what it was trained on and with.
        stage: number of the stage, from 1.
        num_stages: of the run.
        unit: unit blocks up to and including the stage.
        depth: these as a share of the trunk.
        path: the longest gradient path of the run, in unit blocks; 0 if nothing was trained.
        stage_path: the longest gradient path that ends in the stage.
        held_bytes: measured while training, what autograd held at the peak of a step; None if nothing was trained.
        trunk_parameters, tap_parameters: of all stages, and of all readouts and heads.
        seconds_per_step: median over training, measured; it says as much of the machine as of the rule.
        steps: of training.
        probe, features, accuracy, low, high, gain, gain_low, gain_high, calibrated_gain, calibrated_gain_low,
        calibrated_gain_high, n_test, chance: see `localsim.analysis.stage_probe.ProbeRow`.
        untrained, untrained_low, untrained_high, calibrated, calibrated_low, calibrated_high: accuracy of the controls
            at this stage, with intervals over test images; None without the control.
        n_train: images that the probe was fitted to.
    """

    run: str
    rule: str
    regime: str
    granularity: int | str | None
    reach: int | None
    seed: int
    image_size: int
    batch_size: int
    settings: Mapping[str, Any]
    data: str
    backbone: str
    stage: int
    num_stages: int
    unit: int
    depth: float
    path: int
    stage_path: int
    held_bytes: int | None
    trunk_parameters: int
    tap_parameters: int
    seconds_per_step: float | None
    steps: int
    probe: str
    features: str
    accuracy: float
    low: float
    high: float
    untrained: float | None
    untrained_low: float | None
    untrained_high: float | None
    calibrated: float | None
    calibrated_low: float | None
    calibrated_high: float | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    calibrated_gain: float | None
    calibrated_gain_low: float | None
    calibrated_gain_high: float | None
    n_test: int
    n_train: int | None
    chance: float

    def value(self, name: str) -> Any:
        """Return a field or one of the `settings`; UserError if there is neither."""
        if name in self.settings:
            return self.settings[name]
        if name not in SweepRow.__dataclass_fields__:
            raise UserError(f"a sweep's table has no column {name!r}; allowed: {', '.join(self.flat())}")
        return getattr(self, name)

    def flat(self) -> dict[str, Any]:
        """Return the row with one column for each of its `settings`."""
        values = asdict(self)
        place = list(values).index("settings")
        items = list(values.items())
        return dict([*items[:place], *values["settings"].items(), *items[place + 1 :]])


def rows_of(runs: Sequence[Run | str | Path]) -> list[SweepRow]:
    """Return a row per run, stage and probe; arguments and errors as of `localsim.analysis.sweeps.sweep_table`."""
    opened = [opened_run(run) for run in runs]
    if not opened:
        raise UserError("a table of a sweep needs at least one run")
    probes = [run.probe() for run in opened]
    for run, probed in zip(opened, probes, strict=True):
        if probed is None:
            raise UserError(f"{run.path} has not been probed; do it with `localsim probe {run.path}`")
    tables = [probed for probed in probes if probed is not None]
    _check_comparable(opened, tables)
    plain = [{n: v for n, v in run.config.to_json().items() if n not in _ELSEWHERE} for run in opened]
    seen: dict[str, Path] = {}
    for run, values in zip(opened, plain, strict=True):
        if (other := seen.setdefault(json.dumps(values, sort_keys=True), run.path)) != run.path:
            raise UserError(f"{other} and {run.path} are the same run twice; give one of each setting and seed")
    if len(seen) < len(opened):
        raise UserError("a run is named twice; give one of each setting and seed")
    varying = [n for n in plain[0] if n not in SETTINGS and any(values[n] != plain[0][n] for values in plain)]
    built: dict[str, dict[str, Any]] = {}
    rows: list[SweepRow] = []
    for run, table, regime in zip(opened, tables, regime_names([run.config for run in opened]), strict=True):
        shape = json.dumps({n: v for n, v in run.config.to_json().items() if n not in ("seed", *FREE)}, sort_keys=True)
        if shape not in built:
            built[shape] = _built(run.config)
        settings = {name: getattr(run.config, name) for name in varying}
        rows += _rows(run, table, regime, settings, **built[shape])
    return rows


def _check_comparable(runs: Sequence[Run], tables: Sequence[ProbeTable]) -> None:
    """Raise UserError where accuracies are of different backbones, images or probes."""
    for what in ("data", "backbone", "test_images"):
        if len(values := sorted({str(getattr(run.config, what)) for run in runs})) > 1:
            raise UserError(f"runs of different {what} do not compare: {', '.join(values)}; make a table of each")
    for what in ("n_test", "chance"):
        if len(values := sorted({getattr(table.rows[0], what) for table in tables})) > 1:
            raise UserError(f"probes of different {what} do not compare: {', '.join(map(str, values))}")
    for what in ("protocol", "data"):
        found = {str(row.settings[what]) for table in tables for row in table.rows if what in row.settings}
        if len(found) > 1:
            raise UserError(f"probes of different {what} do not compare: {', '.join(sorted(found))}; probe them alike")


def _built(config: Config) -> dict[str, Any]:
    """Return what follows from the architecture; tensors without values serve, and so does any transport."""
    with torch.device("meta"):
        net = build_network(replace(config, transport="exact"))
    units, credit = net.units_per_stage, net.credit
    return {
        "units": units,
        "path": credit.longest_path(units),
        "stage_paths": [credit.path_to(stage, units) for stage in range(len(units))],
        "trunk_parameters": sum(parameter.numel() for parameter in net.stages.parameters()),
        "tap_parameters": sum(parameter.numel() for parameter in net.taps.parameters()),
    }


def _rows(
    run: Run, table: ProbeTable, regime: str, settings: Mapping[str, Any], *, units: Sequence[int],
    stage_paths: Sequence[int], **built: int,
) -> Iterator[SweepRow]:  # fmt: skip
    config, metrics = run.config, run.metrics()
    speeds = [row["images_per_second"] for row in metrics if row.get("images_per_second")]
    shared: dict[str, Any] = {
        "run": run.path.resolve().name,
        "regime": regime,
        "settings": settings,
        **{name: getattr(config, name) for name in (*SETTINGS, "backbone")},
        "data": Path(config.data).name,
        "num_stages": len(units),
        "held_bytes": max((row.get("held_bytes", 0) for row in metrics), default=0) or None,
        "seconds_per_step": median(config.batch_size / speed for speed in speeds) if speeds else None,
        "steps": run.step,
        **built,
    }
    controls = {(row.network, row.stage, row.features, row.probe): row for row in table.rows}
    copied = [name for name in type(table.rows[0]).__dataclass_fields__ if name in SweepRow.__dataclass_fields__]
    for row in table.select(network=config.rule):
        unit = sum(units[: row.stage])
        own: dict[str, Any] = {name: getattr(row, name) for name in copied if name != "settings"}
        for name in CONTROLS:
            own |= _control(name, controls.get((name, row.stage, row.features, row.probe)))
        yield SweepRow(
            **shared, **own, unit=unit, depth=unit / sum(units), stage_path=stage_paths[row.stage - 1],
            n_train=row.settings.get("n_train"),
        )  # fmt: skip


def _control(name: str, row: ProbeRow | None) -> dict[str, float | None]:
    columns = {name: "accuracy", f"{name}_low": "low", f"{name}_high": "high"}
    return {column: None if row is None else getattr(row, part) for column, part in columns.items()}
