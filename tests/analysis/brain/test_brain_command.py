"""`localsim brain`: from run folders and recordings to tables and figures, or to one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from recording_folders import work_in
from tiny import exit_code, train_in

from localsim.analysis.brain import figures
from localsim.analysis.brain.baselines import GaborBank
from localsim.analysis.brain.folders import save_recording
from localsim.analysis.brain.recordings import Recording
from localsim.data import ImageSet
from localsim.errors import UserError
from localsim.network import LocalNetwork

SHORT = {"epochs": 1, "train_images": 16, "warmup_epochs": 0}
QUICK = "--resamples 20 --controls untrained,pixels,shuffled"
TABLES = {"scores.csv", "differences.csv", "brain.json"}


def recorded(name: str, n: int, regions: tuple[str, ...]) -> Recording:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 3, 16, 16), dtype=np.uint8)
    signal = pixels.mean((2, 3)) @ rng.normal(size=(3, len(regions)))
    trials = signal[:, :, None] + rng.normal(size=(n, len(regions), 3))
    return Recording(name, ImageSet(torch.from_numpy(pixels), None, None), trials, regions=regions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return where three runs and three folders of recordings lie."""
    folder = tmp_path_factory.mktemp("made")
    train_in(folder / "runs" / "one", "blockwise", **SHORT)
    train_in(folder / "runs" / "end", "end_to_end", snapshot_every=1, **SHORT)
    for name, n in (("v4", 40), ("few", 10)):
        save_recording(recorded(name, n, ("V4",) * 4 + ("IT",) * 3), folder / "my" / name)
    for name in ("empty", "ridgecv"):
        (folder / "my" / name).mkdir()
    (folder / "my" / "file").touch()
    return folder


@pytest.fixture
def here(folder, monkeypatch, tmp_path):
    return work_in(tmp_path, folder, monkeypatch)


@pytest.fixture
def without_figures(monkeypatch):
    """Leave out what takes longest."""
    monkeypatch.setattr(figures, "brain_figures", lambda _: {})


def command(text: str) -> int:
    return exit_code(f"brain {text}")


def test_tables_and_figures_are_made(here, capsys):
    assert command(f"runs/one runs/end --recordings my/v4 {QUICK} --out made") == 0
    out, err = capsys.readouterr()
    assert not err
    files = {file.name for file in (here / "made" / "ridgecv").iterdir()}
    assert TABLES < files and {"regimes.png", "regimes.svg", "matrix.png", "differences.svg"} < files
    assert out.startswith("ridgecv: Pearson's r of neurons") and "\nV4, v4: 40 images, 4 neurons; ceiling 0." in out
    assert "blockwise minus end_to_end, 1 pair of networks of the same seed:" in out
    assert " s; tables and figures in made/ridgecv\n" in out
    made = json.loads((here / "made" / "ridgecv" / "brain.json").read_text())
    assert {row["regime"] for row in made["rows"]} == {"untrained", "blockwise", "end_to_end", "pixels"}
    assert made["record"]["runs"] == ["runs/one", "runs/end"] and made["record"]["resamples"] == 20
    assert "cache" not in made["record"], "a folder that is gone by now"
    assert {path.name for path in here.iterdir()} == {"runs", "my", "made"}, "nothing else is left"


def test_in_a_process_of_its_own_and_by_default_named_after_the_runs(here):
    arguments = f"runs/one --recordings my/v4 {QUICK} --regions IT --metric rdm".split()
    done = subprocess.run([sys.executable, "-m", "localsim", "brain", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "no end_to_end run was given" in done.stdout and "tables and figures in brain/one/rdm" in done.stdout
    rows = json.loads((here / "brain" / "one" / "rdm" / "brain.json").read_text())["rows"]
    assert {row["region"] for row in rows} == {"IT"}


def test_networks_run_once_for_all_metrics(here, monkeypatch, without_figures):
    passes = []
    forward = LocalNetwork.forward

    def counted(self, *given, **options):
        passes.append(len(given[0]))
        return forward(self, *given, **options)

    monkeypatch.setattr(LocalNetwork, "forward", counted)
    quick = "runs/one --recordings my/v4 --resamples 0 --controls untrained,shuffled"
    assert command(f"{quick} --metric ridge,rdm,ridge,cka --cache kept --choose-stage --out first") == 0
    assert passes == [40] * 2, "the run and the untrained network"
    assert {path.name for path in (here / "first").iterdir()} == {"ridge", "rdm", "cka"}
    assert (here / "first" / "cka" / "best_stages.csv").exists()
    assert command(f"{quick} --cache kept --out second") == 0
    assert passes == [40] * 2, "features that were kept are not taken again"


def test_over_training_and_chosen_layers(here, without_figures):
    assert command(
        "runs/end --recordings my/v4 --resamples 0 --controls none --over-training --layers conv1,layer2 "
        "--image-size 8 --spatial mean --bins each --seed 3 --out made"
    ) == 0  # fmt: skip
    made = json.loads((here / "made" / "ridgecv" / "brain.json").read_text())
    assert {row["step"] for row in made["rows"]} == {None, 0, 2}
    assert {row["layer"] for row in made["rows"]} == {"conv1", "layer2"}
    record = made["record"]
    assert [record[name] for name in ("image_size", "spatial", "bins", "seed", "controls")] == [
        8, "mean", "each", 3, [],
    ]  # fmt: skip


def test_without_a_run_the_controls_are_scored(here, capsys, without_figures):
    assert command("--recordings my/v4 --resamples 0 --controls pixels,shuffled") == 0
    assert "tables and figures in brain/controls/ridgecv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("runs/one", "brain needs either --recordings DIR or --benchmark ID"),
        ("runs/one --recordings nowhere", "nowhere does not exist; allowed: a folder with a recording"),
        ("runs/one --recordings my/file", "my/file is a file; allowed: a folder with a recording"),
        ("runs/one --recordings my/empty", "it has no images/ and no responses.npz and no recording.json; a recording"),
        ("runs/one --recordings my/v4 --recordings my/v4", "two recordings are called 'v4'; give them different names"),
        ("runs/one --recordings my/few", "recording few: 10 images are too few for a regression"),
        ("runs/one --recordings my/v4 --regions V4,TI", "unknown region 'TI'; allowed: V4, IT"),
        ("runs/one --recordings my/v4 --bins two", "unknown handling of time bins 'two'; allowed: mean, each"),
        ("runs/one --recordings my/v4 --metric plss", "unknown neural metric 'plss'; allowed: pls, ridge"),
        ("runs/one --recordings my/v4 --metric pls,rsa", "v4 V4 has 1 subject, unknown; rsa needs 2 or more"),
        ("runs/one --recordings my/v4 --metric pls,", "unknown neural metric ''; allowed: "),
        (
            "runs/one --recordings my/v4 --controls=",
            "unknown control ''; allowed: untrained, calibrated, pixels",
        ),
        ("runs/one --recordings my/v4 --controls pixel", "unknown control 'pixel'"),
        ("--recordings my/v4 --controls none", "there is nothing to score; give a run, a network, or one of the"),
        ("runs/one --recordings my/v4 --layers nonsense", "the network has no module 'nonsense'; close: "),
        ("runs/one --recordings my/v4 --image-size 0", "image_size is 0; allowed: pixels, from 1"),
        ("runs/one --recordings my/v4 --resamples 5", "5 resamples are too few for an interval; allowed: 0 (none), or"),
        ("runs/one --recordings my/v4 --spatial 0x0", "unknown spatial handling '0x0'"),
        ("runs/one --recordings my/v4 --over-training", "has no snapshots to compare over training; train with --set"),
        ("runs/one runs/one --recordings my/v4", "are both blockwise with seed 0; give one run of each seed"),
        ("runs --recordings my/v4", "runs is not a run folder: it has no config.json"),
        ("moved --recordings my/v4", "moved is not a run folder"),
        ("torchvision:resnet9000 --recordings my/v4", "torchvision has no model 'resnet9000'"),
        ("runs/one --recordings my/v4 --device abacus", "device 'abacus' is not available"),
        ("runs/one --recordings my/v4 --data nowhere", "unknown data set 'nowhere'"),
        ("runs/one --recordings my/v4 --rule nowhere.py", "there is no rule file nowhere.py"),
        ("runs/one --recordings my/v4 --out my/file", "no folder can be made in my/file; choose another --out"),
        ("runs/one --recordings my/v4 --out my/file/x", "my/file; choose another --out"),
        ("runs/one --recordings my/v4 --out my", "my/ridgecv exists already; choose another --out, or move it away"),
        ("runs/one --benchmark X --metric pls", "--metric has no meaning for --benchmark"),
        ("runs/one --benchmark X --seed 1", "--seed has no meaning for --benchmark"),
        ("runs/one --benchmark X --over-training", "--over-training has no meaning for --benchmark"),
        ("--benchmark X", "there is nothing to score; give a run, or a network such as torchvision:resnet50"),
        ("runs/one --recordings my/v4 --image-size large", "argument --image-size: invalid int value: 'large'"),
    ],
)
def test_what_the_user_got_wrong_is_one_sentence_and_no_network_runs(arguments, sentence, here, capsys, monkeypatch):
    monkeypatch.setattr(LocalNetwork, "forward", None)
    monkeypatch.setattr(GaborBank, "forward", None)
    assert command(arguments) == 2
    out, err = capsys.readouterr()
    assert sentence in err and len(err.strip().splitlines()) == 1
    assert not out and {path.name for path in here.iterdir()} == {"runs", "my"}, "nothing is left behind"


@pytest.mark.parametrize("runs", ["runs/one", "runs/one runs/end"])
def test_a_benchmark_without_brain_score_says_what_to_install(runs, here, capsys, monkeypatch):
    for name in ("brainscore_core", "brainscore_vision"):
        monkeypatch.setitem(sys.modules, name, None)
    assert command(f"{runs} --benchmark MajajHong2015public.IT-pls") == 2
    out, err = capsys.readouterr()
    assert 'do pip install "localsim[brain]"' in err and len(err.strip().splitlines()) == 1
    assert not out and {path.name for path in here.iterdir()} == {"runs", "my"}


def test_a_folder_is_named_after_the_runs(monkeypatch, tmp_path):
    from localsim.analysis.on_runs import folder_for

    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert folder_for("brain", ["a/one", "b/two/"], None) == Path("brain/one+two")
    assert folder_for("brain", ["."], None) == Path("brain/mine") and folder_for("brain", [], None) == Path(
        "brain/controls"
    )
    assert folder_for("brain", ["torchvision:resnet18:DEFAULT"], None) == Path("brain/torchvision-resnet18-DEFAULT")
    many = [folder_for("brain", [f"seed{number}{last}" for number in range(50)], None).name for last in "ab"]
    assert many[0] != many[1] and max(map(len, many)) <= 100
    assert folder_for("brain", ["one"], "elsewhere") == Path("elsewhere")
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("localsim.analysis.on_runs.os.access", lambda *_: False)
    with pytest.raises(UserError, match="no folder can be made in"):
        folder_for("brain", ["one"], "../locked/x")
