from __future__ import annotations

import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest
import torch

from localsim.analysis import stage_probe
from localsim.analysis.extract import batch_features, calibrated, collect_features
from localsim.analysis.probes import linear_probe, paired_bootstrap
from localsim.analysis.stage_probe import ProbeTable, probe_networks
from localsim.assembly import build_network
from localsim.credit import Credit
from localsim.data import Data, load_data, plain_batches
from localsim.errors import UserError
from localsim.network import LocalNetwork
from localsim.presets import resolve
from localsim.runs import Run

TINY_NETWORK = {"backbone": "resnet20", "image_size": 16, "expand_width": 8, "projector": [8, 8], "batch_size": 8}


def network(**settings) -> LocalNetwork:
    return build_network(resolve("blockwise", None, {**TINY_NETWORK, **settings}))


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data("embedded", image_size=16, train_images=60, test_images=40)


@pytest.fixture(scope="module")
def networks(data) -> dict[str, LocalNetwork]:
    """Two networks in training mode; one has seen something, so that its batch-norm statistics differ."""
    seen = network(seed=1)
    for batch in plain_batches(data.train, size=16, batch_size=20, mean=data.mean, std=data.std):
        for stage, h in enumerate(seen.stage_outputs(batch.views[0])):
            seen.taps[stage].readout(h)
    return {"untrained": network(seed=0), "blockwise": seen}


@pytest.fixture(scope="module")
def table(networks, data) -> ProbeTable:
    before = {name: {k: x.clone() for k, x in net.state_dict().items()} for name, net in networks.items()}
    assert all(net.training for net in networks.values())
    made = probe_networks(networks, data, image_size=16, seed=3)
    for name, net in networks.items():
        assert not net.training
        assert all(torch.equal(x, before[name][k]) for k, x in net.state_dict().items())
    return made


# -- features ---------------------------------------------------------------------------------------------------------


def some_images() -> torch.Tensor:
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_raw_features_are_the_mean_over_positions_and_readout_features_what_the_tap_reads():
    net, x = network().eval(), some_images()
    features = batch_features(net, x)
    assert set(features) == {(stage, kind) for stage in range(3) for kind in ("raw", "readout")}
    with torch.no_grad():
        for stage, h in enumerate(net.stage_outputs(x)):
            by_hand = h.flatten(2).sum(2) / (h.shape[2] * h.shape[3])
            torch.testing.assert_close(features[stage, "raw"], by_hand, rtol=1e-5, atol=1e-6)
            assert torch.equal(features[stage, "readout"], net.taps[stage].readout(h))
            assert features[stage, "raw"].shape == (5, 16 * 2**stage) and features[stage, "readout"].shape == (5, 8)
    assert not any(values.requires_grad for values in features.values())


def test_a_stage_without_a_tap_has_raw_features_only():
    net = network(credit=Credit.overlapping(3).to_config()).eval()
    kinds = set(batch_features(net, some_images()))
    assert kinds == {(0, "raw"), (1, "raw"), (2, "raw"), (1, "readout"), (2, "readout")}


def test_features_are_refused_in_training_mode():
    with pytest.raises(ValueError, match=r"evaluation mode; call net\.eval\(\)"):
        batch_features(network(), some_images())


def test_features_of_an_image_do_not_depend_on_the_others_and_come_in_order(data):
    net = network().eval()
    once, labels = collect_features(net, plain_batches(data.test, size=16, batch_size=40, mean=data.mean, std=data.std))
    parts, _ = collect_features(net, plain_batches(data.test, size=16, batch_size=7, mean=data.mean, std=data.std))
    for name, values in once.items():
        torch.testing.assert_close(parts[name], values, rtol=1e-4, atol=1e-5)
    assert labels is not None and torch.equal(labels, data.test.labels)


def test_bf16_features_are_float32_and_close():
    net, x = network().eval(), some_images()
    exact, rough = batch_features(net, x), batch_features(net, x, precision="bf16")
    for name, values in rough.items():
        assert values.dtype == torch.float32
        assert (values - exact[name]).norm() < 0.05 * exact[name].norm()
        assert not torch.equal(values, exact[name])


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_calibrated_control_has_the_statistics_of_the_images_and_no_weight_changed(data):
    net = network(noise="none")
    before = {name: x.clone() for name, x in net.state_dict().items()}
    batches = list(plain_batches(data.train, size=16, batch_size=15, mean=data.mean, std=data.std))
    twin = calibrated(net, batches)
    assert not twin.training
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items()), "the network itself stays"
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    conv, bn = twin.units[0].parts[:2]
    maps = [conv(batch.views[0]) for batch in batches]
    torch.testing.assert_close(bn.running_mean, torch.stack([x.mean((0, 2, 3)) for x in maps]).mean(0))
    torch.testing.assert_close(bn.running_var, torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in maps]).mean(0))
    assert int(twin.taps[-1].readout.bn.num_batches_tracked) == len(batches), "readouts are calibrated too"
    noisy = network(noise="all:0.25")
    again = [calibrated(noisy, batches, seed=seed).state_dict() for seed in (0, 0, 1)]
    name = "stages.1.units.0.parts.0.bn1.running_mean"
    assert torch.equal(again[0][name], again[1][name]) and not torch.equal(again[0][name], again[2][name])


def test_every_stage_of_every_network_is_probed_in_four_ways(table):
    got = [(row.network, row.stage, row.features, row.probe) for row in table.rows]
    assert len(got) == len(set(got)) == 2 * 3 * 2 * 2
    assert {row.stage for row in table.rows} == {1, 2, 3} and table.networks == ["untrained", "blockwise"]
    assert {row.features for row in table.rows} == {"raw", "readout"}
    assert {row.probe for row in table.rows} == {"linear", "knn"}
    for row in table.rows:
        assert 0 <= row.low <= row.accuracy <= row.high <= 1
        assert row.n_test == 40 and row.chance == 0.1
        assert row.accuracy * 40 == pytest.approx(round(row.accuracy * 40))


def test_the_gain_is_the_difference_to_the_untrained_network(table):
    for row in table.select(network="blockwise"):
        (base,) = table.select(network="untrained", stage=row.stage, features=row.features, probe=row.probe)
        assert row.gain == row.accuracy - base.accuracy
        assert row.gain_low <= row.gain <= row.gain_high
        assert base.gain is base.gain_low is base.gain_high is None
        for one in (row, base):
            assert one.calibrated_gain is one.calibrated_gain_low is one.calibrated_gain_high is None


@pytest.fixture(scope="module")
def controlled(networks, data) -> ProbeTable:
    """The trained network beside both controls; it comes first, as a caller may give them in any order."""
    batches = plain_batches(data.train, size=16, batch_size=20, mean=data.mean, std=data.std)
    three = {
        "blockwise": networks["blockwise"],
        "calibrated": calibrated(networks["untrained"], batches),
        "untrained": networks["untrained"],
    }
    return probe_networks(three, data, image_size=16)


def test_beside_the_calibrated_control_there_is_a_gain_over_it_too(controlled):
    assert controlled.networks == ["untrained", "calibrated", "blockwise"]
    rows = controlled.select(network="blockwise")
    for row in rows:
        for control, prefix in (("untrained", ""), ("calibrated", "calibrated_")):
            (base,) = controlled.select(network=control, stage=row.stage, features=row.features, probe=row.probe)
            gain, low, high = (getattr(row, f"{prefix}gain{end}") for end in ("", "_low", "_high"))
            assert gain == row.accuracy - base.accuracy and low <= gain <= high
            assert base.gain is base.gain_low is base.gain_high is None
            assert base.calibrated_gain is base.calibrated_gain_low is base.calibrated_gain_high is None
    assert len(rows) == 12 and any(row.gain != row.calibrated_gain for row in rows)
    assert ProbeTable.from_json(json.loads(json.dumps(controlled.to_json()))) == controlled
    assert "calibrated_gain,calibrated_gain_low,calibrated_gain_high" in controlled.to_csv().splitlines()[0]


def test_both_gains_are_printed_where_there_are_both_controls(controlled):
    title, *blocks = str(controlled).split("\n\n")
    assert "calibrated: untrained weights with the batch-norm statistics of training images" in title
    heads = ["untrained", "calibrated", "blockwise", "gain over untrained", "gain over calibrated"]
    for block in blocks:
        heading, columns, *lines = block.splitlines()
        probe, features = re.fullmatch(r"(\w+) probe, (\w+) features", heading).groups()
        assert re.split(r"  +", columns.strip()) == ["stage", *heads]
        assert len(lines) == 3
        for stage, line in enumerate(lines, start=1):
            found = {r.network: r for r in controlled.select(stage=stage, features=features, probe=probe)}
            expected = [x for n in heads[:3] for x in (found[n].accuracy, found[n].low, found[n].high)]
            row = found["blockwise"]
            expected += [row.gain, row.gain_low, row.gain_high]
            expected += [row.calibrated_gain, row.calibrated_gain_low, row.calibrated_gain_high]
            numbers = [float(number) for number in re.findall(r"[-+]?\d\.\d{3}", line)]
            assert numbers == pytest.approx(expected, abs=0.0005001)
            # every cell stands under its heading
            starts = [columns.index(head) for head in heads]
            assert all(line[start - 1] == " " and line[start] != " " for start in starts)


def test_a_row_is_the_probe_of_these_features_with_the_paired_interval(table, networks, data):
    answers = {}
    for name, net in networks.items():
        x_train, y_train = collect_features(
            net, plain_batches(data.train, size=16, batch_size=256, mean=data.mean, std=data.std)
        )
        x_test, y_test = collect_features(
            net, plain_batches(data.test, size=16, batch_size=256, mean=data.mean, std=data.std)
        )
        assert y_train is not None and y_test is not None
        key = (1, "raw")
        score = linear_probe(x_train[key], y_train, x_test[key], y_test, num_classes=10, seed=3)
        (row,) = table.select(network=name, stage=2, features="raw", probe="linear")
        assert (row.accuracy, row.low, row.high) == (score.accuracy, score.low, score.high)
        assert score.settings.items() <= row.settings.items()
        answers[name] = score.correct
    assert (row.gain_low, row.gain_high) == paired_bootstrap(answers["blockwise"], answers["untrained"])
    assert not np.array_equal(answers["blockwise"], answers["untrained"])


def test_every_row_says_how_it_was_made(table):
    for row in table.rows:
        common = {"protocol": "logistic", "image_size": 16, "precision": "full", "data": "embedded", "n_train": 60}
        assert {**common, "seed": 3, "probe": row.probe}.items() <= row.settings.items()
    assert all("penalty" in row.settings for row in table.select(probe="linear"))
    assert all(row.settings["k"] == 20 for row in table.select(probe="knn"))


def test_the_table_survives_json(table):
    assert ProbeTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_the_table_survives_csv(table):
    read = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert len(read) == len(table.rows)
    for line, row in zip(read, table.rows, strict=True):
        fields = dataclasses.asdict(row)
        del fields["settings"]
        assert line == {name: "" if value is None else str(value) for name, value in fields.items()}
        assert float(line["accuracy"]) == row.accuracy


def test_the_printed_table_shows_every_number_in_its_place(table):
    title, *blocks = str(table).split("\n\n")
    assert "40 test images" in title and "chance 0.100" in title
    assert len(blocks) == 4
    for block in blocks:
        heading, columns, *lines = block.splitlines()
        probe, features = re.fullmatch(r"(\w+) probe, (\w+) features", heading).groups()
        assert columns.split() == ["stage", "untrained", "blockwise", "gain", "over", "untrained"]
        for stage, line in enumerate(lines, start=1):
            untrained, trained = (
                table.select(network=name, stage=stage, features=features, probe=probe)[0]
                for name in ("untrained", "blockwise")
            )
            numbers = [float(number) for number in re.findall(r"[-+]?\d\.\d{3}", line)]
            expected = [untrained.accuracy, untrained.low, untrained.high, trained.accuracy, trained.low, trained.high]
            expected += [trained.gain, trained.gain_low, trained.gain_high]
            assert line.split()[0] == str(stage) and numbers == pytest.approx(expected, abs=0.0005001)
        assert len(lines) == 3


def test_a_stage_without_readout_is_left_out_of_the_readout_block(data):
    nets = {"untrained": network(credit=Credit.end_to_end(3).to_config())}
    printed = str(probe_networks(nets, data, image_size=16))
    for kind, num_stages in (("raw", 3), ("readout", 1)):
        block = printed.split(f"linear probe, {kind} features\n")[1].split("\n\n")[0]
        assert len(block.splitlines()) == 1 + num_stages


def test_fewer_training_images_can_be_asked_for(networks, data):
    table = probe_networks({"untrained": networks["untrained"]}, data, image_size=16, train_images=30)
    assert {row.settings["n_train"] for row in table.rows} == {30}


@pytest.mark.parametrize("protocol", ["logistic", "paper"])
def test_features_of_training_images_stay_within_their_memory(protocol, monkeypatch):
    """A ResNet-20 cut in three with readouts of width 8 has 16 + 32 + 64 + 3 * 8 numbers per image, in float32."""
    many = load_data("embedded", image_size=16, train_images=300, test_images=40)
    net, per_image = network(), 4 * (16 + 32 + 64 + 3 * 8)
    monkeypatch.setattr(stage_probe, "FEATURE_BYTES", per_image * 250 + 1)
    most = []

    def collected(*args, **more):
        features, labels = collect_features(*args, **more)
        most.append(sum(x.numel() * x.element_size() for x in features.values()))
        return features, labels

    monkeypatch.setattr(stage_probe, "collect_features", collected)
    options = {"epochs": 1} if protocol == "paper" else {}
    table = probe_networks({"untrained": net}, many, image_size=16, protocol=protocol, **options)
    assert most == [per_image * 250, per_image * 40]
    assert {row.settings["n_train"] for row in table.select(probe="knn")} == {250}
    # SGD streams its images and keeps none of their features
    assert {row.settings["n_train"] for row in table.select(probe="linear")} == {300 if protocol == "paper" else 250}
    # no less than 20 images a class, however little memory there is said to be
    monkeypatch.setattr(stage_probe, "FEATURE_BYTES", 1)
    table = probe_networks({"untrained": net}, many, image_size=16)
    assert {row.settings["n_train"] for row in table.rows} == {200}


# -- the paper's protocol ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("report", ["last", "best"])
def test_the_papers_protocol_trains_by_sgd_and_says_what_it_reports(networks, data, report):
    table = probe_networks(networks, data, image_size=16, protocol="paper", epochs=3, report=report, seed=1)
    rows = table.select(probe="linear")
    assert len(rows) == 12 and len(table.rows) == 24
    for row in rows:
        expected = {"protocol": "paper", "epochs": 3, "report": report, "lr": 0.1, "seed": 1}
        assert expected.items() <= row.settings.items()
    reported = {row.settings["reported_epoch"] for row in rows}
    assert reported == {2} if report == "last" else reported <= {0, 1, 2} and len(reported) > 1


def test_the_best_epoch_is_never_below_the_last(networks, data):
    last, best = (
        probe_networks(networks, data, image_size=16, protocol="paper", epochs=12, report=report)
        for report in ("last", "best")
    )
    pairs = list(zip(last.rows, best.rows, strict=True))
    assert all(b.accuracy >= a.accuracy for a, b in pairs) and any(b.accuracy > a.accuracy for a, b in pairs)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_data_without_labels_are_refused(networks, data):
    unlabelled = dataclasses.replace(data, name="photos", classes=(), probe_train=None, test=None)
    with pytest.raises(UserError, match="data set 'photos' has no labelled training and test images to probe on"):
        probe_networks(networks, unlabelled, image_size=16)


@pytest.mark.parametrize("options", [{"epochs": 3}, {"report": "last"}, {"epochs": 3, "report": "best"}], ids=str)
def test_options_of_the_paper_protocol_are_refused_for_the_other(networks, data, options):
    with pytest.raises(UserError, match="epochs and report have no meaning for protocol logistic; allowed with: paper"):
        probe_networks(networks, data, image_size=16, **options)


def test_an_unknown_protocol_or_report_is_refused(networks, data):
    with pytest.raises(UserError, match="unknown probe protocol 'svm'; allowed: logistic, paper"):
        probe_networks(networks, data, image_size=16, protocol="svm")
    with pytest.raises(UserError, match="unknown report 'first'; allowed: last, best"):
        probe_networks(networks, data, image_size=16, protocol="paper", report="first")


def test_a_probe_without_the_untrained_network_is_refused(networks, data):
    with pytest.raises(ValueError, match="needs the untrained network beside it"):
        probe_networks({"blockwise": networks["blockwise"]}, data, image_size=16)


@pytest.mark.parametrize(("augmentation", "grey"), [("patches", True), ("small", False)])
def test_a_network_trained_without_colour_is_probed_without(data, tmp_path, monkeypatch, augmentation, grey):
    net = network()
    run = Run(tmp_path, resolve("blockwise", None, {**TINY_NETWORK, "augmentation": augmentation}))
    made = probe_networks({"untrained": net, "blockwise": net}, data, image_size=16, grey=grey)
    seen = []
    monkeypatch.setattr(stage_probe, "probe_networks", lambda *_, **options: seen.append(options) or made)
    stage_probe.probe(run, data=data, trained=net)
    assert [options["grey"] for options in seen] == [grey]
    assert [options["crop"] for options in seen] == [2 / 3 if grey else None], "at the scale it was trained at"
    assert {row.settings["grey"] for row in made.rows} == {grey}
