"""The table of a sweep says what its runs say, tells cells apart, and can be read without them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_sweep import made_up_rows, made_up_table
from scipy import stats
from tiny import tiny_config, train_in

from localsim import runs
from localsim.analysis.stage_probe import ProbeRow, probe
from localsim.analysis.sweeps import Cell, SweepTable, control, sweep_table
from localsim.assembly import build_network
from localsim.errors import UserError

NO_GAINS = dict.fromkeys(
    ["gain", "gain_low", "gain_high", "calibrated_gain", "calibrated_gain_low", "calibrated_gain_high"]
)


def made_up_run(path: Path, *, rule: str = "blockwise", stages: int = 2, protocol: str = "logistic", **changes) -> Path:
    """Write a run folder without training: 10 steps, and a network whose stages name 50, 60, ... images of 100."""
    config = tiny_config(rule, **{"granularity": stages, **changes})
    runs.start_run(path, config)
    (path / "checkpoints" / "00000010").mkdir(parents=True)
    for step, speed, held in ((1, 4.0, 100), (2, 16.0, 300), (3, 8.0, 200)) if rule != "untrained" else ():
        runs.append_metrics(path, {"step": step, "images_per_second": speed, "held_bytes": held})
    rows = []
    for place, network in enumerate(dict.fromkeys(("untrained", "calibrated", rule))):
        for stage in range(1, stages + 1):
            share = 0.1 * (place + stage + 2)
            gains = {**NO_GAINS, "gain": 0.2} if place == 2 else NO_GAINS
            told = {"protocol": protocol, "data": "embedded", "n_train": 50}
            rows.append(ProbeRow(network, stage, "raw", "linear", share, share - 0.05, share + 0.05, **gains,
                                 n_test=100, chance=0.1, settings=told))  # fmt: skip
    (path / "probe.json").write_text(json.dumps([vars(row) for row in rows]))
    return path


def test_rows_say_what_the_runs_say(tmp_path):
    made = {reach: made_up_run(tmp_path / f"reach{reach}", reach=reach) for reach in (1, 2)}
    table = sweep_table([made[1], runs.load_run(made[2])])
    assert [(row.run, row.reach, row.stage) for row in table.rows] == [
        ("reach1", 1, 1), ("reach1", 1, 2), ("reach2", 2, 1), ("reach2", 2, 2),
    ]  # fmt: skip
    # resnet20 has a stem and nine residual blocks
    assert [(row.unit, row.depth) for row in table.rows] == [(5, 0.5), (10, 1.0)] * 2
    assert [(row.path, row.stage_path) for row in table.rows] == [(5, 5), (5, 5), (10, 10), (10, 5)]
    for row in table.rows:
        assert (row.held_bytes, row.seconds_per_step, row.steps, row.num_stages) == (300, 1.0, 10, 2)
        assert (row.n_test, row.n_train, row.chance, row.data, row.settings) == (100, 50, 0.1, "embedded", {})
        assert row.accuracy == pytest.approx(0.1 * (row.stage + 4)) and row.high == pytest.approx(row.accuracy + 0.05)
        assert row.untrained == pytest.approx(row.accuracy - 0.2) and row.gain == 0.2
        assert row.calibrated == pytest.approx(row.accuracy - 0.1) and row.calibrated_gain is None
        net = build_network(runs.load_run(made[row.reach]).config)
        assert row.trunk_parameters == sum(p.numel() for p in net.stages.parameters())
        assert row.tap_parameters == sum(p.numel() for p in net.taps.parameters())
    assert [row.regime for row in table.rows] == ["blockwise reach=1"] * 2 + ["blockwise reach=2"] * 2


def test_a_real_run_makes_a_table(tmp_path):
    train_in(tmp_path, granularity=2, epochs=1, max_steps=2)
    stored = probe(runs.load_run(tmp_path))
    table = sweep_table([tmp_path])
    told = [row.accuracy for row in stored.select(network="blockwise")]
    assert [row.accuracy for row in table.rows] == told and {row.probe for row in table.rows} == {"linear", "knn"}
    (cell,) = table.cells()
    measured = [row["held_bytes"] for row in runs.load_run(tmp_path).metrics()]
    assert cell.rows[0].held_bytes == max(measured) > 0 and cell.path == 5 and cell.rows[0].steps == 2
    (bare,) = stored.select(network="untrained", probe="linear", features="raw", stage=2)
    assert (cell.rows[0].untrained, cell.rows[0].untrained_low) == (bare.accuracy, bare.low)


def test_a_run_that_trained_nothing_is_a_cell_without_costs(tmp_path):
    trained, bare = (made_up_run(tmp_path / rule, rule=rule) for rule in ("blockwise", "untrained"))
    table = sweep_table([trained, bare])
    cell = table.cells()[1]
    (row,) = cell.rows
    assert (cell.held_mib, cell.path, row.seconds_per_step, row.tap_parameters) == (None, 0, None, 0)
    assert row.accuracy == row.untrained == table.cells()[0].rows[0].untrained
    # what the untrained network lacks counts as the rule's, and is said
    assert table.factors == ("rule",) and "vary with the rule" in str(table)


def test_what_does_not_compare_is_refused(tmp_path):
    one = made_up_run(tmp_path / "one")
    unprobed = made_up_run(tmp_path / "unprobed", seed=1)
    (unprobed / "probe.json").unlink()
    others = {
        "test_images": made_up_run(tmp_path / "test", test_images=20),
        "backbone": made_up_run(tmp_path / "backbone", backbone="resnet32"),
        "protocol": made_up_run(tmp_path / "protocol", seed=2, protocol="paper"),
    }
    with pytest.raises(UserError, match=r"unprobed has not been probed; do it with `localsim probe .*unprobed`"):
        sweep_table([one, unprobed])
    for what, other in others.items():
        with pytest.raises(UserError, match=f"of different {what} do not compare: "):
            sweep_table([one, other])
    with pytest.raises(UserError, match=r"one and .*again are the same run twice"):
        sweep_table([one, made_up_run(tmp_path / "again", log_every=3)])
    with pytest.raises(UserError, match="named twice"):
        sweep_table([one, one])
    with pytest.raises(UserError, match="at least one run"):
        sweep_table([])
    with pytest.raises(UserError, match="is not a run folder"):
        sweep_table([tmp_path])


def test_settings_that_vary_tell_cells_apart(tmp_path):
    rates = [made_up_run(tmp_path / f"rate{rate}", lr=rate, seed=seed) for seed, rate in ((0, 0.2), (0, 0.1))]
    table = sweep_table([*rates, made_up_run(tmp_path / "seed", lr=0.2, seed=1)])
    assert table.factors == ("lr",) and table.levels("lr") == [0.1, 0.2] and table.following == ()
    assert [(cell.settings, [row.seed for row in cell.rows]) for cell in table.cells()] == [
        ({"lr": 0.1}, [0]),
        ({"lr": 0.2}, [0, 1]),
    ]
    assert [row.run for row in table.select(lr=0.2, stage=2)] == ["rate0.2", "seed"]
    with pytest.raises(UserError, match="has no column 'width'; allowed: run, rule, "):
        table.select(width=3)


def test_granularities_stand_in_the_order_of_their_stages():
    rows = [replace(row, granularity="block") for row in made_up_rows(4)] + made_up_rows(2) + made_up_rows(1)
    table = SweepTable(tuple(rows))
    assert table.levels("granularity") == [1, 2, "block"]
    assert [cell.settings["granularity"] for cell in table.cells()] == [1, 2, "block"]
    # a stage that not all runs have
    assert [cell.rows[0].stage for cell in table.cells(stage=2)] == [2, 2]
    with pytest.raises(UserError, match="no knn probe of raw features"):
        table.cells(probe="knn")


def test_a_cell_is_the_mean_over_seeds_with_intervals_that_say_over_what():
    rows = [made_up_rows(1, 1, seed, accuracy)[0] for seed, accuracy in enumerate((0.5, 0.6, 0.55))]
    two, three = Cell({}, tuple(rows[:2])), Cell({}, tuple(rows))
    assert two.mean == pytest.approx(0.55) and two.over_seeds is None
    assert two.over_images == pytest.approx((0.53, 0.58))
    expected = stats.t.interval(0.95, 2, loc=0.55, scale=stats.sem([0.5, 0.6, 0.55]))
    assert three.over_seeds == pytest.approx(expected)
    wide = Cell({}, tuple(replace(row, accuracy=share) for row, share in zip(rows, (0, 0.5, 1), strict=True)))
    assert wide.over_seeds == (0, 1)


@given(st.lists(st.integers(0, 2**12 - 1), min_size=1, max_size=4))
@settings(deadline=None)
def test_the_interval_over_images_is_never_too_narrow(seeds):
    """The deviation of the mean of right answers is at most the mean of their deviations, however they go together."""
    right = np.array([[seed >> image & 1 for image in range(12)] for seed in seeds], dtype=float)
    assert right.mean(0).std() <= fmean(right.std(1)) + 1e-12


def test_a_control_is_shared_where_every_seed_has_one():
    table = made_up_table()
    shared = control(table.cells(), "untrained")
    assert shared is not None and shared.each == pytest.approx([0.16, 0.17])
    assert shared.over_images == pytest.approx((0.155, 0.175))
    first, *others = table.cells()
    apart = [replace(first, rows=tuple(replace(row, untrained=0.3) for row in first.rows)), *others]
    assert control(apart, "untrained") is None and control(apart, "calibrated") is not None
    assert control([replace(first, rows=(replace(first.rows[0], untrained=None),))], "untrained") is None


AWKWARD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.lists(st.integers()),
    st.text(st.characters(codec="utf-8", exclude_characters="\r")), st.sampled_from(["3", "NaN", "null", '"', "a,b"]),
    st.dictionaries(st.text(max_size=3), st.integers()),
)  # fmt: skip


@given(AWKWARD, AWKWARD)
@settings(deadline=None, max_examples=50)
def test_a_table_comes_back_from_its_file(tmp_path_factory, one, other):
    rows = [replace(row, settings={"setting": value}) for value in (one, other) for row in made_up_rows(4)]
    table = SweepTable(tuple(rows))
    path = tmp_path_factory.getbasetemp() / "table.csv"
    path.write_text(table.to_csv(), encoding="utf-8")
    assert SweepTable.from_csv(path) == table


def test_another_table_is_not_read(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"other.csv is not the table of a sweep: it lacks run, rule, regime"):
        SweepTable.from_csv(tmp_path / "other.csv")
    with pytest.raises(UserError, match="cannot be read"):
        SweepTable.from_csv(tmp_path / "missing.csv")


def test_a_sweep_saves_again_after_it_grew_and_spares_what_is_not_its_own(tmp_path):
    first, grown = made_up_table(reaches=(1,), seeds=1), made_up_table()
    assert grown.save(tmp_path / "sweep") == tmp_path / "sweep"
    assert (tmp_path / "sweep" / "figures" / "accuracy_map.png").exists()
    first.save(tmp_path / "sweep")
    assert SweepTable.from_csv(tmp_path / "sweep" / "table.csv") == first
    assert json.loads((tmp_path / "sweep" / "table.json").read_text()) == first.to_json()
    drawn = sorted(file.stem for file in (tmp_path / "sweep" / "figures").iterdir())
    assert drawn == ["accuracy_against_memory", "accuracy_against_path", "accuracy_profiles"]
    summary = (tmp_path / "sweep" / "summary.md").read_text()
    assert str(first) in summary and all(f"(figures/{name}.png)" in summary for name in drawn)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="is not the table of a sweep"):
        first.save(tmp_path / "mine")
    made_up_run(tmp_path / "run")
    with pytest.raises(UserError, match="run is a run folder; choose another"):
        first.save(tmp_path / "run")


def test_the_summary_has_a_line_per_cell():
    lines = str(made_up_table()).splitlines()
    assert lines[0] == (
        "Linear probe of the raw output of the last stage, fitted to 500 images, accuracy in % on 1000 test images, "
        "chance 10; four_units on cifar10, 32 px, 10 steps of 8 images"
    )
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    assert cells[0] == ["granularity", "reach", "accuracy", "by seed", "over images", "untrained", "calibrated", "path",
                        "held MiB", "heads (M)"]  # fmt: skip
    assert cells[3] == ["2", "2", "63.0", "0: 62.0; 1: 64.0", "61.0 to 66.0", "16.5", "21.5", "4", "6.0", "1.00"]
    assert len(cells) == 6
    assert "no interval over seeds" in str(made_up_table()) and "over seeds: 95 % t" in str(made_up_table(seeds=3))
