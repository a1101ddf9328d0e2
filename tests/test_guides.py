"""The guides: what they tell a reader to type works as it stands there, on small networks in place of large ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY, train_in

import localsim
from localsim import options
from localsim.cli import main, make_parser
from localsim.presets import resolve

ROOT = Path(__file__).resolve().parents[1]
GUIDES = ("train", "add_a_rule", "add_a_backbone", "add_a_measure", "cluster", "paper", "README")
SMALL = {**TINY, "train_images": 16, "test_images": 20, "epochs": 1, "warmup_epochs": 0, "probe_protocol": "none"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Stand in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text_of(guide: str) -> str:
    return (ROOT / "docs" / f"{guide}.md").read_text(encoding="utf-8")


def blocks(guide: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(guide), flags=re.S | re.M)


def commands(guide: str) -> list[list[str]]:
    """Return the words of all commands of localsim, in blocks and within lines."""
    lines = [line for block in blocks(guide, "bash") for line in block.splitlines()]
    lines += [" ".join(line.split()) for line in re.findall(r"`(localsim [^`]+)`", text_of(guide))]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("localsim ")]


def execute(guide: str) -> dict[str, Any]:
    """Run the Python of a guide in one namespace; a block that begins with a file's name is written to that file."""
    names: dict[str, Any] = {}
    for block in blocks(guide, "python"):
        if found := re.match(r"# (\w+\.py)\n", block):
            Path(found[1]).write_text(block, encoding="utf-8")
        else:
            exec(block, names)
    return names


def train_small(words: list[str], **settings: Any) -> None:
    """Run a command of a guide in this process, on the small settings."""
    small = [word for name, value in {**SMALL, **settings}.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    assert main([*words, *small]) == 0


@pytest.mark.parametrize("guide", GUIDES)
def test_every_command_of_a_guide_parses(guide):
    for words in commands(guide):
        words = [word for word in words if word != "..."]
        if len(words) < 2 and words != ["rules"]:
            assert words[0] in make_parser().format_help()  # a command that is only named
            continue
        given = make_parser().parse_args(words)
        if words[0] == "run" and not str(given.rule).endswith(".py"):
            data = None if str(given.data).startswith("my/") else given.data
            preset = "folder" if str(given.data).startswith("my/") else given.preset
            settings = {**options.settings(given.set), "data": data or ("." if preset == "folder" else None)}
            resolve(given.rule or "blockwise", preset, settings)


@pytest.mark.parametrize("guide", GUIDES)
def test_what_a_guide_links_to_exists(guide):
    for target in re.findall(r"\]\((?!http)([^)#]+)", text_of(guide)):
        assert (ROOT / "docs" / target).exists(), target


@pytest.mark.parametrize("guide", GUIDES)
def test_every_block_of_a_guide_has_a_known_language(guide):
    """Only `sh`, `text` and `toml` are not run."""
    fences = re.findall(r"^```(\w*)$", text_of(guide), flags=re.M)
    assert set(fences[::2]) <= {"python", "bash", "sh", "text", "toml"} and set(fences[1::2]) <= {""}


def test_every_guide_is_in_the_index():
    linked = set(re.findall(r"\((\w+\.md)\)", text_of("README")))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked


def test_the_guide_to_training_runs(folder, monkeypatch, capsys):
    real = localsim.run
    monkeypatch.setattr(
        localsim, "run", lambda *args, **given: real(*args, **{**given, **SMALL, "backbone": "resnet20"})
    )
    names = execute("train")
    said = capsys.readouterr().out
    assert "longest gradient path" in said and "tap on   4   1   .   .   1" in said
    assert names["run"].config.credit == names["shortcut"].to_config() and set(names["losses"]) == {0, 1, 2, 3}
    first = localsim.load_run("runs/first")
    (row,) = [row for row in first.metrics() if row["step"] == 2]
    fields = set(re.findall(r"`(\w+)`", text_of("train").split("A line of metrics has")[1].split("They also")[0]))
    assert fields == set(row) - {"step", "epoch"}
    for name in re.findall(r"^([a-z./]+)  ", "\n".join(blocks("train", "text")), flags=re.M):
        assert (first.path / name.rstrip(",")).exists() or "probe" in name, name


def test_the_fields_that_a_resumed_run_may_change_are_named():
    from localsim.config import FREE

    sentence = text_of("train").split("can be changed on the way;")[1].split(" can.")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == set(FREE)


def test_the_guide_to_rules_runs(folder, capsys):
    execute("add_a_rule")  # its last block compares gradients with the definition
    for words in commands("add_a_rule"):
        if words[0] == "rules":
            assert main(words) == 0
        elif words[0] == "run" and "--granularity" in words:
            train_small(words)
    assert "tap on   4   1   .   .   1" in capsys.readouterr().out
    sphere = localsim.load_run("runs/sphere").config
    assert (sphere.objective, sphere.head, sphere.readout, sphere.reach) == ("sphere", "strongest", "map", 2)
    vicreg = resolve("sphere.py", "quick", {"objective": "vicreg", "head": "projector"})
    assert (vicreg.objective, vicreg.head, vicreg.readout) == ("vicreg", "projector", "global")


def test_the_guide_to_backbones_runs(folder, capsys):
    execute("add_a_backbone")
    largest = re.search(r"largest difference of a gradient: (\S+)", capsys.readouterr().out)
    assert largest and float(largest[1]) < 1e-12
    runs = [words for words in commands("add_a_backbone") if words[0] == "run" and "--out" in words]
    assert len(runs) == 2
    for words in runs:
        train_small(words, backbone="small_convnext")
    assert localsim.load_run("runs/convnext-backprop").network().units_per_stage == [4]
    train_small(["run", "--rule", "vit.py", "--out", "runs/vit"], backbone="small_vit")
    net = localsim.load_run("runs/vit").network()
    assert net.units_per_stage == [1, 1, 1, 1] and "1.tokens.linear1.weight" in net.trunk_state_dict()


def test_the_guide_to_measures_runs(folder, capsys):
    for rule in ("blockwise", "end_to_end"):
        train_in(folder / "runs" / rule, rule, epochs=1)
    names = execute("add_a_measure")
    said = capsys.readouterr().out
    assert "subspace_overlap: similarity, biased" in said and "unrelated layers: 0.0" in said
    assert {row.measure for row in names["comparison"].rows} == {"subspace_overlap"}


def test_what_the_page_of_the_paper_says_of_its_cost_is_what_the_command_says():
    from localsim.cost import cost

    predicted = cost(resolve("blockwise", "imagenet", {"granularity": 4}))
    text = text_of("paper")
    flops = sum(getattr(predicted, name) for name in ("forward_flops", "backward_flops"))
    assert (
        f"{flops / 1e12:.0f} TFLOP a step" in text and f"{predicted.held_bytes / 2**30:.0f} GiB of activations" in text
    )
    assert f"{flops * 300 * (1_281_167 // 2048):.0e}" == "4e+19" and "4 x 10^19" in text
