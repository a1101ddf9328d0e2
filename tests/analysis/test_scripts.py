"""The scripts to copy and change, and the guide: what they tell a reader to type must work as it stands there."""

from __future__ import annotations

import csv
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import train_in

from localsim.analysis.scripts import as_csv, as_text
from localsim.analysis.similarity import MEASURES
from localsim.analysis.stage_probe import ProbeRow, ProbeTable
from localsim.cli import make_parser
from localsim.files import write_json

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("similarity_between_regimes", "accuracy_against_locality", "dimensionality_by_depth")
RUNS = ("runs/blockwise", "runs/end_to_end")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with two small runs in `runs/`, and what their probes found."""
    path = tmp_path_factory.mktemp("reader")
    for rule, accuracy in {"blockwise": 0.5, "end_to_end": 0.6}.items():
        train_in(path / "runs" / rule, rule, backbone="resnet18", epochs=1)
        found = {"untrained": 0.25, "calibrated": 0.3, rule: accuracy}
        rows = [probed(network, stage, at + stage / 100) for network, at in found.items() for stage in (1, 2, 3, 4)]
        write_json(path / "runs" / rule / "probe.json", ProbeTable(tuple(rows)).to_json())
    return path


def probed(network: str, stage: int, accuracy: float) -> ProbeRow:
    """Return a row of a probe's table."""
    low, high = accuracy - 0.05, accuracy + 0.04
    return ProbeRow(
        network, stage, "raw", "linear", accuracy, low, high, None, None, None, None, None, None, 40, 0.1, {}
    )  # fmt: skip


@pytest.fixture
def empty(folder, tmp_path, monkeypatch):
    """Stand in a folder that holds nothing but the runs."""
    (tmp_path / "runs").symlink_to(folder / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def here(script: str, *arguments: str) -> None:
    """Run a file in this process, as a program."""
    before, sys.argv = sys.argv, [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv = before


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_from_an_empty_folder_and_leaves_table_and_figures(name, empty):
    command = [sys.executable, "-m", f"localsim.analysis.scripts.{name}", *RUNS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    left = {path.name for path in (empty / "figures").iterdir()}
    assert left == {f"{name}.csv", f"{name}.png", f"{name}.svg"}
    rows = list(csv.DictReader((empty / "figures" / f"{name}.csv").read_text().splitlines()))
    assert len(rows) >= 8 and {row["n"] for row in rows} == {"40"}  # four depths of two runs at least
    assert re.search(r"n = 40|  40\b", done.stdout) and re.search(r"\[\S+, \S+\]", done.stdout)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_copied_script_says_what_is_missing_in_one_sentence(name, empty, capsys):
    copy = shutil.copy(ROOT / "analysis" / "scripts" / f"{name}.py", empty / "mine.py")
    for given in (["runs/blockwise", "runs/nowhere"], []):
        with pytest.raises(SystemExit) as ended:
            here(str(copy), *given)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.count("\n") == 1 and said.startswith("mine: ")
        assert "localsim run --rule blockwise" in said and ("runs/nowhere" in said) == bool(given)
    assert not (empty / "figures").exists()


def test_a_copied_script_runs_and_never_overwrites(empty, capsys):
    copy = shutil.copy(ROOT / "analysis" / "scripts" / "accuracy_against_locality.py", empty / "mine.py")
    here(str(copy), *RUNS, "--out", "kept")
    said = capsys.readouterr().out
    rows = list(csv.DictReader((empty / "kept" / "mine.csv").read_text().splitlines()))
    # stem + layer1 to layer4 of ResNet-18, blockwise: a path never crosses more than stem and layer1
    assert {(row["regime"], row["path"]) for row in rows} == {("blockwise", "3"), ("end_to_end", "9")}
    assert [row["unit"] for row in rows] == ["3", "5", "7", "9"] * 2
    assert [float(row["accuracy"]) for row in rows[:4]] == [0.51, 0.52, 0.53, 0.54]
    assert {row["untrained"] for row in rows[3::4]} == {"0.29"} and "0.540 [0.490, 0.580]  0.290 [0.240, 0.330]" in said
    with pytest.raises(SystemExit) as ended:
        here(str(copy), *RUNS, "--out", "kept")
    assert ended.value.code == 2 and "exists already" in capsys.readouterr().err


def test_accuracies_that_do_not_compare_are_refused(empty, capsys):
    train_in(empty / "other", epochs=1)
    shutil.copytree(RUNS[0], "alike", ignore=shutil.ignore_patterns("probe.json"))
    script = str(ROOT / "analysis" / "scripts" / "accuracy_against_locality.py")
    for run, why in (
        ("other", "resnet18 on embedded, 16 px; resnet20 on embedded, 16 px"),
        ("alike", "not been probed"),
    ):
        with pytest.raises(SystemExit) as ended:
            here(script, RUNS[0], run)
        assert ended.value.code == 2 and why in capsys.readouterr().err


def test_tables_join_a_value_and_its_interval():
    rows = [{"name": "a", "x": 0.5, "x_low": 0.25, "x_high": 1.0, "n": 9, "y": None}]
    assert as_text(rows).splitlines() == ["name  x                     n  y", "a     0.500 [0.250, 1.000]  9  -"]
    assert as_csv(rows) == "name,x,x_low,x_high,n,y\na,0.5,0.25,1.0,9,\n"


# -- the guide --------------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "analysis.md").read_text(), flags=re.S)


def test_the_python_of_the_guide_runs(empty, capsys):
    names: dict = {}
    code = blocks("python")
    assert len(code) >= 8
    for block in code:
        exec(block, names)
    said = capsys.readouterr().out
    assert "cka_debiased: similarity, debiased" in said and "distance_correlation: similarity, biased" in said


def test_every_command_of_the_guide_parses():
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += re.findall(r"`(localsim [^`]+)`", (ROOT / "docs" / "analysis.md").read_text())
    commands = [shlex.split(line) for line in lines]
    assert len(commands) >= 9
    for program, *words in commands:
        if program == "localsim":
            given = make_parser().parse_args(words)
            assert all(name in MEASURES for name in getattr(given, "measure", "cka").split(","))
        else:
            module = words[1].removeprefix("localsim.").replace(".", "/")
            assert (program, words[0]) == ("python", "-m") and (ROOT / f"{module}.py").exists()


def test_the_guide_names_only_what_exists():
    text = (ROOT / "docs" / "analysis.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / "docs" / target).exists(), target
    for row in re.findall(r"^\|.*\?.*\| (.+) \|$", text, flags=re.M):  # which measure answers which question
        assert set(re.findall(r"`(\w+)`", row)) <= set(MEASURES), row


def test_the_table_of_measures_is_what_the_code_says():
    """Else: `python docs/measures_table.py > docs/measures.md`."""
    made = runpy.run_path(str(ROOT / "docs" / "measures_table.py"))["document"]()
    assert (ROOT / "docs" / "measures.md").read_text() == made


def test_the_table_of_measures_has_them_all():
    text = (ROOT / "docs" / "measures.md").read_text()
    named = set(re.findall(r"^\| `(\w+)` \|", text, flags=re.M))
    missing = [name for name in MEASURES if name not in named]
    assert missing and all(re.fullmatch(r"rsa_[a-z]+_[a-z_]+", name) for name in missing)
    for name in missing:
        _, distance, comparator = name.split("_", 2)
        assert {distance, comparator} <= named, name
