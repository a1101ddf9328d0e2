"""Which regime a network belongs to, its controls, its steps of training, and where its layers lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config, train_in
from torch import nn
from torchvision.models import resnet18

from localsim.analysis.feature_store import Features
from localsim.analysis.regimes import Layer, common_images, open_subjects, regime_names
from localsim.analysis.sources import Source
from localsim.errors import UserError
from localsim.runs import load_run, start_run, writing

SHORT = {"epochs": 2, "max_steps": 2, "train_images": 16, "snapshot_every": 1, "warmup_epochs": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Return folders of runs: two rules, one of them with two seeds, and one without training."""
    folder = tmp_path_factory.mktemp("runs")
    made = {"first": ("blockwise", {}), "second": ("blockwise", {"seed": 1}), "end": ("end_to_end", {}),
            "finer": ("blockwise", {"granularity": 2})}  # fmt: skip
    for name, (rule, settings) in made.items():
        train_in(folder / name, rule, **SHORT, **settings)
    with writing(folder / "untrained"):
        start_run(folder / "untrained", tiny_config("untrained"))
    return {name: folder / name for name in (*made, "untrained")}


def named(subjects):
    return [(subject.regime, subject.seed, subject.step) for subject in subjects]


def test_regimes_are_named_by_their_rule_and_what_sets_them_apart():
    plain, seed = tiny_config(), tiny_config(seed=3, snapshot_every=2, log_every=7, probe_protocol="none")
    assert regime_names([plain, seed, tiny_config("end_to_end")]) == ["blockwise", "blockwise", "end_to_end"]
    two, quiet = tiny_config(granularity=2), tiny_config(noise="none")
    cut = f"granularity={plain.granularity}"
    names = regime_names([plain, seed, two, quiet])
    assert names[0] == names[1] == f"blockwise {cut} noise=all:0.25"
    assert names[2:] == ["blockwise granularity=2 noise=all:0.25", f"blockwise {cut} noise=none"]
    assert regime_names([tiny_config("end_to_end"), two]) == ["end_to_end", "blockwise"], "nothing to be set apart from"
    assert regime_names([]) == []


def test_controls_are_added_once_for_each_seed(runs):
    subjects = open_subjects([runs["first"], str(runs["second"]), load_run(runs["end"])])
    assert named(subjects) == [
        ("untrained", 0, None), ("untrained", 1, None),
        ("blockwise", 0, None), ("blockwise", 1, None), ("end_to_end", 0, None),
    ]  # fmt: skip
    assert named(open_subjects([runs["first"]], controls=[])) == [("blockwise", 0, None)]
    both = open_subjects([runs["first"]], controls=["untrained", "calibrated"])
    assert named(both) == [("untrained", 0, None), ("calibrated", 0, None), ("blockwise", 0, None)]
    weights = {one.regime: one.open().network.state_dict() for one in both if one.open}  # pyright: ignore
    assert weights["untrained"].keys() == weights["calibrated"].keys()
    first = next(name for name in weights["untrained"] if name.endswith("conv1.weight"))
    moving = next(name for name in weights["untrained"] if name.endswith("running_var"))
    assert torch.equal(weights["untrained"][first], weights["calibrated"][first])
    assert not torch.equal(weights["untrained"][first], weights["blockwise"][first])
    assert torch.equal(weights["untrained"][moving], torch.ones_like(weights["untrained"][moving]))
    assert not torch.equal(weights["untrained"][moving], weights["calibrated"][moving])


def test_an_untrained_run_is_its_own_control_for_its_seed(runs):
    assert named(open_subjects([runs["untrained"], runs["first"]])) == [("untrained", 0, None), ("blockwise", 0, None)]
    subjects = open_subjects([runs["untrained"], runs["second"]])
    assert named(subjects) == [("untrained", 1, None), ("untrained", 0, None), ("blockwise", 1, None)]


def test_controls_of_several_architectures_are_told_apart(runs):
    config = load_run(runs["first"]).config
    large = replace(load_run(runs["first"]), config=replace(config, image_size=32))
    other = replace(load_run(runs["end"]), config=replace(load_run(runs["end"]).config, backbone="resnet32"))
    assert [one.regime for one in open_subjects([runs["first"], large])[:2]] == [
        "untrained image_size=16", "untrained image_size=32",
    ]  # fmt: skip
    assert [one.regime for one in open_subjects([runs["first"], other])[:2]] == [
        "untrained resnet20", "untrained resnet32",
    ]  # fmt: skip


def test_over_training_adds_the_beginning_and_every_snapshot(runs):
    assert load_run(runs["first"]).snapshots, "what is tested needs some"
    steps = [0, *load_run(runs["first"]).snapshots]
    subjects = open_subjects([runs["first"]], over_training=True)
    assert named(subjects) == [
        ("untrained", 0, None), *(("blockwise", 0, step) for step in steps), ("blockwise", 0, None)
    ]  # fmt: skip
    opened = [one.open().weights_hash() for one in subjects if one.open]
    assert opened[0] == opened[1], "the control is where the run began"
    assert opened[-2] == opened[-1] and len(set(opened)) == len(steps), "the last snapshot is its end"
    assert named(open_subjects([runs["untrained"]], over_training=True)) == [("untrained", 0, None)]


def test_networks_and_arrays_are_points_too(tmp_path):
    x = np.zeros((5, 2))
    kept = Features.of_arrays({"V1": x}, name="macaque")
    net = nn.Sequential(nn.Flatten())
    subjects = open_subjects([{"V1": x}, kept, net, Source.of(net, name="mine"), "torchvision:resnet18"])
    assert named(subjects) == [
        (name, None, None) for name in ("arrays 1", "macaque", "Sequential", "mine", "torchvision:resnet18")
    ]  # fmt: skip


def test_networks_of_one_name_are_numbered_and_a_run_comes_once(runs):
    net = nn.Sequential(nn.Flatten())
    subjects = open_subjects([net, {"a": np.zeros((5, 2))}, nn.Sequential(nn.Flatten())])
    assert named(subjects) == [("Sequential 1", None, None), ("arrays 2", None, None), ("Sequential 2", None, None)]
    with pytest.raises(UserError, match=r"first and .*first are both blockwise with seed 0; give one run of each seed"):
        open_subjects([runs["first"], runs["first"]])


@pytest.mark.parametrize(
    ("given", "options", "sentence"),
    [(["first"], {"controls": ["frozen"]}, "unknown control 'frozen'; allowed: untrained, calibrated"),
     (["nowhere"], {}, "nowhere is not a run folder")],
)  # fmt: skip
def test_what_is_not_there_is_a_sentence(given, options, sentence, runs, tmp_path):
    with pytest.raises(UserError, match=sentence):
        open_subjects([runs.get(name, tmp_path / name) for name in given], **options)


def test_a_run_without_snapshots_has_no_course(runs, tmp_path):
    train_in(tmp_path / "short", "blockwise", **{**SHORT, "max_steps": 1, "snapshot_every": None})
    with pytest.raises(UserError, match=r"short has no snapshots.*train with --set snapshot_every=1"):
        open_subjects([tmp_path / "short"], over_training=True)


def layers_of(subject, choice, images):
    return {layer.name: layer for layer in subject.read(images, choice, batch_size=8)[1]}


def test_ends_are_the_same_places_however_a_run_is_cut(runs):
    images = torch.rand(4, 3, 16, 16)
    four, two, end = (open_subjects([runs[name]], controls=[])[0] for name in ("first", "finer", "end"))
    names = [list(layers_of(one, "ends", images)) for one in (four, two, end)]
    assert names[0] == names[1] == names[2] and len(names[0]) == 3
    found = layers_of(two, "ends", images)
    assert [layer.depth for layer in found.values()] == pytest.approx([4 / 10, 7 / 10, 1])
    assert next(iter(found.values())) == Layer("blockwise", 0, None, names[0][0], 0.4)


def test_depth_is_the_share_of_unit_blocks(runs):
    images = torch.rand(4, 3, 16, 16)
    subject = open_subjects([runs["first"]], controls=[])[0]
    units = layers_of(subject, "units", images)
    assert [layer.depth for layer in units.values()] == pytest.approx(np.arange(1, 11) / 10)
    net = load_run(runs["first"]).network()
    stages = layers_of(subject, "stages", images)
    readouts = layers_of(subject, "readouts", images)
    ends = np.cumsum(net.units_per_stage) / 10
    assert list(stages) == [f"stage{i + 1}" for i in range(len(ends))]
    assert [layer.depth for layer in stages.values()] == pytest.approx(ends)
    assert [layer.depth for layer in readouts.values()] == pytest.approx(ends)
    inside = layers_of(subject, {"modules": ["conv1", "layer1", "layer2.0.conv1", "layer2"]}, images)
    assert {name: layer.depth for name, layer in inside.items()} == pytest.approx(
        {"conv1": 0.1, "layer1": 0.4, "layer2.0.conv1": 0.5, "layer2": 0.7}
    )


def test_depth_of_other_networks():
    torch.manual_seed(0)
    images = torch.rand(4, 3, 32, 32)
    net = open_subjects([resnet18()])[0]
    found = layers_of(net, "ends", images)
    assert {name: layer.depth for name, layer in found.items()} == pytest.approx(
        {"layer1": 3 / 9, "layer2": 5 / 9, "layer3": 7 / 9, "layer4": 1}
    )
    plain = open_subjects([nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))])[0]
    chosen = layers_of(plain, {"modules": ["0", "2"]}, images)
    assert {name: layer.depth for name, layer in chosen.items()} == {"0": 0.5, "2": 1}
    arrays = open_subjects([{name: np.zeros((4, 2)) for name in ("V1", "V2", "V4", "IT")}])[0]
    assert [layer.depth for layer in layers_of(arrays, "units", None).values()] == [0.25, 0.5, 0.75, 1]


def test_an_unknown_choice_of_layers_is_a_sentence(runs):
    subject = open_subjects([runs["first"]], controls=[])[0]
    with pytest.raises(UserError, match="unknown choice of layers 'tops'; allowed: ends, stages, units, readouts"):
        subject.read(torch.rand(4, 3, 16, 16), "tops")


def test_images_are_the_runs_own_and_balanced(runs):
    opened = [load_run(runs[name]) for name in ("first", "end")]
    assert len(common_images(opened, None)) == 40
    some = common_images(opened, 20)
    assert len(some) == 20
    assert set(np.bincount(np.asarray(some.labels), minlength=10)) == {2}
    with pytest.raises(UserError, match="networks without a run have no images of their own; give images"):
        common_images([], 20)
    other = replace(opened[1], config=replace(opened[1].config, data="cifar10"))
    with pytest.raises(UserError, match="the runs were trained on cifar10, embedded; give the images to compare them"):
        common_images([opened[0], other], 20)


def test_a_run_that_has_moved_is_the_same_but_for_where_its_images_lie(runs):
    run = load_run(runs["first"])
    moved = run.moved(data=None, data_root="elsewhere", device="cpu")
    assert moved.path == run.path and moved.config == replace(run.config, data_root="elsewhere", device="cpu")
    assert run.moved(data=None, data_root=None, device=None) == run
    assert load_run(runs["first"]).config == run.config, "on disk nothing moves"


def test_layers_print_what_they_are_of():
    assert str(Layer("loco", 1, 40, "layer2", 0.5)) == "loco seed 1 step 40 layer2"
    assert str(Layer("loco", None, None, "layer2", 0.5)) == "loco layer2"
