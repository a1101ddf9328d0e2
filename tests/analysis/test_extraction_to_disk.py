from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from shown import assert_equal, counted, network, pixels, source
from tiny import train_in
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from localsim import runs
from localsim.analysis.extraction import feature_batches, features
from localsim.analysis.feature_store import Features
from localsim.analysis.sources import Source
from localsim.data import ImageSet
from localsim.errors import UserError
from localsim.network import LocalNetwork


def test_a_folder_holds_bit_for_bit_what_memory_holds(tmp_path):
    asked = {"stages": "all", "readouts": [1], "spatial": "flatten", "batch_size": 3}
    images = ImageSet(pixels(), None, torch.arange(7))
    memory = features(source(), images, **asked)
    disk = features(source(), images, **asked, to=tmp_path / "deep" / "here")
    assert all(isinstance(array, np.memmap) for array in disk.values())
    for other in (disk, Features.load(tmp_path / "deep" / "here")):
        assert_equal(other, memory)
        assert np.array_equal(other.labels, memory.labels) and other.record == json.loads(json.dumps(memory.record))
    net = network()
    with counted(net) as passes, pytest.raises(UserError, match="here exists already"):
        features(source(net), images, to=tmp_path / "deep" / "here")
    assert passes == []


def test_a_folder_does_not_appear_where_the_pass_fails(tmp_path):
    with pytest.raises(UserError, match="not finite"):
        features(
            source(),
            torch.cat([pixels().float() / 255, torch.full((1, 3, 16, 16), torch.nan)]),
            batch_size=2,
            to=tmp_path / "x",
        )
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    features(source(), pixels())
    assert list(tmp_path.iterdir()) == []


def test_the_cache_gives_the_same_without_a_forward_pass(tmp_path):
    net, images = network(), pixels()
    with counted(net) as passes:
        first = features(source(net), images, cache=tmp_path)
        assert passes == [7]
        labelled = ImageSet(images, None, torch.arange(7))
        again = features(replace(source(net), name="other"), labelled, cache=tmp_path, batch_size=3)
        copied = features(source(net), images, cache=tmp_path, to=tmp_path / "copy")
        assert passes == [7]
    for one in (again, copied, features(source(net), images)):
        assert_equal(one, first)
    # labels and names are not part of what was computed: those of now count
    assert first.labels is None and again.labels is not None and again.labels.tolist() == list(range(7))
    assert (first.record["source"], again.record["source"]) == ("tiny", "other")
    assert first.record["images"] == again.record["images"] and all(isinstance(x, np.memmap) for x in again.values())


def one_bit(net: nn.Module) -> None:
    with torch.no_grad():
        next(net.parameters()).view(torch.int32).flatten()[0] ^= 1


def running_mean(net: LocalNetwork) -> None:
    net.units[0].parts[1].running_mean[0] += 1e-6  # type: ignore[index,union-attr]


@pytest.mark.parametrize(
    ("change", "asked", "fields"),
    [
        (one_bit, {}, {}),
        (running_mean, {}, {}),
        (None, {"stages": [1]}, {}),
        (None, {"stages": [1, 0]}, {}),
        (None, {"modules": ["stages.0", "stages.1"], "stages": None}, {}),
        (None, {"spatial": "2x2"}, {}),
        (None, {"seed": 1}, {}),
        (None, {"precision": "bf16"}, {}),
        (None, {}, {"size": 15}),
        (None, {}, {"mean": (0.5, 0.4, 0.31)}),
        (None, {}, {"std": (0.2, 0.3, 0.26)}),
        (None, {}, {"grey": True}),
        (None, {}, {"crop": 0.9}),
        (None, {"images": "pixel"}, {}),
        (None, {"images": "order"}, {}),
        (None, {"images": "fewer"}, {}),
    ],
)
def test_any_weight_pixel_or_setting_misses_the_cache(tmp_path, change, asked, fields):
    base = {"stages": [0, 1], "images": pixels(4), "cache": tmp_path}
    features(source(), **base)
    other = pixels(4)
    other[3, 2, 15, 15] ^= 1
    images = {"pixel": other, "order": pixels(4).flip(0), "fewer": pixels(4)[:3]}
    if "images" in asked:
        asked = {"images": images[asked["images"]]}
    net = network()
    if change is not None:
        change(net)
    with counted(net) as passes:
        features(source(net, **fields), **{**base, **asked})
    assert len(passes) == 1 and len(list(tmp_path.iterdir())) == 2


def test_images_in_another_order_every_time_are_not_cached(tmp_path):
    loader = DataLoader(
        TensorDataset(pixels(30)), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    with pytest.raises(UserError, match="the images differed between two passes over them"):
        features(source(), loader, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(features(source(), loader)["stage1"]) == 30


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_is_shown_its_own_test_images_and_its_snapshots_differ(tmp_path):
    train_in(tmp_path / "first", snapshot_every=1)
    run = runs.load_run(tmp_path / "first")
    made = {
        which: features(Source.of(run, which=which), cache=tmp_path / "c") for which in ("trained", "untrained", 5, 10)
    }
    assert made["trained"].names == ["stage1", "stage2", "stage3"] and made["trained"].labels is not None
    assert len(made["trained"].indices) == 40 and made["trained"].record["size"] == 16
    assert_equal(made[10], made["trained"])
    assert not np.array_equal(made[5]["stage1"], made[10]["stage1"]) and len(list((tmp_path / "c").iterdir())) == 3
    assert_equal(features(tmp_path / "first"), made["trained"])
    versions = made["trained"].record["versions"]
    assert versions["torch"] == torch.__version__ and set(versions) == {"localsim", "torch", "numpy"}
    assert repr(made[5]).splitlines()[0] == "Features of first step 5: n = 40, spatial mean"


def test_batches_are_the_features_piece_by_piece_and_the_network_is_left_as_it_was():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    images = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = features(net, images, modules=["0", "2"], spatial="flatten", batch_size=3)
    parts = list(feature_batches(net, images, modules=["0", "2"], spatial="flatten", batch_size=3))
    assert [len(part["0"]) for part in parts] == [3, 3, 1]
    for name in whole:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])
    started = feature_batches(net, images, modules=["0"], batch_size=3)
    next(started)
    assert not net.training and torch.is_grad_enabled()
    started.close()
    assert net.training and not any(module._forward_hooks for module in net.modules())
    with pytest.raises(UserError, match="batch_size is 0"):
        feature_batches(net, images, modules=["0"], batch_size=0)
