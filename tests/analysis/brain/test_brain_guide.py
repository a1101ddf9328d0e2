"""The guide to recordings: what it tells a reader to type must work as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tiny import train_in

from localsim.analysis import brain
from localsim.cli import make_parser

ROOT = Path(__file__).resolve().parents[3]
GUIDE = (ROOT / "docs" / "brain.md").read_text()


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Stand in a folder with two small runs."""
    for rule in ("blockwise", "end_to_end"):
        train_in(tmp_path / "runs" / rule, rule, backbone="resnet18", epochs=1, test_images=150)
    monkeypatch.chdir(tmp_path)


def test_the_python_of_the_guide_runs(reader, capsys):
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S)
    assert len(blocks) >= 5
    for block in blocks:
        exec(block, names)
    scores = names["scores"]
    own = scores.matrix("untrained")
    assert max(own, key=own.get) == ("stage2", "stage 2"), "the stage that the recording was made from"
    said = capsys.readouterr().out
    assert "blockwise minus end_to_end" in said and "chosen by other images" in said


def test_every_command_of_the_guide_parses():
    lines = [line for block in re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.S) for line in block.splitlines()]
    assert len(lines) >= 5
    for program, *words in map(shlex.split, lines):
        if program == "localsim":
            make_parser().parse_args(words)
        else:
            module = words[1].removeprefix("localsim.").replace(".", "/")
            assert (program, words[0]) == ("python", "-m") and (ROOT / f"{module}.py").exists()


def test_the_guide_names_only_what_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", GUIDE):
        assert (ROOT / "docs" / target).exists(), target
    assert set(re.findall(r"^\| `(\w+)`.*\| (?:responses|several)", GUIDE, flags=re.M)) == set(brain.METRICS)
    for name in re.findall(r"brain\.(\w+)\(", GUIDE):
        assert hasattr(brain, name), name
