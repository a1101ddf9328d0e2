from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
import torch
from tiny import train_in

from localsim.analysis.corrupted_probe import CLEAN, MEAN, RobustnessTable, robustness
from localsim.analysis.corruptions import CORRUPTIONS, corrupt
from localsim.analysis.extract import collect_features
from localsim.analysis.probes import linear_probe
from localsim.analysis.stage_probe import probe
from localsim.data import Batch, Data, ImageSet, plain_batches
from localsim.errors import UserError
from localsim.runs import Run, load_run, writing

NAMES, LEVELS = ["gaussian_noise", "fog", "contrast"], [2, 5]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    path = tmp_path_factory.mktemp("robustness") / "run"
    train_in(path, epochs=1)
    return load_run(path)


@pytest.fixture(scope="module")
def data() -> Data:
    """Noisy images of four colours, which features of the tiniest networks tell apart, though not always."""
    colours = np.array([[120, 70, 70], [70, 120, 70], [70, 70, 120], [110, 110, 70]])

    def images(num: int) -> ImageSet:
        draw, labels = np.random.default_rng(num), np.arange(num) % 4
        shade = colours[labels] + draw.normal(0, 22, (num, 3))
        pixels = shade[:, :, None, None] + draw.normal(0, 30, (num, 3, 16, 16))
        return ImageSet(torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), None, torch.from_numpy(labels))

    train = images(80)
    return Data("colours", ("r", "g", "b", "y"), train, train, images(60), (0.4, 0.4, 0.4), (0.15, 0.15, 0.15))


@pytest.fixture(scope="module")
def table(run, data) -> RobustnessTable:
    return robustness(run, data=data, corruptions=NAMES, severities=LEVELS, name="table")


def test_clean_accuracy_is_the_stored_probes(run, data, table):
    stored = probe(run, data=data)
    for network in ("untrained", "calibrated", "blockwise"):
        for stage in (1, 2, 3):
            (row,) = table.select(network=network, stage=stage, corruption=CLEAN)
            (old,) = stored.select(network=network, stage=stage, features="raw", probe="linear")
            assert (row.accuracy, row.n_test, row.chance) == (old.accuracy, 60, 0.25)
            assert row.accuracy > 0.4
            assert (row.severity, row.retention, row.retention_low) == (0, 1, 1)
            assert table.settings["penalties"][f"{network} {stage}"] == old.settings["penalty"]
            assert row.low == pytest.approx(old.low, abs=0.03) and row.high == pytest.approx(old.high, abs=0.03)


def test_a_corrupted_row_is_that_probe_on_corrupted_images(run, data, table):
    net = run.network()
    x_train, y_train = collect_features(net, plain_batches(data.probe_train, size=16, batch_size=256, mean=data.mean,
                                                           std=data.std))  # fmt: skip
    changed = corrupt(data.test.images, "fog", 5, seed=0, indices=range(60)).float() / 255
    views = (changed - torch.tensor(data.mean)[:, None, None]) / torch.tensor(data.std)[:, None, None]
    x_test, _ = collect_features(net, [Batch((views,), data.test.labels, torch.arange(60))])
    for stage in range(3):
        score = linear_probe(x_train[stage, "raw"], y_train, x_test[stage, "raw"], data.test.labels, num_classes=4)
        (row,) = table.select(network="blockwise", stage=stage + 1, corruption="fog", severity=5)
        assert row.accuracy == pytest.approx(score.accuracy, abs=0.5 / 60)
        assert row.low <= row.accuracy <= row.high


def test_means_retention_and_gains_are_of_the_same_images(table):
    assert len(table.rows) == 3 * 3 * (1 + 3 * 2 + 3 + 1)
    for network in ("untrained", "calibrated", "blockwise"):
        for stage in (1, 2, 3):
            rows = {(row.corruption, row.severity): row for row in table.select(network=network, stage=stage)}
            single = [rows[name, level].accuracy for name in NAMES for level in LEVELS]
            mean, clean = rows[MEAN, None], rows[CLEAN, 0]
            assert mean.accuracy == pytest.approx(np.mean(single))
            assert rows["fog", None].accuracy == pytest.approx(
                np.mean([rows["fog", level].accuracy for level in LEVELS])
            )
            assert mean.retention == pytest.approx(mean.accuracy / clean.accuracy)
            assert mean.low < mean.accuracy < mean.high and mean.retention_low < mean.retention < mean.retention_high
            assert [rows["fog", 2].category, mean.category, clean.category] == ["weather", None, None]
            for control, prefix in (("untrained", "gain"), ("calibrated", "calibrated_gain")):
                gain, low = getattr(mean, prefix), getattr(mean, f"{prefix}_low")
                if network == "blockwise":
                    (base,) = table.select(network=control, stage=stage, corruption=MEAN)
                    assert gain == pytest.approx(mean.accuracy - base.accuracy) and low <= gain
                else:
                    assert gain is None and low is None


def test_the_mce_is_relative_to_the_reference(run, data):
    reference = {"gaussian_noise": 0.8, "fog": 0.9, "contrast": 0.7}
    made = robustness(run, data=data, corruptions=NAMES, stages=[2], reference=reference, name="mce")
    assert "  mce " in str(made)
    stored = RobustnessTable.from_json(json.loads((run.path / "mce.json").read_text()))
    assert stored.rows == made.rows and stored.settings["reference"] == reference
    (row,) = stored.select(network="blockwise", stage=3, corruption=MEAN)
    errors = [1 - stored.select(network="blockwise", corruption=name, severity=None)[0].accuracy for name in NAMES]
    assert row.mce == pytest.approx(np.mean([e / reference[n] for e, n in zip(errors, NAMES, strict=True)]))
    assert row.mce_low < row.mce < row.mce_high
    assert [r.stage for r in stored.rows] == [3] * len(stored.rows), "only the stage asked for"


def test_without_a_reference_there_is_no_mce(table):
    assert all(row.mce is None for row in table.rows) and "mce" not in str(table)


def test_the_table_is_stored_and_says_how_it_was_made(run, table):
    stored = RobustnessTable.from_json(json.loads((run.path / "table.json").read_text()))
    assert stored.rows == table.rows
    assert stored.settings["frost"] == "procedural" and stored.settings["n_train"] == 80
    noise = CORRUPTIONS["gaussian_noise"]
    assert stored.settings["parameters"]["gaussian_noise"] == [list(noise.parameters(level, 16)) for level in LEVELS]
    rows = list(csv.DictReader(io.StringIO((run.path / "table.csv").read_text())))
    assert len(rows) == len(table.rows)
    assert float(rows[-1]["accuracy"]) == table.rows[-1].accuracy and rows[0]["retention_low"] == "1.0"
    text = str(table)
    assert "on 60 corrupted test images" in text and "frost: procedural" in text and "95 % interval" in text
    for line in ("untrained", "calibrated", "blockwise", "  gaussian_noise ", "  retention "):
        assert line in text
    (row,) = table.select(network="blockwise", stage=1, corruption="fog", severity=None)
    assert f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]" in text


def test_the_batch_size_changes_no_corruption(run, data, table, monkeypatch):
    monkeypatch.setattr("localsim.analysis.corrupted_probe.BATCH", 7)
    again = robustness(run, data=data, corruptions=["gaussian_noise"], severities=[5], stages=[0], name="again")
    for row in again.select(corruption="gaussian_noise", severity=5):
        (old,) = table.select(network=row.network, stage=row.stage, corruption="gaussian_noise", severity=5)
        assert row.accuracy == pytest.approx(old.accuracy, abs=1.5 / 60)  # rounding may move one image


def test_fewer_test_images_are_spread_over_the_classes(run, data):
    few = robustness(run, data=data, corruptions=["contrast"], severities=[1], stages=[0], test_images=20, name="few")
    assert {row.n_test for row in few.rows} == {20} and {row.stage for row in few.rows} == {1}


QUICK = {"severities": [1], "stages": [0], "test_images": 12}


def test_files_are_named_by_options_and_never_replaced(run, data):
    asked = {"data": data, "corruptions": ["contrast", "fog"], "images": 40, "seed": 3, **QUICK}
    made = robustness(str(run.path), **asked)
    name = "robustness-corruptions=contrast+fog-severities=1-stages=0-images=40-test_images=12-seed=3"
    kept = (run.path / f"{name}.json").read_text()
    assert RobustnessTable.from_json(json.loads(kept)).rows == made.rows and (run.path / f"{name}.csv").is_file()
    for options in (asked, {**asked, "name": name}):
        with pytest.raises(UserError, match=r"seed=3\.json exists already; give another name"):
            robustness(run, **options)
    assert (run.path / f"{name}.json").read_text() == kept


def test_names_of_files_tell_long_options_apart_and_leave_defaults_out(run, data, monkeypatch):
    made = RobustnessTable((), {})
    monkeypatch.setattr("localsim.analysis.corrupted_probe._measured", lambda *_given: made)
    before = {path.name for path in run.path.iterdir()}
    everything = dict.fromkeys(CORRUPTIONS, 0.5)
    for options in (
        {},
        {"corruptions": list(CORRUPTIONS)[1:]},
        {"corruptions": list(CORRUPTIONS)[:-1]},
        {"reference": everything},
        {"reference": {**everything, "fog": 0.6}},
    ):
        robustness(run, data=data, **options)
    added = sorted(path.name for path in run.path.iterdir() if path.name not in before and path.suffix == ".json")
    assert len(added) == 5 and "robustness.json" in added and all(len(name) < 40 for name in added)
    with pytest.raises(UserError, match="exists already"):
        robustness(run, data=data, corruptions=list(CORRUPTIONS), severities=range(1, 6))


def test_a_run_that_is_being_written_is_left_alone(run, data):
    with writing(run.path), pytest.raises(UserError, match="being written by another process"):
        robustness(run, data=data, corruptions=["fog"], name="locked", **QUICK)
    assert not (run.path / "locked.json").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"corruptions": ["rain"]}, "unknown corruption 'rain'; allowed: gaussian_noise"),
        ({"corruptions": []}, r"corruption \[\] must name at least one"),
        ({"corruptions": ["fog", "fog"]}, "each once"),
        ({"severities": [0]}, "unknown severity 0; allowed: 1, 2, 3, 4, 5"),
        ({"stages": [3]}, "unknown stage 3; allowed: 0, 1, 2"),
        ({"test_images": 9}, "at least 10 test images, not 9"),
        ({"test_images": -5}, "number of images is -5; allowed: 1 or more"),
        ({"images": 0}, "number of images is 0; allowed: 1 or more"),
        ({"reference": {"fog": 0.9}}, "missing: .'gaussian_noise'"),
        ({"corruptions": ["fog"], "reference": {"fog": 0.9}, "severities": [1]}, "all severities"),
        ({"corruptions": ["fog"], "reference": {"fog": 90}}, "reference error 90 of fog must lie above 0"),
    ],
)
def test_what_cannot_be_asked_is_said(run, data, options, message):
    with pytest.raises(UserError, match=message):
        robustness(run, data=data, **options)


def test_data_without_labels_are_refused(run, data):
    bare = Data(data.name, data.classes, data.train, None, None, data.mean, data.std)
    with pytest.raises(UserError, match="no labelled training and test images"):
        robustness(run, data=bare, name="bare")
