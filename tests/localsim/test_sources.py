"""What feeds a phase: views scaled to its tap, or cached outputs of the frozen stages."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import assert_same_tensors, checkpoint_tensors, tiny_config, tiny_loader, train_in

from localsim import sources
from localsim.assembly import build_network, view_strengths
from localsim.config import Config
from localsim.credit import Credit
from localsim.data import ViewLoader
from localsim.errors import UserError
from localsim.network import LocalNetwork
from localsim.schedule import Phase, Schedule
from localsim.sources import CachedFeatures, Views, batches, open_source

CACHED = {"schedule": "sequential", "feature_cache": True}
PATCHES = {"rule": "greedy_infomax", "backbone": "resnet20", "patches": "8:4", "image_size": 16}


def settled(config: Config) -> LocalNetwork:
    """Return a network whose running statistics are not those of a new one."""
    net = build_network(config)
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            if "running" in name:
                buffer.add_(0.3)
    return net


def plain_outputs(net: LocalNetwork, loader: ViewLoader, stage: int, epoch: int, precision: str = "full"):
    """Return each view's outputs of a stage for all images, by image, computed without the cache."""
    net.eval()
    found: list[dict[int, torch.Tensor]] = [{} for _ in range(loader.num_views)]
    for batch in loader.all_views(epoch):
        for view, images in enumerate(batch.views):
            x = net.fold(images)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                for below in list(net.stages)[: stage + 1]:
                    x = below(x)
            for index, patches in zip(batch.indices.tolist(), x.split(net.patches_per_image), strict=True):
                found[view][index] = patches
    return found


@pytest.mark.parametrize(
    "settings",
    [{}, {"precision": "bf16"}, {"channels_last": True}, PATCHES],
    ids=["full", "bf16", "channels_last", "patches"],
)
def test_cached_features_are_the_frozen_stages_outputs_bit_for_bit(tmp_path, settings):
    config = tiny_config(**{"train_images": 44, **settings, **CACHED})  # the last four fill no batch
    net, loader = settled(config), tiny_loader(config)
    source = open_source(net, loader, config, tmp_path, Phase(2, 7, 10, (2,)))
    assert isinstance(source, CachedFeatures) and source.start == 2
    expected = plain_outputs(net, loader, stage=1, epoch=1, precision=config.precision)
    seen = []
    for epoch in (1, 2):
        for order, batch in zip(loader.order(epoch), source.epoch(epoch), strict=True):
            assert torch.equal(batch.indices, order)
            assert batch.labels is not None and loader.images.labels is not None
            assert torch.equal(batch.labels, loader.images.labels[order])
            for view, features in enumerate(batch.views):
                assert torch.equal(features, torch.cat([expected[view][i] for i in order.tolist()]))
                assert features.dtype == (torch.bfloat16 if config.precision == "bf16" else torch.float32)
            seen.append(batch.indices.tolist())
    assert seen[:5] != seen[5:], "every epoch has an order of its own"
    assert len({outputs[0].float().numpy().tobytes() for outputs in expected}) == loader.num_views, (
        "every view is another one"
    )


def test_an_epoch_can_be_entered_in_the_middle(tmp_path):
    config = tiny_config(**CACHED)
    source = open_source(settled(config), tiny_loader(config), config, tmp_path, Phase(1, 3, 7, (1,)))
    whole = list(source.epoch(3))
    for batch, other in zip(source.epoch(3, 2), whole[2:], strict=True):
        assert torch.equal(batch.indices, other.indices)
        assert all(torch.equal(x, y) for x, y in zip(batch.views, other.views, strict=True))


@pytest.mark.parametrize(("first", "last"), [(0, 10), (3, 7), (4, 5), (5, 10), (7, 7), (2, 14)])
def test_the_batches_of_a_phase_go_on_over_the_ends_of_epochs(first, last):
    loader = tiny_loader(tiny_config())
    expected = [(epoch, indices.tolist()) for epoch in range(3) for indices in loader.order(epoch)][first:last]
    found = [(epoch, batch.indices.tolist()) for epoch, batch in batches(Views(loader), first, last, 5)]
    assert found == expected


# -- when there is a cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "settings", "starts"),
    [
        ("blockwise", CACHED, [0, 1, 2]),
        ("loco", {**CACHED, "objective": "barlow_twins"}, [0, 1]),
        ("end_to_end", CACHED, [0]),
        ("blockwise", {"schedule": "sequential"}, [0, 0, 0]),
        ("blockwise", {}, [0]),
        ("blockwise", {**CACHED, "credit": Credit(np.array([[0, 1, 0]]), (1,)).to_config()}, [0]),
    ],
)
def test_a_cache_begins_where_a_phase_may_change_something(tmp_path, rule, settings, starts):
    config = tiny_config(rule, **settings)
    net, loader = build_network(config), tiny_loader(config)
    phases = Schedule.of(config, 5, len(net.taps)).phases
    assert [open_source(net, loader, config, tmp_path, phase).start for phase in phases] == starts


# -- streamed images --------------------------------------------------------------------------------------------------


@pytest.fixture
def image_folder(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Return a function that writes a folder of 40 images of two classes, streamed and some of them cut short."""
    monkeypatch.setattr("localsim.data.datasets.MAX_BYTES_IN_MEMORY", 0)

    def write(broken: tuple[int, ...] = ()) -> Path:
        root = tmp_path / "images"
        generator = np.random.default_rng(0)
        for split, number in (("train", 40), ("test", 40)):
            for i in range(number):
                folder = root / split / f"class{i % 2}"
                folder.mkdir(parents=True, exist_ok=True)
                image = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / f"{i:02d}.png")
                if split == "train" and i in broken:
                    whole = (folder / f"{i:02d}.png").read_bytes()
                    (folder / f"{i:02d}.png").write_bytes(whole[: len(whole) // 2])
        return root

    return write


def streamed(folder: Path, **settings) -> Config:
    return tiny_config(**{"data": str(folder), "train_images": None, "test_images": None, **CACHED, **settings})


def test_a_streamed_image_that_cannot_be_read_is_left_out_of_the_cache(tmp_path, image_folder):
    config = streamed(image_folder((7,)))
    net = settled(config)
    with pytest.warns(UserWarning, match=r"07\.png"):
        loader = tiny_loader(config)
        broken = [i for i, file in enumerate(loader.images.paths or ()) if file.name == "07.png"]
        source = open_source(net, loader, config, tmp_path, Phase(1, 3, 7, (1,)))
        expected = plain_outputs(net, loader, stage=0, epoch=0)
    assert isinstance(source, CachedFeatures)
    assert json.loads((tmp_path / "cache/phase001/complete.json").read_text())["unreadable"] == broken
    sizes = []
    for order, batch in zip(loader.order(4), source.epoch(4), strict=True):
        assert batch.indices.tolist() == [i for i in order.tolist() if i not in broken]
        for view, features in enumerate(batch.views):
            assert torch.equal(features, torch.cat([expected[view][i] for i in batch.indices.tolist()]))
        sizes.append(len(batch.indices))
    assert sorted(sizes) == [7, 8, 8, 8, 8]


@pytest.mark.filterwarnings("ignore:.*png")
def test_a_run_on_streamed_images_resumes_to_the_same_weights(tmp_path, image_folder):
    settings = {"data": str(image_folder((7,))), "train_images": None, "test_images": None, **CACHED}
    for name, stops in (("whole", [None]), ("parts", [5, None])):
        for stop in stops:
            train_in(tmp_path / name, **settings, max_steps=stop)
    assert_same_tensors(checkpoint_tensors(tmp_path / "whole"), checkpoint_tensors(tmp_path / "parts"))


@pytest.mark.filterwarnings("ignore:.*png")
def test_a_batch_of_which_too_little_can_be_read_is_refused(tmp_path, image_folder):
    config = streamed(image_folder())
    loader = tiny_loader(config)
    for file in (loader.images.paths or ())[4:]:
        os.truncate(file, 200)
    source = open_source(settled(config), loader, config, tmp_path, Phase(1, 3, 7, (1,)))
    with pytest.raises(UserError, match=r"only [01] of a batch of 8 images could be read"):
        list(source.epoch(0))


# -- the strength of views --------------------------------------------------------------------------------------------


def test_view_strengths_are_receptive_field_over_image_size():
    """ResNet-20's convolutions are 3x3; the stem's and two per block. Strides of 2 begin stages 2 and 3.

    Stage 1: 1 + 2 * (1 + 2 * 3) = 15. Stage 2: its first convolution at jump 1, five at jump 2: 15 + 2 + 5 * 4 = 37.
    """
    config = tiny_config("lcl", image_size=32, granularity="stage")
    net = build_network(config)
    assert config.schedule == "sequential"
    assert view_strengths(config, net) == [15 / 32, 1.0, 1.0]
    larger = tiny_config("lcl", image_size=64, granularity="stage")
    assert view_strengths(larger, build_network(larger)) == [15 / 64, 37 / 64, 1.0]
    assert view_strengths(tiny_config(image_size=32), net) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("cached", [False, True])
def test_the_views_of_a_phase_are_scaled_to_its_tap(tmp_path, cached):
    config = tiny_config("lcl", image_size=64, granularity="stage", feature_cache=cached)
    net, loader = build_network(config), tiny_loader(config)
    before = loader.augmentation
    for phase, strength in zip(Schedule.of(config, 5, 3).phases, (15 / 64, 37 / 64, 1.0), strict=True):
        source = open_source(net, loader, config, tmp_path, phase)
        assert isinstance(source, CachedFeatures if cached and phase.number else Views)
        assert source.loader.augmentation == before.scaled(strength)
    assert loader.augmentation == before


def test_lcl_trains_every_stage_on_views_of_its_own(tmp_path, monkeypatch):
    seen = []
    inner = sources.open_source

    def watch(*arguments):
        source = inner(*arguments)
        assert isinstance(source, Views)
        seen.append(source.loader.augmentation)
        return source

    monkeypatch.setattr("localsim.train.open_source", watch)
    train_in(tmp_path, "lcl", image_size=32, granularity="stage")
    full = tiny_loader(tiny_config(image_size=32)).augmentation
    assert seen == [full.scaled(15 / 32), full, full]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"view_strength": "receptive_field"},
            "view_strength receptive_field needs schedule sequential: in one pass all",
        ),
        (
            {"feature_cache": True},
            "feature_cache True needs schedule sequential: without frozen stages there is nothing",
        ),
    ],
)
def test_what_only_a_sequence_of_phases_can_do_is_refused_without_one(settings, told):
    with pytest.raises(UserError, match=told):
        tiny_config(schedule="simultaneous", **settings)
    assert math.isfinite(tiny_config(schedule="sequential", **settings).lr)
