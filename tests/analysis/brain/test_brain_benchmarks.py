"""Benchmarks of Brain-Score over all layers in one pass, and over the layer that recordings choose."""

from __future__ import annotations

import csv
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recording_folders import work_in
from tiny import train_in
from torch import nn

from localsim.analysis import features
from localsim.analysis.brain import benchmarks, figures
from localsim.analysis.brain.brainscore import BenchmarkScore, brain_model, brain_models, prepare, quiet
from localsim.analysis.brain.folders import save_recording
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.brain.scoring import score
from localsim.analysis.sources import Source
from localsim.cli import main
from localsim.data import ImageSet
from localsim.errors import UserError
from localsim.network import LocalNetwork

SHORT = {"epochs": 1, "train_images": 16, "warmup_epochs": 0}
N = 40


def recorded(run: Path, name: str, seed: int, layers: dict[str, int]) -> Recording:
    """Return noisy responses of regions, each made from a stage of a run."""
    rng = np.random.default_rng(seed)
    images = ImageSet(torch.from_numpy(rng.integers(0, 256, (N, 3, 16, 16), dtype=np.uint8)), None, None)
    made, regions = [], []
    for region, stage in layers.items():
        x = features(Source.of(run).whole(), images, stages=[stage], spatial="2x2")[f"stage{stage + 1}"]
        tuned = (x - x.mean(0)).astype(np.float64) @ rng.normal(size=(x.shape[1], 5))
        made.append(tuned[:, :, None] / tuned.std() + rng.normal(scale=0.2, size=(N, 5, 3)))
        regions += [region] * 5
    return Recording(name, images, np.concatenate(made, 1), regions=tuple(regions), degrees=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return where a run, a recording of two regions and one of V1 alone lie."""
    folder = tmp_path_factory.mktemp("made")
    train_in(folder / "runs" / "one", **SHORT)
    save_recording(recorded(folder / "runs" / "one", "mine", 0, {"V4": 1, "IT": 2}), folder / "my" / "mine")
    save_recording(recorded(folder / "runs" / "one", "lone", 0, {"V1": 0}), folder / "my" / "lone")
    return folder


@pytest.fixture
def here(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(figures, "brain_figures", lambda _: {})
    return work_in(tmp_path, folder, monkeypatch)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Return the list to which every forward pass adds how many images it saw."""
    seen: list[int] = []
    forward = LocalNetwork.forward

    def counted(self, x):
        seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(LocalNetwork, "forward", counted)
    return seen


def command(text: str) -> int:
    return main(["brain", *text.split()])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# -- with a stand-in for Brain-Score ----------------------------------------------------------------------------------


class Judge:
    region: str | None = "IT"


@pytest.fixture
def stand_in(monkeypatch) -> list[tuple]:
    """Let benchmarks be of IT and cost nothing, and return what is asked of them."""
    asked: list[tuple] = []

    def models(source, commitments, **settings):
        assert source.crop == 1, "images are shown whole, as animals saw them"
        asked.append((source.name, source.size, [dict(one) for one in commitments], settings))
        return [f"{source.name} {one['IT']}" for one in commitments]

    def judged(judge, made):
        assert isinstance(judge, Judge)
        return BenchmarkScore("X", made, "IT", made.split()[-1], 0.25, -0.5, 0.9, None)

    monkeypatch.setattr(benchmarks, "open_benchmark", lambda name: Judge())
    monkeypatch.setattr(benchmarks, "brain_models", models)
    monkeypatch.setattr(benchmarks, "score_benchmark", judged)
    return asked


QUICK = "runs/one --recordings my/mine --benchmark X --resamples 0 --spatial 2x2"


def test_recordings_choose_the_layer_of_every_network(here, stand_in, capsys):
    assert command(f"{QUICK} --layers stages --metric ridge,rdm --controls untrained,pixels --seed 3 --out made") == 0
    made = score("runs/one", recordings="my/mine", metric="ridge", layers="stages", resamples=0, spatial="2x2", seed=3)
    best = {}
    for regime in ("untrained", "blockwise"):
        matrix = {layer: value for (layer, region), value in made.matrix(regime, 0).items() if region == "IT"}
        best[regime] = max(matrix, key=lambda layer: matrix[layer])
    assert best["blockwise"] == "stage3", "that the responses are made of"
    written = rows(here / "made" / "X.csv")
    assert {row["regime"]: row["layer"] for row in written} == best and len(written) == 2
    assert {row["chosen_by"] for row in written} == {"ridge of IT in mine"}
    settings = {"degrees": 8, "spatial": "2x2", "seed": 3}
    assert stand_in == [
        ("one untrained", 16, [{"IT": best["untrained"]}], settings),
        ("one", 16, [{"IT": best["blockwise"]}], settings),
    ]
    assert {path.name for path in (here / "made").iterdir()} == {"ridge", "rdm", "X.csv"}
    out = capsys.readouterr().out
    assert "tables and figures in made/ridge" in out and "table in made/X.csv; layers chosen by ridge of IT in" in out
    assert "that is best here was chosen by these data" not in out


def test_each_network_has_the_layer_of_its_own_seed(here, stand_in, tmp_path):
    for seed in (1, 2):
        train_in(tmp_path / f"s{seed}", seed=seed, **SHORT)
    assert command(f"s1 s2 {QUICK.removeprefix('runs/one ')} --layers stages --controls none --metric rdm") == 0
    made = score("s1", "s2", recordings="my/mine", metric="rdm", layers="stages", resamples=0, spatial="2x2")
    for row in rows(here / "brain" / "s1+s2" / "X.csv"):
        matrix = {layer: v for (layer, at), v in made.matrix("blockwise", int(row["seed"])).items() if at == "IT"}
        assert row["layer"] == max(matrix, key=lambda layer: matrix[layer])


def test_a_network_that_is_no_run_has_a_layer_chosen_as_well(here, stand_in):
    quick = QUICK.replace("runs/one", "torchvision:resnet18").replace("2x2", "mean")
    assert command(f"{quick} --image-size 32 --metric rdm --controls none --seed 1 --out made") == 0
    (row,) = rows(here / "made" / "X.csv")
    options = {"metric": "rdm", "resamples": 0, "spatial": "mean", "image_size": 32, "controls": (), "seed": 1}
    matrix = score("torchvision:resnet18", recordings="my/mine", **options).matrix("torchvision:resnet18")
    of_it = {layer: value for (layer, region), value in matrix.items() if region == "IT"}
    assert row["layer"] == max(of_it, key=lambda layer: of_it[layer]) and row["regime"] == "torchvision:resnet18"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "runs/one --recordings my/lone --benchmark X",
            "benchmark X is of region IT, but the recordings are of V1; give recordings of IT to choose layers by",
        ),
        (f"{QUICK} --regions V4", "benchmark X is of region IT, but the recordings are of V4"),
        (f"{QUICK} --bins each", "bins each leaves open which time bin chooses the layer for a benchmark; allowed: me"),
        ("--recordings my/mine --benchmark X", "there is nothing to score; give a run, or a network"),
        ("--benchmark X", "there is nothing to score; give a run, or a network"),
        (f"{QUICK} --out kept", "kept/X.csv exists already; choose another --out, or move it away"),
        (f"{QUICK} --metric plss", "unknown neural metric 'plss'"),
        (f"{QUICK} --controls pixel", "unknown control 'pixel'"),
        ("runs/one", "brain needs either --recordings DIR or --benchmark ID, or both"),
        ("runs/one --benchmark X --metric pls", "--metric has no meaning for --benchmark without --recordings"),
        ("runs/one --benchmark X --cache c", "--cache has no meaning for --benchmark without --recordings"),
        (
            "runs/one --benchmark X --controls untrained,pixels",
            "control 'pixels' has no meaning for a benchmark; allow",
        ),
        (
            "runs/one --benchmark X --controls shuffled",
            "'shuffled' has no meaning for a benchmark; allowed: untrained, ",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence_before_a_network_runs(arguments, sentence, here, stand_in, capsys, monkeypatch):
    (here / "kept").mkdir()
    (here / "kept" / "X.csv").touch()
    monkeypatch.setattr(LocalNetwork, "forward", None)
    assert command(arguments) == 2
    out, err = capsys.readouterr()
    assert sentence in err and len(err.strip().splitlines()) == 1 and not out
    assert not stand_in and {path.name for path in here.iterdir()} == {"runs", "my", "kept"}


def test_a_benchmark_of_no_region_is_told_before_recordings_are_scored(here, stand_in, capsys, monkeypatch):
    monkeypatch.setattr(Judge, "region", None)
    for arguments in (QUICK, "runs/one --benchmark X"):
        assert command(arguments) == 2
        assert "benchmark X is of no cortical region; allowed: neural benchmarks" in capsys.readouterr().err


def test_without_brain_score_recordings_are_not_scored_either(here, capsys, monkeypatch):
    for name in ("brainscore_core", "brainscore_vision"):
        monkeypatch.setitem(sys.modules, name, None)
    assert command(QUICK) == 2
    assert 'do pip install "localsim[brain]"' in capsys.readouterr().err
    assert {path.name for path in here.iterdir()} == {"runs", "my"}


@pytest.mark.parametrize(
    ("controls", "regimes"),
    [
        ("", ["untrained", "blockwise"]),
        (" --controls untrained,calibrated", ["untrained", "calibrated", "blockwise"]),
        (" --controls none", ["blockwise"]),
    ],
)
def test_networks_among_the_controls_are_scored_with_every_layer(here, stand_in, capsys, controls, regimes):
    assert command(f"runs/one --benchmark X --layers conv1,layer2 --image-size 24{controls} --out made") == 0
    written = rows(here / "made" / "X.csv")
    assert [(row["regime"], row["layer"]) for row in written] == [
        (regime, layer) for regime in regimes for layer in ("conv1", "layer2")
    ]
    assert written[0] | {"model": ""} == {
        "benchmark": "X", "regime": regimes[0], "seed": "0", "layer": "conv1", "chosen_by": "", "raw": "-0.5",
        "ceiling": "0.9", "value": "0.25", "model": "",
    }  # fmt: skip
    assert [size for _, size, *_ in stand_in] == [24] * len(regimes), "a network is asked for all layers at once"
    assert "a layer that is best here was chosen by these data" in capsys.readouterr().out


# -- with Brain-Score -------------------------------------------------------------------------------------------------

ignoring_age = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # xarray, pandas


@pytest.fixture
def judge(folder, tmp_path):
    """Return a benchmark of Brain-Score's kind, of recordings that chose no layer."""
    prepare()
    pytest.importorskip("brainscore_vision", reason="needs the extra [brain]")
    from localsim.analysis.brain.assemblies import benchmark

    other = recorded(folder / "runs" / "one", "other", 1, {"IT": 2})
    return benchmark(other, "IT", "rdm", folder=tmp_path / "stimuli")


@ignoring_age
def test_a_network_runs_once_for_all_layers(here, judge, passes, monkeypatch):
    monkeypatch.setattr(benchmarks, "open_benchmark", lambda name: judge)
    passes.clear()
    found = benchmarks.score_benchmarks(["runs/one"], "X", layers="stages", spatial="2x2", image_size=16, out="made")
    # per network one image, of which Brain-Score learns how much memory to ask for, and then every image once
    assert passes == [1, N, 1, N]
    assert [(row["regime"], row["layer"]) for row in found] == [
        (regime, f"stage{stage}") for regime in ("untrained", "blockwise") for stage in (1, 2, 3)
    ]
    for row in found[3:]:
        alone = brain_model("runs/one", {"IT": row["layer"]}, spatial="2x2")
        expected = benchmarks.score_benchmark(judge, alone)
        assert (row["raw"], row["value"], row["model"]) == (expected.raw, expected.value, expected.model)
    assert len({row["raw"] for row in found}) == len(found)


@ignoring_age
def test_recordings_and_benchmark_in_one_command(here, judge, passes, monkeypatch):
    monkeypatch.setattr(benchmarks, "open_benchmark", lambda name: judge)
    passes.clear()
    assert command(f"{QUICK} --layers stages --metric ridge --controls none --out made") == 0
    assert passes == [N, 1, N]
    (row,) = rows(here / "made" / "X.csv")
    expected = benchmarks.score_benchmark(judge, brain_model("runs/one", {"IT": "stage3"}, spatial="2x2"))
    assert row["layer"] == "stage3" and float(row["raw"]) == expected.raw > 0.1


@ignoring_age
def test_features_are_kept_by_what_files_hold(here, judge, passes, monkeypatch, tmp_path):
    from brainscore_vision.benchmark_helpers import memory

    stimuli = judge._assembly.stimulus_set
    paths = [str(stimuli.stimulus_paths[one]) for one in stimuli["stimulus_id"]]
    layers = ["stage1", "stage2", "stage3"]

    def seen(model, layer: str, files: list[str], **options) -> np.ndarray:
        with quiet():
            return model.activations_model(files, layers=[layer], **options).values

    one, other, _ = brain_models("runs/one", [{"IT": layer} for layer in layers], spatial="mean")
    single = brain_model("runs/one", {"IT": "stage1", "V4": "stage2"}, spatial="mean")
    passes.clear()
    first, second = seen(one, "stage1", paths), seen(other, "stage2", paths)
    assert passes == [N] and np.array_equal(second, seen(single, "stage2", paths))
    first[:] = 0  # a metric that works in place
    assert np.array_equal(seen(one, "stage1", paths), seen(single, "stage1", paths))
    passes.clear()
    assert np.array_equal(seen(other, "stage2", paths[::-1]), second[::-1]) and passes == [N]
    copied = [str(tmp_path / f"{place}.png") for place in range(N)]
    for path, copy in zip(paths, copied, strict=True):
        Path(copy).write_bytes(Path(path).read_bytes())
    passes.clear()
    assert np.array_equal(seen(other, "stage2", copied), second) and passes == [N]
    seen(one, "stage1", copied)
    assert passes == [N]
    passes.clear()
    Path(copied[0]).write_bytes(Path(paths[1]).read_bytes())  # of equal names, other images
    assert np.array_equal(seen(other, "stage2", copied), np.concatenate([second[1:2], second[1:]])) and passes == [N]
    Path(copied[0]).unlink()
    with pytest.raises(UserError, match=r"a stimulus cannot be read: .*0.png: No such file or directory"):
        seen(one, "stage1", copied)

    full, _ = brain_models("runs/one", [{"IT": layer} for layer in layers[:2]], spatial="mean")
    seen(full, "stage1", paths[:1])
    passes.clear()
    monkeypatch.setattr(memory, "psutil", replaced(memory.psutil, 10 * (len(first[0]) + len(second[0]))))
    assert np.array_equal(seen(full, "stage2", paths), second) and np.array_equal(seen(full, "stage2", paths), second)
    assert passes == [N] * 2, "what memory would not hold is not kept"
    passes.clear()
    for _ in range(2):
        seen(full, "stage1", paths[:4], number_of_trials=2, require_variance=True)
    assert passes == [4] * 4, "what varies from trial to trial is not kept"


def replaced(psutil, available: int):
    """Return psutil with so many bytes left."""
    from types import SimpleNamespace

    left = psutil.virtual_memory()._replace(available=available)
    return SimpleNamespace(virtual_memory=lambda: left)


@ignoring_age
def test_no_layers_or_too_many_get_a_sentence(folder):
    prepare()
    pytest.importorskip("brainscore_vision", reason="needs the extra [brain]")
    plain = Source("plain", nn.Sequential(OrderedDict(a=nn.Conv2d(3, 4, 3), b=nn.ReLU())), size=12)
    for commitments in ([], [{}], [{"IT": "a"}, {}]):
        with pytest.raises(UserError, match="no region has a layer"):
            brain_models(plain, commitments)
    with pytest.raises(UserError, match="plain has no layer 'c'"):
        brain_models(replace(plain), [{"IT": "a"}, {"IT": "c"}])
