"""The benchmark of precision trains in both, and its table is that of the losses."""

from __future__ import annotations

import tempfile

import numpy as np
import pytest
from PIL import Image

SCRIPT = "precision"
TINY = ["--backbone", "resnet20", "--size", "32", "--batch", "8", "--width", "8", "--steps", "2"]


def test_script_prints_a_table_and_leaves_nothing(benchmark, monkeypatch, capsys, tmp_path):
    images, scratch = tmp_path / "images", tmp_path / "scratch"
    images.mkdir()
    scratch.mkdir()
    for i in range(16):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    benchmark.main([*TINY, "--data", str(images), "--seeds", "2", "--windows", "2"])
    about, _, _, rule, *table = capsys.readouterr().out.splitlines()
    assert "thread(s)" in about and {line.count("|") for line in (rule, *table)} == {8}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len(rows) == 4 * 2 and [row[1] for row in rows[:2]] == ["1 to 1", "2 to 2"]
    assert len({row[0] for row in rows}) == 4
    numbers = np.array([[float(cell) for cell in row[2:]] for row in rows])
    assert np.isfinite(numbers).all() and (numbers[:, 3] > 0).all()
    # a seed sets the weights and the noise, and rounding is the only other difference
    assert (numbers[:, 2] != 0).any() and np.abs(numbers[:, 2] / numbers[:, 0]).max() < 0.1
    assert not list(scratch.glob("localsim*"))  # torch may keep a cache


def test_differences_are_of_means_over_seeds_and_windows(benchmark):
    full = [{"1": np.array([1.0, 3.0, 5.0, 5.0])}, {"1": np.array([5.0, 7.0, 7.0, 7.0])}]
    bf16 = [{"1": np.array([2.0, 4.0, 5.0, 5.0])}, {"1": np.array([6.0, 8.0, 6.0, 6.0])}]
    first, second = benchmark.lines({"full": full, "bf16": bf16}, 2)
    assert first == "| 1 | 1 to 2 | 4.0000 | 5.0000 | +1.0000 | 2.8284 | 0.35 |"
    assert second == "| 1 | 3 to 4 | 6.0000 | 5.5000 | -0.5000 | 1.4142 | 0.35 |"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1"], "--seeds is 1; without at least 2 nothing says how far seeds are apart"),
        (["--windows", "3"], "--windows is 3; it must be between 1 and --steps, 2"),
    ],
)
def test_what_would_give_no_number_is_refused(benchmark, capsys, options, message):
    with pytest.raises(SystemExit):
        benchmark.arguments([*TINY, *options])
    assert message in capsys.readouterr().err
