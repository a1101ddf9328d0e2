"""What feeds a phase: views scaled to its tap, or cached outputs of the frozen stages."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import assert_same_tensors, checkpoint_tensors, timeless, tiny_config, tiny_loader, tiny_settings, train_in

import localsim
from localsim import runs, sources
from localsim.assembly import build_network, view_strengths
from localsim.cli import main
from localsim.config import Config
from localsim.credit import Credit
from localsim.data import Batch, ViewLoader
from localsim.errors import UserError
from localsim.network import LocalNetwork
from localsim.sources import CachedFeatures, Views, batches, open_source
from localsim.train import Phase, Schedule

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


def forward_calls(net: LocalNetwork) -> Counter[int]:
    """Return a count of the images that pass each stage's first unit, kept up to date."""
    calls: Counter[int] = Counter()
    for number, stage in enumerate(net.stages):

        def count(_module, inputs, _out, number=number):
            calls[number] += len(inputs[0])

        stage.units[0].register_forward_hook(count)
    return calls


@pytest.mark.parametrize("interrupted", [False, True])
def test_frozen_stages_run_once_per_phase(tmp_path, interrupted):
    """40 images of 2 views fill a cache; effective ranks are measured on 8 of them, at the end of a phase only."""
    settings = {**CACHED, "log_every": 100, "epochs": 6}  # 30 steps, 10 per phase, two epochs each
    if interrupted:
        train_in(tmp_path, **settings, max_steps=23)
    counts: list[Counter[int]] = []
    train_in(tmp_path, **settings, alter=lambda net: counts.append(forward_calls(net)))
    filling, training, checked = 2 * 40, 2 * 8 * 10, 8
    if interrupted:
        assert counts[0] == {2: 2 * 8 * 7 + checked}
    else:
        assert counts[0] == {
            0: training + checked + 2 * filling,
            1: training + checked + filling,
            2: training + checked,
        }


def test_a_cache_is_filled_again_unless_it_is_complete(tmp_path):
    train_in(tmp_path / "whole", **CACHED, max_steps=7)
    for name, damage, refilled in (
        ("complete", lambda _folder: None, False),
        ("without record", lambda folder: (folder / "complete.json").unlink(), True),
        ("cut short", lambda folder: os.truncate(folder / "view1.bin", 1000), True),
        ("without a view", lambda folder: (folder / "view0.bin").unlink(), True),
    ):
        path = tmp_path / name
        train_in(path, **CACHED, max_steps=6)
        folder = path / "cache" / "phase001"
        assert {file.name for file in folder.iterdir()} == {"complete.json", "view0.bin", "view1.bin"}
        damage(folder)
        counts: list[Counter[int]] = []
        train_in(path, **CACHED, alter=lambda net, counts=counts: counts.append(forward_calls(net)), max_steps=7)
        assert (counts[0][0] == 2 * 40) == refilled and (counts[0][0] == 0) != refilled, name
        assert_same_tensors(checkpoint_tensors(path), checkpoint_tensors(tmp_path / "whole"))
        assert timeless(runs.read_metrics(path)) == timeless(runs.read_metrics(tmp_path / "whole"))


def test_only_the_cache_of_the_phase_that_runs_is_kept(tmp_path, monkeypatch):
    kept = []
    append = runs.append_metrics

    def look(path: Path, row: dict) -> None:
        append(path, row)
        kept.append([folder.name for folder in (path / "cache").glob("*")])

    monkeypatch.setattr(runs, "append_metrics", look)
    train_in(tmp_path, **CACHED)
    assert kept == [[]] * 3 + [["phase001"]] * 4 + [["phase002"]] * 3
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_the_last_step_left_behind_is_deleted_on_resume(tmp_path):
    train_in(tmp_path, **CACHED)
    (tmp_path / "cache" / "phase002").mkdir(parents=True)
    train_in(tmp_path, **CACHED)
    assert not (tmp_path / "cache").exists()


def test_a_rule_on_patches_trains_on_cached_features_as_on_views_of_one_draw(tmp_path, monkeypatch):
    """The same run without a cache, but with the views of the phase's first epoch all along, gives the same losses."""
    settings = {**PATCHES, "schedule": "sequential", "max_steps": 7}
    rule = settings.pop("rule")
    train_in(tmp_path / "cached", rule, **settings, feature_cache=True)

    class FirstDraw(Views):
        def epoch(self, epoch, start_step=0):
            # the views of epoch 0 in the order of `epoch`
            drawn = list(self.loader.all_views(0))
            views = [torch.cat([batch.views[view] for batch in drawn]) for view in range(self.loader.num_views)]
            for indices in self.loader.order(epoch, start_step):
                yield Batch(tuple(x[indices] for x in views), None, indices)

    monkeypatch.setattr(sources, "Views", FirstDraw)
    train_in(tmp_path / "plain", rule, **settings)
    cached, plain = (runs.read_metrics(tmp_path / name) for name in ("cached", "plain"))
    first = Schedule.of(tiny_config(rule, **settings), 5, 3).phases[0].stop
    assert len(cached) == len(plain) == 7 > first
    for row, other in zip(cached[first:], plain[first:], strict=True):
        # float32 convolutions over batches put together otherwise
        assert row["loss"] == {tap: pytest.approx(loss, rel=1e-3) for tap, loss in other["loss"].items()}


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


# -- disks ------------------------------------------------------------------------------------------------------------


def test_a_disk_too_small_for_the_cache_is_named_before_it_is_filled(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sources.shutil, "disk_usage", lambda _folder: usage._replace(free=10**6))
    needed = 40 * 2 * 16 * 16 * 16 * 4
    assert needed > 10**6
    with pytest.raises(UserError, match=r"feature_cache True needs 0\.0 GB in .*phase001, where 0\.0 GB are free"):
        train_in(tmp_path, **CACHED)
    monkeypatch.undo()
    train_in(tmp_path, **CACHED)
    train_in(tmp_path / "whole", **CACHED)
    assert_same_tensors(checkpoint_tensors(tmp_path), checkpoint_tensors(tmp_path / "whole"))


def command_line(settings: dict) -> list[str]:
    """Return `--set name=value` for all settings."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return [part for name, text in texts.items() for part in ("--set", f"{name}={text}")]


@pytest.mark.parametrize("what", ["features", "record"])
def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, capsys, what):
    written = Path.open
    monkeypatch.chdir(tmp_path)

    def full(path: Path, *_rest: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def fill(path: Path, mode: str = "r", *rest, **named):
        if path.name == "view1.bin" and mode == "ab" and path.exists():
            full(path)
        return written(path, mode, *rest, **named)

    with monkeypatch.context() as patched:
        if what == "record":
            patched.setattr(sources, "write_json", full)
        else:
            patched.setattr(Path, "open", fill)
        settings = {**tiny_settings("blockwise"), **CACHED, "probe_protocol": "none"}
        assert main(["run", "--out", "here", *command_line(settings)]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told == (
        f"localsim: the feature cache {Path('here/cache/phase001')} could not be written "
        "(No space left on device); make room and continue with --resume"
    )
    assert not (tmp_path / "here/cache/phase001").exists()
    assert main(["run", "--out", "here", "--resume"]) == 0
    assert runs.checkpoint_step(tmp_path / "here") == 10 and not (tmp_path / "here/cache").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path):
    config = tiny_config(**CACHED)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match=r"the feature cache .* could not be written \(Permission denied\)"):
            open_source(build_network(config), tiny_loader(config), config, tmp_path, Phase(1, 3, 7, (1,)))
    finally:
        tmp_path.chmod(0o700)


def test_a_file_where_the_cache_should_be_is_one_sentence(tmp_path):
    config = tiny_config(**CACHED)
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(UserError, match=r"the feature cache .* could not be written \("):
        open_source(build_network(config), tiny_loader(config), config, tmp_path, Phase(1, 3, 7, (1,)))


# -- what cannot be cached --------------------------------------------------------------------------------------------


def test_a_head_that_reads_images_is_refused_before_a_folder_is_made(tmp_path):
    settings: dict[str, Any] = {**tiny_settings("infopro"), **CACHED, "probe_protocol": "none"}
    told = "feature_cache True keeps outputs of frozen stages in place of images, which head infopro needs"
    with pytest.raises(UserError, match=told):
        localsim.run("infopro", out=tmp_path / "run", quiet=True, **settings)
    assert not (tmp_path / "run").exists()
    localsim.run("infopro", out=tmp_path / "run", quiet=True, **{**settings, "feature_cache": False})


# -- the strength of views --------------------------------------------------------------------------------------------


def test_view_strengths_are_receptive_field_over_image_size():
    """ResNet-20's convolutions are 3x3; the stem's and two per block. Strides of 2 begin stages 2 and 3.

    Stage 1: 1 + 2 * (1 + 2 * 3) = 15. Stage 2: its first convolution at jump 1, five at jump 2: 15 + 2 + 5 * 4 = 37.
    """
    config = tiny_config("lcl", image_size=32)
    net = build_network(config)
    assert config.schedule == "sequential"
    assert view_strengths(config, net) == [15 / 32, 1.0, 1.0]
    larger = tiny_config("lcl", image_size=64)
    assert view_strengths(larger, build_network(larger)) == [15 / 64, 37 / 64, 1.0]
    assert view_strengths(tiny_config(image_size=32), net) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("cached", [False, True])
def test_the_views_of_a_phase_are_scaled_to_its_tap(tmp_path, cached):
    config = tiny_config("lcl", image_size=64, feature_cache=cached)
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
    train_in(tmp_path, "lcl", image_size=32)
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
