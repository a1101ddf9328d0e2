"""The benchmark against Brain-Score runs, its contestants agree, and it leaves nothing behind."""

from __future__ import annotations

import sys
import tempfile

import numpy as np
import pytest
from torch import nn

from localsim.analysis.sources import Source
from localsim.backbones import UnitBlock
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.network import LocalNetwork, Stage
from localsim.patches import Patches

SCRIPT = "brain"


def job(benchmark, metric="pls"):
    return benchmark.Job((), None, None, metric)


def network(patches):
    """Return a network of two stages."""
    stages = [
        Stage([UnitBlock("stem", [("conv1", nn.Conv2d(3, 4, 3, 2, 1))])]),
        Stage([UnitBlock("layer1.0", [("layer1.0", nn.Conv2d(4, 4, 3, 2, 1))])]),
    ]
    return LocalNetwork(stages, [], Credit(np.zeros((0, 2)), ()), patches=patches, image_size=16)


@pytest.mark.parametrize("metric", ["pls", "ridgecv"])
def test_localsim_predicts_neurons_that_add_up_pixels(benchmark, tmp_path, metric):
    scores = benchmark.localsim(job(benchmark, metric), tmp_path)()
    assert scores.shape == (2,)
    assert 0.5 < scores[0] < 1 and 0.1 < scores[1] < scores[0]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of old xarray, pandas
@pytest.mark.parametrize("metric", ["pls", "ridgecv"])
def test_contestants_agree(benchmark, tmp_path, metric):
    if not benchmark.installed():
        pytest.skip("needs the extra [brain]")
    own, *others = [open_(job(benchmark, metric), tmp_path)() for open_ in benchmark.CONTESTANTS.values()]
    for other in others:
        np.testing.assert_allclose(other, own, rtol=0, atol=1e-6)


def test_everything_has_the_same_scores_and_those_of_baselines(benchmark, tmp_path):
    own = benchmark.localsim(job(benchmark), tmp_path)()
    bare, *others = [open_(job(benchmark), tmp_path)() for open_ in benchmark.FULL.values()]
    np.testing.assert_array_equal(bare, own)
    for scores in others:
        assert len(scores) == len(own) + 2  # pixels and gabor
        assert set(own) <= set(scores)


def test_modules_are_those_that_end_stages(benchmark):
    net = network(None)
    modules = dict(net.named_modules())
    assert [modules[name] for name in benchmark.modules_of(Source("plain", net))] == list(net.stages)
    with pytest.raises(UserError, match="cut cuts images into patches"):
        benchmark.modules_of(Source("cut", network(Patches(8, 4))))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_script_prints_a_table_and_leaves_nothing(benchmark, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    others = [name for name in benchmark.CONTESTANTS if name != "localsim"]
    benchmark.main(["--sample", "--repeats", "1", "--metrics", "pls", "--without", *others])
    about, _, *table = capsys.readouterr().out.splitlines()
    assert "OMP_NUM_THREADS" in about
    assert len({line.count("|") for line in table}) == 1 and len(table) == 3
    assert "| pls; 1 run x 2 layers, made up: 120 images, 7 neurons | localsim |" in table[-1]
    assert table[-1].endswith("| 1.0 | 1.0 | 1.0 | 0e+00 |")
    assert not list(tmp_path.iterdir())


def test_runs_need_recordings(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.arguments(["runs/blockwise", "--full"])
    assert "give both runs and --recordings" in capsys.readouterr().err
