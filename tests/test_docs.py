"""What the documents tell a reader to type must work as it stands there."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from localsim import options
from localsim.cli import make_parser
from localsim.credit import Credit
from localsim.presets import resolve
from localsim.sweep_command import sweep_arguments

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    'backbone="resnet20", image_size=16, projector=[8, 8], expand_width=8, train_images=32, test_images=20, '
    'batch_size=8, epochs=1, warmup_epochs=0, precision="full", quiet=True'
)


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), flags=re.S)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """With a tiny network in place of the five-minute run: everything else is executed as printed."""
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("README.md", "python")
    said = 'localsim.run("blockwise", granularity=4, preset="quick", out="runs/first")'
    assert said in code
    names: dict = {}
    exec(
        code.replace(said, f'localsim.run("blockwise", granularity=3, preset="quick", out="runs/first", {TINY})'), names
    )
    assert "linear probe, raw features" in capsys.readouterr().out
    net = names["net"]
    assert set(names["losses"]) == {0, 1, 2}
    assert net.credit == Credit.overlapping(4)
    assert all(p.grad is not None for p in net.parameters())


def test_the_readme_names_only_what_exists():
    text = (ROOT / "README.md").read_text()
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert len(linked) >= 9
    for target in linked:
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("file", ["README.md", "docs/paper.md", "docs/report.md", "docs/results.md", "docs/rules.md"])
def test_every_localsim_command_in_the_documents_parses(file):
    text = (ROOT / file).read_text()
    lines = [line for block in blocks(file, "bash") for line in block.splitlines()]
    lines += re.findall(r"`(localsim [^`\n]+)`", text)
    commands = [part.strip() for line in lines for part in line.split("&&") if part.strip().startswith("localsim ")]
    for command in commands:
        words = [word for word in shlex.split(command, comments=True)[1:] if word != "..."]
        if "--help" in words or len(words) == 1:  # or named only
            continue
        arguments = make_parser().parse_args(words)
        if words[0] == "sweep":
            sweep_arguments(arguments)
        elif getattr(arguments, "set", []):
            resolve(arguments.rule or "blockwise", arguments.preset, options.settings(arguments.set))


SNIPPETS = {
    (file, snippet)
    for file in ["README.md", "docs/paper.md", "docs/results.md", "docs/rules.md", "CONTRIBUTING.md"]
    for snippet in re.findall(r"`(--set [^`\n]+)`", (ROOT / file).read_text())
    if "NAME=VALUE" not in snippet
}


@pytest.mark.parametrize(("file", "snippet"), sorted(SNIPPETS))
def test_every_set_snippet_of_the_documents_is_a_setting(file, snippet):
    """As a shell would split it: a value with braces and quotes needs quotes around it."""
    arguments = make_parser().parse_args(["run", *shlex.split(snippet)])
    settings = options.settings(arguments.set)
    config = resolve("blockwise", None, settings)
    assert settings and all(getattr(config, name) == value for name, value in settings.items())


def test_there_are_set_snippets_to_check():
    assert len(SNIPPETS) >= 2


def test_the_results_hold_a_table():
    text = (ROOT / "docs/results.md").read_text()
    assert re.search(r"^\|.*\|\n\|[ :|-]+\|\n\|.*\d.*\|$", text, flags=re.M), "docs/results.md has no table yet"


def test_the_table_of_rules_is_what_the_code_says():
    """Else: `python docs/rules_table.py > docs/rules.md`."""
    made = runpy.run_path(str(ROOT / "docs" / "rules_table.py"))["document"]()
    assert (ROOT / "docs" / "rules.md").read_text() == made


def test_the_table_of_rules_in_the_readme_is_what_the_code_says():
    """Else: `python docs/rules_table.py --short`."""
    made = runpy.run_path(str(ROOT / "docs" / "rules_table.py"))["short_table"]()
    assert made in (ROOT / "README.md").read_text()
