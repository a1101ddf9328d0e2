"""A rule from outside: a file, or an installed package; what it takes to train, probe and reload it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import localsim
from localsim import rules as registry
from localsim.assembly import build, build_network
from localsim.cli import main
from localsim.config import Config
from localsim.errors import UserError
from localsim.presets import resolve
from localsim.rules import get_rule, load_rule, rules
from localsim.rules.objectives import OBJECTIVES
from localsim.runs import load_run

# the third tap changes stages 1 and 3, but not stage 2
SKIP = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from localsim.credit import Credit
from localsim.network import Embedding
from localsim.rules.objectives import OBJECTIVES
from localsim.rules.rule import Rule
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Apart:
    """Images of a batch are to lie apart by a margin, whatever they show."""

    reads: ClassVar[str] = "vector"
    head: ClassVar[str] = "projector"
    num_views: ClassVar[int] = 2
    needs_labels: ClassVar[bool] = False

    margin: float = 1.0

    def __call__(self, embeddings: tuple[Embedding, ...], labels: Tensor | None) -> Tensor:
        one, other = embeddings
        return (one - other).square().mean() + (self.margin - one.std(0)).relu().mean()

    def chance_level(self, num_dimensions: int, batch_size: int) -> float | None:
        return None


OBJECTIVES["apart"] = Apart


def credit(num_stages: int) -> Credit:
    return Credit([[1, 0, 0], [1, 0, 1]], (0, 2))


RULE = Rule(
    name="NAME",
    summary="The highest loss changes the lowest and the highest stage.",
    paper="ours",
    credit=credit,
    objective="apart",
    settings={"objective_options": {"margin": 0.5}},
    meaningless={"reach": "its matrix is fixed"},
)
'''
# a matrix for any number of stages, and what localsim has
PLAIN = """
from localsim.credit import Credit
from localsim.rules import Rule

RULE = Rule(name="NAME", summary="Of a package.", paper="ours", credit=Credit.banded, objective="vicreg")
"""
TINY = {
    "backbone": "resnet20", "image_size": 16, "projector": [8, 8], "expand_width": 8, "train_images": 32,
    "test_images": 20, "batch_size": 8, "epochs": 1, "warmup_epochs": 0, "precision": "full",
}  # fmt: skip
FLAGS = [
    word for name, value in TINY.items() for word in ("--set", f"{name}={str(value).replace(' ', '')}")
]  # fmt: skip


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """Leave the process as it was: rules and objectives of a file stay loaded."""
    kept = [(table, dict(table)) for table in (rules, registry._sources, OBJECTIVES)]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


def write(path: Path, text: str, name: str) -> Path:
    path.write_text(text.replace("NAME", name))
    return path


def commands(*lines: list[str], path: Path | None = None) -> list[tuple[int, list[str], list[str]]]:
    """Run localsim on several command lines in one process of its own, with `path` on sys.path.

    Returns:
        For every line the exit code, and the lines of standard output and of standard error.
    """
    code = (
        "import json, sys, torch; torch.set_num_threads(1); from localsim.cli import main\n"
        "for line in json.loads(sys.argv.pop()):\n"
        "    code = main(line)\n"
        "    for out in sys.stdout, sys.stderr: print('END', code, file=out, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([[str(word) for word in line] for line in lines])],
        env={**os.environ, "OMP_NUM_THREADS": "1", **({"PYTHONPATH": str(path)} if path else {})},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = [re.split(r"END (\d+)\n", text) for text in (done.stdout, done.stderr)]
    return [
        (int(told[0][2 * i + 1]), told[0][2 * i].splitlines(), told[1][2 * i].splitlines()) for i in range(len(lines))
    ]


# -- a file -----------------------------------------------------------------------------------------------------------


def test_a_rule_of_ones_own_from_a_file_to_a_probe(tmp_path):
    file = write(tmp_path / "skip.py", SKIP, "skip")
    run = localsim.run(rule=str(file), out=tmp_path / "run", quiet=True, device="cpu", **TINY)
    assert (run.config.rule, run.config.objective, run.config.head) == ("skip", "apart", "projector")
    net = load_run(tmp_path / "run").network()
    np.testing.assert_array_equal(net.credit.matrix, [[1, 0, 0], [1, 0, 1]])
    assert [type(tap.objective).__name__ for tap in net.taps] == ["Apart", "Apart"]
    assert [tap.objective.margin for tap in net.taps] == [0.5, 0.5]

    untrained = load_run(tmp_path / "run").network("untrained")
    changed = [
        any(not torch.equal(p, q) for p, q in zip(here.parameters(), there.parameters(), strict=True))
        for here, there in zip(net.stages, untrained.stages, strict=True)
    ]
    assert changed == [True, False, True], "the second stage is in nobody's reach"
    table = run.probe()
    assert table is not None and {row.network for row in table.rows} >= {"skip", "untrained"}


def test_a_run_of_a_file_needs_the_file_in_another_process(tmp_path):
    trace = tmp_path / "executed"
    file = write(tmp_path / "skip.py", SKIP + f"\nimport pathlib\n\npathlib.Path({str(trace)!r}).touch()\n", "skip")
    out = tmp_path / "run"
    localsim.run(rule=str(file), out=out, quiet=True, max_steps=1, probe_protocol="none", **TINY)
    trace.unlink()
    probe = ["probe", out, "--images", "20", "--protocol", "logistic"]
    resume = ["run", "--out", out, "--resume"]

    for code, printed, errors in commands(probe, resume):
        (said,) = errors
        assert code == 2 and not printed
        assert said.startswith("localsim: unknown rule 'skip'; allowed: untrained, end_to_end")
        assert said.endswith("; a rule of your own goes by its file: --rule path/to/rule.py")
    assert not trace.exists(), "a run folder executes nothing"

    ((code, printed, _),) = commands([*probe, "--rule", file])
    assert code == 0 and "linear probe, raw features" in "\n".join(printed)
    assert trace.exists()


def test_a_run_of_a_file_is_resumed_with_the_file(tmp_path, capsys):
    file = write(tmp_path / "skip.py", SKIP, "skip")
    other = write(tmp_path / "other.py", PLAIN, "other")
    out = tmp_path / "run"
    localsim.run(rule=str(file), out=out, quiet=True, max_steps=1, probe_protocol="none", **TINY)
    del rules["skip"]  # as in another process
    assert main(["run", "--resume", "--out", str(out), "--rule", str(other)]) == 2
    assert "was started with rule='skip', not 'other'" in capsys.readouterr().err
    assert main(["run", "--resume", "--out", str(out), "--rule", str(file)]) == 0, capsys.readouterr().err
    assert load_run(out).step == 4


def test_a_run_folder_cannot_name_a_file_to_execute(tmp_path, monkeypatch):
    """A configuration that somebody else wrote is data: only the one who types the path executes it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trap.py").write_text("import pathlib\npathlib.Path('sprung').touch()")
    config = {**resolve("blockwise", "quick", TINY).to_json(), "rule": "trap.py"}
    with pytest.raises(UserError):
        build_network(Config.from_json(config, "config.json"))
    assert not (tmp_path / "sprung").exists()


def test_a_file_is_taken_as_a_path_too_and_may_be_edited(tmp_path):
    file = write(tmp_path / "plain.py", PLAIN, "plain")
    assert get_rule(file) is rules["plain"]
    assert resolve(str(file), "quick").objective == "vicreg"
    write(file, PLAIN.replace("vicreg", "simclr"), "plain")
    assert resolve(str(file), "quick").objective == "simclr"
    assert build(str(file), preset="quick", backbone="resnet20", objective="infopro").credit.num_taps == 3


def test_reach_and_objective_of_a_rule_of_ones_own(tmp_path):
    file = str(write(tmp_path / "plain.py", PLAIN, "plain"))
    net = build(file, preset="quick", backbone="resnet20", reach=2, objective="lpl,simclr,vicreg")
    np.testing.assert_array_equal(net.credit.matrix, np.eye(3) + np.eye(3, k=-1))
    skip = str(write(tmp_path / "skip.py", SKIP, "skip"))
    with pytest.raises(UserError, match=r"^--reach 2 has no meaning for rule skip: its matrix is fixed$"):
        build(skip, preset="quick", backbone="resnet20", reach=2)
    with pytest.raises(UserError, match="objective apart has no option 'gap'; allowed: margin"):
        build(skip, preset="quick", backbone="resnet20", objective_options={"gap": 1})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no rule file {path}"),
        ("RULE = Rule(", "{path} cannot be executed: SyntaxError: '(' was never closed"),
        ("import no_such_module", "{path} cannot be executed: ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "{path} cannot be executed: ZeroDivisionError: division by zero"),
        ("rule = 3", "{path} holds no rule: it needs RULE = Rule(name=..., ...)"),
        ("RULE = 'blockwise'", "{path} holds no rule: it needs RULE = Rule(name=..., ...)"),
        ("from localsim.rules import Rule as RULE", "{path} holds no rule: it needs RULE = Rule(name=..., ...)"),
        (PLAIN.replace("NAME", "loco"),
         "{path}: the name 'loco' is taken by a rule of localsim; choose another"),
        (PLAIN.replace("NAME", "my/rule"), "{path}: the rule is called 'my/rule'; allowed: letters, digits, _ and -"),
        (PLAIN.replace("NAME", "my.py"), "{path}: the rule is called 'my.py'; allowed: letters, digits, _ and -"),
        (PLAIN.replace('"NAME"', "7"), "{path}: the rule is called 7; allowed: letters, digits, _ and -"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_rule_is_one_sentence(text, said, tmp_path, capsys):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    before = dict(rules)
    for arguments in (["run", "--rule", str(file)], ["rules", str(file)], ["probe", "run", "--rule", str(file)]):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("localsim: " + said.format(path=file))
    assert rules == before


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path, monkeypatch):
    """Else the second would be taken for the first where backbones and dataclasses look their modules up."""
    monkeypatch.setattr(registry, "_rules", dict(registry._rules))
    monkeypatch.setattr(registry, "_sources", dict(registry._sources))
    made = []
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(
            "from localsim.credit import Credit\nfrom localsim.rules.rule import Rule\n"
            "def credit(number):\n    return Credit.banded(number)\n"
            f"RULE = Rule(name='same_{folder}', summary='.', paper='.', credit=credit)\n"
        )
        made.append(load_rule(tmp_path / folder / "same.py").credit.__module__)
    assert made[0] != made[1] and all(name in sys.modules for name in made)


def test_two_files_cannot_share_a_name(tmp_path):
    first, second = (write(tmp_path / f"{file}.py", PLAIN, "plain") for file in ("first", "second"))
    load_rule(first)
    with pytest.raises(UserError) as error:
        load_rule(second)
    assert str(error.value) == f"{second}: the name 'plain' is taken by a rule of {first}; choose another"
    load_rule(first)


# -- an installed package ---------------------------------------------------------------------------------------------


def install(folder: Path, **modules: str) -> Path:
    """Lay a package out as pip does: modules, and a dist-info whose entry points name the RULE of each."""
    info = folder / "outside-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    lines = [f"{name} = outside_{name}:RULE" for name in modules]
    (info / "entry_points.txt").write_text("\n".join(["[localsim.rules]", *lines, ""]))
    for name, text in modules.items():
        (folder / f"outside_{name}.py").write_text(text)
    return folder


def test_a_rule_of_an_installed_package(tmp_path):
    site = install(tmp_path / "site", plain=PLAIN.replace("NAME", "outsider"))
    out = tmp_path / "run"
    run = ["run", "--rule", "outsider", *FLAGS, "--set", "probe_images=20", "--out", out]
    (listed, printed, warned), (ran, told, _) = commands(["rules"], run, path=site)
    assert (listed, ran) == (0, 0) and not warned
    assert "outsider: Of a package." in printed
    assert load_run(out).config.rule == "outsider"
    assert "linear probe, raw features" in "\n".join(told)


def test_a_broken_package_only_warns_and_no_name_is_taken_twice(tmp_path):
    site = install(
        tmp_path / "site",
        broken="import no_such_module",
        number="RULE = 3",
        clash=PLAIN.replace("NAME", "loco"),
        good=PLAIN.replace("NAME", "good"),
    )
    file = write(tmp_path / "mine.py", PLAIN, "good")
    (code, printed, warned), (refused, _, errors) = commands(["rules"], ["rules", file], path=site)
    assert code == 0
    assert "good: Of a package." in printed
    assert len([line for line in printed if line.startswith("loco: ")]) == 1
    assert sorted(warned) == [
        "localsim: rule broken of an installed package is left out: No module named 'no_such_module'",
        "localsim: rule clash of an installed package is left out: entry point clash = outside_clash:RULE: the name "
        "'loco' is taken by a rule of localsim; choose another",
        "localsim: rule number of an installed package is left out: entry point number = outside_number:RULE holds no "
        "rule: it needs RULE = Rule(name=..., ...)",
    ]
    assert refused == 2
    assert errors == [
        f"localsim: {file}: the name 'good' is taken by a rule of entry point good = outside_good:RULE; choose another"
    ]


# -- localsim rules ---------------------------------------------------------------------------------------------------


def test_all_rules_are_printed(capsys, tmp_path):
    assert main(["rules"]) == 0
    printed = capsys.readouterr().out
    for name, rule in rules.items():
        assert f"{name}: {rule.summary}\n  paper: {rule.paper}\n" in printed
    assert main(["rules", "clapp", "--stages", "6"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("clapp: ") and "readout patches, head predictor, objective hinge" in printed
    assert "tap on   6   .   .   .   .   .   1" in printed and "loco" not in printed
    assert main(["rules", str(write(tmp_path / "skip.py", SKIP, "skip"))]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("skip: The highest loss") and "  tap on   3   1   .   1" in printed


@pytest.mark.parametrize("stages", [2, 3, 6, 11])
def test_all_rules_are_printed_for_any_number_of_stages(stages, capsys):
    assert main(["rules", "--stages", str(stages)]) == 0, capsys.readouterr().err


def test_a_rule_that_names_a_setting_that_is_none_is_told(tmp_path):
    text = "from localsim.credit import Credit\nfrom localsim.rules import Rule\n"
    text += "def credit(k):\n    return {}['missing']\n"
    make = "RULE = Rule(name='{}', summary='A test.', paper='none', credit={}, settings={})\n"
    (tmp_path / "typo.py").write_text(text + make.format("typo", "Credit.blockwise", "{'foo': 1}"))
    (tmp_path / "broken.py").write_text(text + make.format("broken", "credit", "{}"))
    with pytest.raises(UserError, match=r"^rule typo: unknown setting 'foo'; allowed: rule, preset"):
        resolve(str(tmp_path / "typo.py"), "quick")
    with pytest.raises(UserError, match=r"^the credit of rule broken failed for 4 stages: KeyError: 'missing'"):
        build(str(tmp_path / "broken.py"), preset="quick")
    for name in ("typo", "broken"):
        del rules[name], registry._sources[name]
