"""The benchmark of similarity runs, its contestants agree, and its memory is that of the work."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from localsim.analysis.similarity.measure import Numerics, column_chunks

SCRIPT = "similarity"
SMALL = ["--images", "40", "--image-size", "32", "--wide", "300", "--wide-images", "40"]
# of scores: torch_cka works in float32 on features that are not centred, scikit-learn chooses penalties otherwise
AGREE = {
    "cka_minibatch": 1e-3,
    "cka_minibatch_units": 1e-3,
    "cka": 1e-5,
    "rsa": 1e-4,
    "predictivity": 0.05,
    "cka_wide": 1e-5,
    "rsa_wide": 1e-4,
}
SHAPES = {"cka_minibatch_units": (16, 16), "cka_wide": (1, 1), "rsa_wide": (1, 1)}


def tiny(name):
    """Return a network with the layers of a ResNet, but run in no time and with maps that are centred."""
    torch.manual_seed(ord(name))
    stages, inside = OrderedDict(), 3
    for i, (width, units) in enumerate(((4, 3), (6, 4), (8, 6), (10, 3)), 1):
        blocks = []
        for unit in range(units):
            convolution = nn.Conv2d(inside, width, 3, 1 if unit else 2, 1)
            blocks.append(nn.Sequential(convolution, nn.InstanceNorm2d(width)))
            inside = width
        stages[f"layer{i}"] = nn.Sequential(*blocks)
    return nn.Sequential(stages).eval()


def test_every_row_has_an_expectation(benchmark):
    assert set(AGREE) == set(benchmark.TASKS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # other packages' own
@pytest.mark.parametrize("task", AGREE)
def test_contestants_agree(benchmark, monkeypatch, tmp_path, task):
    monkeypatch.setattr(benchmark, "network", tiny)
    row = benchmark.TASKS[task]
    benchmark.DATA[row.data](tmp_path / "data", benchmark.arguments(SMALL))
    own, *others = row.contestants
    assert own == "localsim"
    scores = row.contestants[own](tmp_path / "data")()
    assert scores.shape == SHAPES.get(task, (4, 4))
    for other in others:
        if not benchmark.installed(other):
            pytest.skip(f"{other} is not installed")
        np.testing.assert_allclose(row.contestants[other](tmp_path / "data")(), scores, rtol=0, atol=AGREE[task])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_peak_is_that_since_the_reset(benchmark):
    """In a fresh process, as the benchmark has it: a long one may hand out memory that it never gave back."""
    code = """
import numpy as np, similarity
np.ones(2**24)
before = similarity.resident_peak(reset=True)
np.ones(2**23)
print(similarity.resident_peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(benchmark.__file__).parent, capture_output=True, text=True, check=True
    )
    assert 0.9 * 2**26 < int(done.stdout) < 1.5 * 2**26


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_mapped_features_are_never_in_memory_at_once(benchmark, tmp_path):
    shape = (1000, 2**16)  # 256 MiB
    np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=shape).flush()
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    before = benchmark.resident_peak(reset=True)
    assert sum(chunk.shape[1] for chunk in column_chunks(x, Numerics.of(x))) == shape[1]
    assert benchmark.resident_peak() - before < x.nbytes / 3


def test_script_prints_a_table_and_leaves_nothing(benchmark, capsys, tmp_path):
    benchmark.main([*SMALL, "--repeats", "1", "--only", "cka_wide", "--without", "numpy", "--scratch", str(tmp_path)])
    about, _, *table = capsys.readouterr().out.splitlines()
    assert f"{torch.get_num_threads()} thread(s)" in about
    assert len({line.count("|") for line in table}) == 1 and len(table) == 3
    assert "1 x 1 layers, n = 40, p = 300 | localsim |" in table[-1] and table[-1].endswith("| 0e+00 |")
    assert not list(tmp_path.iterdir())
