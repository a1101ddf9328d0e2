"""The benchmark of the input runs, and its contestants do the same work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from localsim.data import AUGMENTATIONS
from localsim.data.images import decode

SCRIPT = "input"
SMALL = ["--images", "6", "--passes", "2", "--size", "32", "--small-images", "6", "--batch-size", "4"]


@pytest.fixture
def file(benchmark, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(benchmark, "SHAPE", (60, 80))
    benchmark.make_jpegs(tmp_path, 2)
    first, second = (decode(path) for path in sorted(tmp_path.iterdir()))
    assert first.shape == (3, 60, 80) and not torch.equal(first, second)
    return next(tmp_path.iterdir())


def test_both_pipelines_read_the_same_picture(benchmark, file):
    whole = decode(file)
    assert np.array_equal(np.asarray(benchmark.read_pil(file)), whole.permute(1, 2, 0))
    assert benchmark.only_decode(file) == benchmark.only_draft(file) == 3


def test_pil_views_differ_as_they_should(benchmark, file):
    image = Image.fromarray(np.full((40, 50, 3), 200, np.uint8))
    grey = benchmark.replace(AUGMENTATIONS["barlow_twins"], jitter=0.0, gray=1.0, blur=(1.0, 0.0), solarize=(0.0, 1.0))
    first, second = benchmark.PilViews(16, grey)(image)
    mean, std = (torch.tensor(one)[:, None, None] for one in (benchmark.MEAN, benchmark.STD))
    assert first.shape == second.shape == (3, 16, 16)
    torch.testing.assert_close(first * std + mean, torch.full((3, 16, 16), 200 / 255))
    torch.testing.assert_close(second * std + mean, torch.full((3, 16, 16), 55 / 255))


@pytest.mark.parametrize("task", ["jpeg", "memory"])
def test_every_contestant_goes_through_all_images(benchmark, file, task):
    paths = tuple(sorted(file.parent.iterdir())) * 3 if task == "jpeg" else ()
    pixels = None if task == "jpeg" else torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
    setting = benchmark.Setting(paths, pixels, 16, 4, workers=0, device="cpu")
    for name, work in benchmark.TASKS[task].items():
        assert list(work(setting)) == [4, 2], name


def test_host_row_asks_for_all_of_the_augmentation_but_of_stand_ins(benchmark, file, monkeypatch):
    """The views themselves are on a device that computes nothing."""
    made, asked = [], []
    own, recolour_ = benchmark.view_loader, benchmark.recolour_

    def noted(crops, indices, augmentation, **options):
        asked.append((tuple(crops.shape), crops.device.type, indices.tolist(), augmentation, options["view"]))
        return recolour_(crops, indices, augmentation, **options)

    monkeypatch.setattr(benchmark, "view_loader", lambda *given: made.append(own(*given)) or made[-1])
    monkeypatch.setattr(benchmark, "recolour_", noted)
    barlow = AUGMENTATIONS["barlow_twins"]
    setting = benchmark.Setting((file,) * 3, None, 16, 2, workers=0, device="cuda")
    assert list(benchmark.localsim_host(setting, barlow)) == [2, 1]
    assert made[0].device.type == "meta" and made[0].augmentation.crop_scale == barlow.crop_scale
    assert asked == [
        ((len(indices), 3, 2, 2), "cpu", indices, barlow, view) for indices in ([0, 1], [2]) for view in (0, 1)
    ]


def test_script_prints_a_table_and_leaves_nothing(benchmark, monkeypatch, capsys, tmp_path):
    """Without processes of its own: two more interpreters would take longer than all the rest."""
    monkeypatch.setattr(benchmark, "alone", benchmark.measured)
    monkeypatch.setattr(benchmark.tempfile, "tempdir", str(tmp_path))
    benchmark.main([*SMALL, "--workers", "0", "--repeats", "1"])
    about, files, _, *table = capsys.readouterr().out.splitlines()
    assert "0 worker(s)" in about and files.startswith("6 files of ")
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + len(benchmark.TASKS["jpeg"]) + len(benchmark.TASKS["memory"])
    reference = [line for line in table if f"| {benchmark.REFERENCE} |" in line]
    assert len(reference) == 2 and all(line.endswith("| 1.0 |") for line in reference)
    assert not list(tmp_path.iterdir())
