"""Cached outputs of frozen stages in whole runs: when they are made, kept and deleted, and disks that fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_tensors, checkpoint_tensors, timeless, tiny_config, tiny_loader, tiny_settings, train_in

import localsim
from localsim import runs, sources
from localsim.assembly import build_network
from localsim.cli import main
from localsim.data import Batch
from localsim.errors import UserError
from localsim.network import LocalNetwork
from localsim.schedule import Phase, Schedule
from localsim.sources import Views, open_source

CACHED = {"schedule": "sequential", "feature_cache": True}


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
    rule, settings = "greedy_infomax", {"patches": "8:4", "schedule": "sequential", "max_steps": 7}
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
