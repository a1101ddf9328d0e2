"""The options of `localsim sweep` mean what its help and its guide say."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
from tiny import TINY

import localsim
from localsim import sweep_work
from localsim.errors import UserError
from localsim.experiment import run
from localsim.sweep_cells import as_values
from localsim.sweep_command import SWEEP_EXAMPLES, add_sweep_options, sweep_arguments, sweep_command
from localsim.sweeping import Sweep, sweep


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_sweep_options(parser)
    return parser


def meant(text: str) -> dict:
    """Return the arguments of `localsim.sweep` that a command line means, without those that are not given."""
    arguments = sweep_arguments(options().parse_args(shlex.split(text, comments=True)))
    return {name: value for name, value in arguments.items() if value not in (None, False, {})}


def test_lists():
    assert meant("--rule blockwise,my.py --granularity 1,block --granularity 4 --reach 1,2 --epochs 3 --out o") == {
        "rule": ["blockwise", "my.py"], "granularity": [1, "block", 4], "reach": [1, 2], "epochs": [3], "out": "o",
    }  # fmt: skip
    assert meant("--objective vicreg --objective simclr,vicreg --data cifar10 --data my,images --seed 0,5 --out o") == {
        "objective": ["vicreg", "simclr,vicreg"], "data": ["cifar10", "my,images"], "seed": [0, 5], "out": "o",
    }  # fmt: skip
    assert meant("--set lr=1e-3 --set projector=[8,8] --set lr=0.1 --set cuts=layer2.0,layer3.0 --seeds 3 --out o") == {
        "lr": [0.001, 0.1], "projector": [[8, 8]], "cuts": ["layer2.0,layer3.0"], "seeds": 3, "out": "o",
    }  # fmt: skip


def test_how_it_is_run():
    assert meant("--out o --plan --jobs 2 --data-root /d") == {"out": "o", "plan": True, "jobs": 2, "data_root": "/d"}
    assert meant("--out o --devices cuda:0,cuda:1") == {"out": "o", "devices": ["cuda:0", "cuda:1"]}
    assert meant("--out o --slurm --slurm-set timeout_min=9 --slurm-set partition=gpu") == {
        "out": "o", "slurm": True, "slurm_set": {"timeout_min": 9, "partition": "gpu"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("--reach two --out o", "invalid int value: 'two'"),
        ("--reach 1,,2 --out o", "invalid int value: '1,,2'"),
        ("--set lr --out o", "--set 'lr' is not of the form NAME=VALUE"),
        ("--set jobs=2 --out o", "unknown setting 'jobs'; allowed: rule, preset, "),
        ("--set quiet=true --out o", "unknown setting 'quiet'"),
        ("--set reach=1 --reach 2 --out o", "reach is given twice: by --reach and by --set"),
    ],
)
def test_what_is_wrong_is_a_sentence(text, sentence):
    with pytest.raises((UserError, argparse.ArgumentError), match=re.escape(sentence)):
        meant(text)


def test_there_are_no_more_than_twenty_flags():
    flags = {flag for action in options()._actions for flag in action.option_strings} - {"-h", "--help"}
    assert len(flags) <= 20


def test_the_exit_code_says_whether_a_cell_failed(monkeypatch, tmp_path):
    for failed, code in (({}, 0), ({"seed0": "out of memory"}, 1)):
        monkeypatch.setattr(
            "localsim.sweeping.sweep", lambda failed=failed, **given: Sweep(given["out"], (), failed, None)
        )
        assert sweep_command(options().parse_args(["--out", str(tmp_path)])) == code


# -- help and guide ---------------------------------------------------------------------------------------------------

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "sweep.md"
BLOCKS = {language: re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), flags=re.S) for language in
          ("bash", "python")}  # fmt: skip
COMMANDS = [
    line.strip().removeprefix("localsim sweep ").partition("    ")[0]
    for line in "\n".join([*BLOCKS["bash"], SWEEP_EXAMPLES]).splitlines()
    if line.strip().startswith("localsim sweep ")
]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_of_help_and_guide_can_be_typed(command):
    given = meant(command.replace(",my_rule.py", ""))
    how = ("out", "plan", "jobs", "devices", "slurm", "slurm_set", "seeds")
    as_values({name: value for name, value in given.items() if name not in how})


def test_the_python_of_the_guide_runs(capsys, tmp_path, monkeypatch):
    """With two tiny cells in the place of nine, in this process and without figures."""

    def run_all(commands, _devices, *, began, ended):
        for path, make in commands.items():
            make(None)
            began(path)
            run(out=path, resume=True, quiet=True)
            ended(path, 0, 1.0)

    def tiny_sweep(**given):
        assert given == {"granularity": [1, 2, 4], "reach": 1, "seeds": 3, "out": "sweeps/first"}
        return sweep(granularity=[2, 3], reach=1, out="sweeps/first", **TINY)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_work, "run_all", run_all)
    monkeypatch.setattr(localsim, "sweep", tiny_sweep, raising=False)
    monkeypatch.setattr("localsim.analysis.plots.save", lambda *_: None)
    monkeypatch.setattr("localsim.analysis.sweep_plots.sweep_figures", lambda _table: {})
    reads, makes = BLOCKS["python"]
    exec(makes, {})
    said = capsys.readouterr().out
    assert "granularity2-seed0 2 10\ngranularity3-seed0 3 10\nfailed: {}" in said
    exec(reads, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" accuracy")[0] for line in lines] == [
        "granularity2-seed0 path 5",
        "granularity3-seed0 path 4",
    ]
