"""`localsim compare`: from run folders to tables and figures, or to one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import exit_code, train_in

from localsim.analysis import plots
from localsim.cli import main
from localsim.network import LocalNetwork

SHORT = {"epochs": 1, "train_images": 16, "warmup_epochs": 0}
FIGURES = {f"{name}{suffix}" for name in ("matrix", "map", "profiles") for suffix in (".png", ".svg")}
TABLES = {"comparison.csv", "comparison.json"}
QUICK = "--images 40 --resamples 20 --permutations 5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return where three runs lie: `one`, `two` (of another seed) and `end`, the last with snapshots."""
    folder = tmp_path_factory.mktemp("runs")
    train_in(folder / "one", "blockwise", **SHORT)
    train_in(folder / "two", "blockwise", seed=1, **SHORT)
    train_in(folder / "end", "end_to_end", snapshot_every=1, **SHORT)
    return folder


@pytest.fixture
def here(folder, monkeypatch, tmp_path):
    """Return an empty folder to work in; the runs are in `runs/`."""
    (tmp_path / "runs").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(text: str) -> int:
    return exit_code(f"compare {text}")


def test_tables_and_figures_are_made_in_a_folder_per_measure(here, capsys):
    assert command(f"runs/one runs/end {QUICK} --measure cka_debiased,procrustes --out made") == 0
    out, err = capsys.readouterr()
    assert not err
    for name in ("cka_debiased", "procrustes"):
        learned = {"map_of_learned.png", "map_of_learned.svg"}
        assert {file.name for file in (here / "made" / name).iterdir()} == FIGURES | TABLES | learned
        assert f"{name}: " in out and f"s; table and figures in made/{name}\n" in out
        made = json.loads((here / "made" / name / "comparison.json").read_text())
        assert made["record"]["n"] == 40 and made["record"]["runs"] == ["runs/one", "runs/end"]
        assert {row["regime_a"] for row in made["rows"]} == {"untrained", "blockwise", "end_to_end"}
        assert "cache" not in made["record"], "a folder that is gone by now"
    assert "blockwise against end_to_end, 1 pair of runs of the same seed" in out
    assert {path.name for path in here.iterdir()} == {"runs", "made"}, "nothing else is left"


def test_by_default_the_folder_is_named_after_the_runs(here, capsys):
    assert command(f"runs/one runs/two {QUICK} --permutations 0 --controls none --layers conv1,layer2") == 0
    folder = here / "comparisons" / "one+two" / "cka_debiased"
    assert f"table and figures in {folder.relative_to(here)}" in capsys.readouterr().out
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    assert {row["layer_a"] for row in rows} == {"conv1", "layer2"}
    assert {row["regime_a"] for row in rows} == {"blockwise"} and {row["chance"] for row in rows} == {None}
    assert command("runs/one runs/two") == 2, "nothing is overwritten"


def test_networks_run_once_for_all_measures(here, monkeypatch):
    passes = []
    forward = LocalNetwork.forward

    def counted(self, *given, **options):
        passes.append(len(given[0]))
        return forward(self, *given, **options)

    monkeypatch.setattr(LocalNetwork, "forward", counted)
    monkeypatch.setattr(plots, "comparison_figures", lambda comparison: {})  # to be quick
    assert command("runs/one runs/end --images 40 --resamples 0 --permutations 0 --measure cka --out first") == 0
    once = list(passes)
    assert once == [40] * 3, "two runs and the untrained network"
    passes.clear()
    many = "--measure cka,rsa,cka,mutual_knn --cache kept"
    assert command(f"runs/one runs/end --images 40 --resamples 0 --permutations 0 {many} --out second") == 0
    assert passes == once
    assert {path.name for path in (here / "second").iterdir()} == {"cka", "rsa", "mutual_knn"}
    assert command("runs/one runs/end --images 40 --resamples 0 --permutations 0 --cache kept --out third") == 0
    assert passes == once, "features that were kept are not taken again"


def test_of_fewer_images_than_asked_for_all_are_taken(here, capsys):
    assert command("runs/one --images 41 --resamples 0 --permutations 0 --controls none --out made") == 0
    assert "; n = 40 images\n" in capsys.readouterr().out


def test_over_training(here, capsys):
    assert command(f"runs/end {QUICK} --over-training --out made") == 0
    names = {file.name for file in (here / "made" / "cka_debiased").iterdir()}
    assert names == FIGURES | TABLES | {"over_training.png", "over_training.svg"}
    rows = json.loads((here / "made" / "cka_debiased" / "comparison.json").read_text())["rows"]
    assert {row["step_a"] for row in rows} == {None, 0, 2}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("runs/one --measure ckaa", "unknown measure 'ckaa'; allowed: cka, cka_debiased"),
        ("runs/one --measure cka,", "unknown measure ''; allowed: "),
        ("runs", "runs is not a run folder: it has no config.json"),
        ("nowhere", "nowhere is not a run folder"),
        ("runs/one runs/one", "are both blockwise with seed 0; give one run of each seed"),
        ("runs/one --over-training", "has no snapshots to compare over training; train with --set snapshot_every=1"),
        ("runs/one --layers layer1,layer9", "the network has no module 'layer9'; close: "),
        ("runs/one --images 3", "3 images"),
        ("runs/one --images 7", "an interval over 7 images is not possible; allowed: 8 images or more"),
        ("runs/one --images 0", "0"),
        ("runs/one --resamples 5", "5 resamples are too few for an interval; allowed: 0 (none), or 20 or more"),
        ("runs/one --resamples -1", "-1 resamples are too few"),
        ("runs/one --permutations -1", "-1 permutations"),
        ("runs/one --controls frozen", "unknown control 'frozen'; allowed: untrained, calibrated"),
        ("runs/one --spatial 0x0", "0x0"),
        ("runs/one --device abacus", "device 'abacus' is not available"),
        ("runs/one --data no/such/folder", "no/such/folder"),
        ("runs/one --rule no_such_file.py", "no_such_file.py"),
        ("runs/one --measure rsa_crossnobis_cosine", "takes repeated measurements (repeats, n, p)"),
        ("torchvision:resnet18", "networks without a run have no images of their own; give images"),
        ("torchvision:resnet9000", "resnet9000"),
        ("runs/one --images many", "argument --images: invalid int value: 'many'"),
        ("", "the following arguments are required: RUN"),
    ],
)
def test_what_the_user_got_wrong_is_one_sentence(arguments, sentence, here, capsys):
    assert command(f"{arguments} --resamples 20" if "--resamples" not in arguments and arguments else arguments) == 2
    out, err = capsys.readouterr()
    assert sentence in err and len(err.strip().splitlines()) == 1
    assert not out and {path.name for path in here.iterdir()} == {"runs"}, "nothing is left behind"


def test_what_is_there_is_not_overwritten_and_no_network_is_run_for_it(here, capsys, monkeypatch):
    (here / "made" / "rsa").mkdir(parents=True)
    monkeypatch.setattr(LocalNetwork, "forward", None)
    assert command("runs/one --measure cka,rsa --out made") == 2
    assert "made/rsa exists already; choose another --out, or move it away" in capsys.readouterr().err
    assert {path.name for path in (here / "made").iterdir()} == {"rsa"}


def test_in_a_process_of_its_own(here):
    arguments = f"runs/one runs/two {QUICK} --measure rsa --out made".split()
    done = subprocess.run([sys.executable, "-m", "localsim", "compare", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("rsa: similarity, debiased; 1 is alike; n = 40 images; 95 % intervals from half-")
    assert {file.name for file in (here / "made" / "rsa").iterdir()} == FIGURES | TABLES


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--help"])
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    from localsim.analysis.similarity import MEASURES

    words = printed.partition("--measure NAME ")[2].partition(" or several:")[0].replace("(default)", "").split(", ")
    named = [word.strip(" .;") for word in words]
    assert [name for name in named if name and name not in MEASURES] == [], "help names measures that exist"
