"""`localsim cost` tells what `localsim.cost` predicts, overwrites nothing, and does what its guide says."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from tiny import exit_code, tiny_config

from localsim.cli import make_parser
from localsim.cost import cost
from localsim.cost_command import costs, report_costs
from localsim.errors import UserError

SIDE = 16


def test_combinations_that_do_not_exist_are_named():
    settings = {"backbone": "resnet20", "image_size": SIDE, "projector": [8, 8], "expand_width": 8}
    found, missing = costs(["loco", "layerwise"], [1, 2], None, settings)
    assert [(one.rule, len(one.stages)) for one in found] == [("loco", 2), ("layerwise", 10)]
    assert missing == [
        "layerwise has no granularity to choose: it is one unit block per stage",
        "loco at granularity 1 is left out: reach 2 does not fit 1 stages; allowed: 1 to 1",
    ]
    with pytest.raises(UserError, match="reach 2 does not fit 1 stages"):
        costs(["loco"], [1], None, settings)
    _, notes = costs(["loco"], [2], None, {**settings, "compile": True})
    assert notes == ["these are the numbers without compile, whose kernels choose what they keep"]
    with pytest.raises(UserError, match="unknown rule 'hebb'"):
        costs(["loco", "hebb"], [2], None, settings)


SMALL = "--backbone resnet20 --image-size 16 --batch-size 8 --precision full --set projector=[8,8] --set expand_width=8"


def test_the_command_prints_a_table_and_what_its_columns_mean(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(f"cost --rule blockwise {SMALL} --json cost.json") == 0
    printed = capsys.readouterr().out
    first, _, head, row, *rest = printed.splitlines()
    assert first == "resnet20, 16 px, 8 images a step, 2 views, full precision"
    predicted = cost(tiny_config(noise="all:0.25"))
    cells = dict(zip(head.replace(" M", "_M").replace(" G", "_G").split(), row.split(), strict=True))
    assert cells["rule"] == "blockwise" and cells["stages"] == "3"
    assert float(cells["held_MiB"]) == pytest.approx(predicted.held_bytes / 2**20, rel=0.01)
    assert float(cells["fwd_GFLOP"]) == pytest.approx(predicted.forward_flops / 1e9, rel=0.01)
    assert (cells["path"], cells["lock"]) == ("4", "4")
    explained = {line.split("  ")[0] for line in rest}
    assert explained >= {name.replace("_", " ") for name in cells} - {"rule", "stages"}
    assert "stem..layer1.2" in printed
    assert json.loads((tmp_path / "cost.json").read_text()) == [
        {name: list(value) if isinstance(value, tuple) else value for name, value in vars(predicted).items()}
    ]


def test_the_command_draws_and_overwrites_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    many = f"cost --rule blockwise,loco --granularity 1,3 {SMALL}"
    assert exit_code(f"{many} --plot cost.svg") == 0
    printed = capsys.readouterr().out
    assert "loco at granularity 1 is left out" in printed and "by stage" not in printed
    drawn = (tmp_path / "cost.svg").read_bytes()
    for options, sentence in (
        ("--plot cost.svg", "cost.svg exists already; choose another name, or move it away"),
        ("--json cost.svg", "cost.svg exists already"),
        ("--plot cost.jpeg", "unknown figure format '.jpeg'; allowed: .png, .svg, .pdf"),
        ("--set batch_size=4", "batch_size is given twice: by --batch-size and by --set"),
        ("--set speed=4", "unknown setting 'speed'"),
    ):
        assert exit_code(f"{many} {options}") == 2
        caught = capsys.readouterr()
        assert sentence in caught.err and not caught.out
        assert caught.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["cost.svg"]
    assert (tmp_path / "cost.svg").read_bytes() == drawn


def test_settings_of_any_type_are_taken_or_refused_in_a_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = []
    for options in ("--granularity 2 --rule loco", "--set granularity=2 --set rule=loco --set preset=quick"):
        assert exit_code(f"cost {SMALL} {options}") == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "layer3.2" in printed[0]
    for setting, sentence in (
        ("granularity=0", "granularity 0 is no number of stages of resnet20"),
        ("granularity=2.5", "granularity is 2.5; allowed: "),
        ("granularity=[1,2]", "granularity is [1, 2]; allowed: "),
        ("granularity=true", "granularity 'True' is no number of stages"),
        ("rule=3", "unknown rule '3'; allowed: "),
        ("rule=0", "unknown rule '0'; allowed: "),
        ("preset=3", "preset is 3; allowed: text"),
        ("json=1", "unknown setting 'json'; allowed: rule, preset, granularity, "),
        ("plot=1", "unknown setting 'plot'; allowed: rule, preset, granularity, "),
        ("plot=cost.svg", "unknown setting 'plot'"),
        ("debug=1", "unknown setting 'debug'"),
    ):
        assert exit_code(f"cost {SMALL} --set {setting}") == 2
        caught = capsys.readouterr()
        assert sentence in caught.err and caught.err.count("\n") == 1 and not caught.out
    assert list(tmp_path.iterdir()) == []


def test_costs_that_differ_in_more_than_rule_and_cut_say_so(capsys):
    assert exit_code(f"cost --rule end_to_end,greedy_supervised --granularity 3 {SMALL}") == 0
    first, _, head, *rows = itertools.islice(capsys.readouterr().out.splitlines(), 5)
    assert "view" not in first and "views" in head.split()
    column = head.split().index("views")
    assert [row.split()[column] for row in rows] == ["2", "1"]


# -- several processes ------------------------------------------------------------------------------------------------


def test_processes_are_predicted_below_what_is_printed_else(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(f"cost {SMALL} --machine 1e9,1e9,1e-5") == 2
    assert "--machine says how several processes run; give --processes too" in capsys.readouterr().err
    assert exit_code(f"cost --rule blockwise {SMALL}") == 0
    plain = capsys.readouterr().out
    asked = f"cost --rule blockwise {SMALL} --processes 1,2 --machine 1e9,1e9,1e-5 --json cost.json"
    assert exit_code(asked) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(plain)
    below = printed.removeprefix(plain).splitlines()
    assert below[1] == "predicted, not measured, on 1e9,1e9,1e-5:"
    head, *rows = (line.replace("MB sent", "sent").split() for line in below[2:6])
    cells = [dict(zip(head, row, strict=True)) for row in rows]
    assert [(cell["processes"], cell["parallel"], cell["groups"]) for cell in cells] == [
        ("1", "data", "3"),
        ("2", "data", "3"),
        ("2", "blocks:2", "1+2"),
    ]
    assert cells[0]["efficiency"] == "100%" and cells[0]["messages"] == "0"
    predicted = cost(tiny_config(noise="all:0.25"))
    flops = predicted.forward_flops + predicted.backward_flops
    assert float(cells[0]["ms/step"].replace(",", "")) == pytest.approx(flops / 1e6, rel=0.01)
    assert below[-1].startswith("given: as given")
    ((record,),) = [json.loads((tmp_path / "cost.json").read_text())]
    assert [one["groups"] for one in record["scaling"]] == [[[1, 2, 3]], [[1, 2, 3]], [[1], [2, 3]]]
    assert record["scaling"][0]["seconds"] == pytest.approx(flops / 1e9)
    kinds = [message["kind"] for message in record["scaling"][1]["messages"]]
    assert kinds == ["labels", "norms", "embeddings", "gradients"]


def test_several_rules_are_predicted_and_what_does_not_fit_is_named(capsys):
    many = f"cost --rule blockwise,end_to_end --granularity 1,3 {SMALL} --processes 3"
    assert exit_code(f"{many} --parallel blocks:3 --machine 1e9,1e9,1e-5") == 0
    printed = capsys.readouterr().out
    table = printed.partition("predicted, not measured")[2]
    rows = [line.split() for line in table.splitlines() if line.split()[3:4] == ["blocks:3"]]
    assert [(row[0], row[1]) for row in rows] == [("blockwise", "3"), ("end_to_end", "3")]
    assert "blockwise in 1 stage is not predicted on several processes: " in printed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--processes 0", "--processes is '0'; allowed: whole numbers above 0, e.g. 8 or 8,64,512"),
        ("--processes 2,x", "--processes is '2,x'; allowed"),
        ("--processes 9", "9 processes cannot share a batch of 8 images; allowed: 1 to 8"),
        ("--processes 2 --parallel stages", "unknown parallel 'stages'; allowed: data, blocks, blocks:P"),
        ("--processes 2 --machine a1", "--machine is 'a1'; allowed: a100, a100-ethernet, h100, here, or FLOPS"),
        ("--parallel data", "--parallel says how several processes run; give --processes too"),
        ("--set processes=2", "unknown setting 'processes'"),
        ("--set machine=here", "unknown setting 'machine'"),
    ],
)
def test_what_cannot_be_predicted_is_one_sentence(options, sentence, capsys):
    assert exit_code(f"cost --rule blockwise {SMALL} {options}") == 2
    caught = capsys.readouterr()
    assert sentence in caught.err and caught.err.count("\n") == 1 and not caught.out


# -- the guide --------------------------------------------------------------------------------------------------------

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "cost.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), flags=re.S)


def test_the_guide_shows_what_the_command_prints(capsys):
    """Else: run the command in the guide, and put what it prints there."""
    *others, shown = (line for block in blocks("bash") for line in block.splitlines())
    for line in others:
        assert make_parser().parse_args(line.split()[1:])
    assert exit_code(shown.removeprefix("localsim ")) == 0
    (printed,) = blocks("text")
    assert capsys.readouterr().out == printed


def test_the_python_of_the_guide_runs(capsys):
    (code,) = blocks("python")
    exec(code, {})
    assert "gradients cross up to 10 of 17 unit blocks" in capsys.readouterr().out


def test_a_setting_that_has_no_meaning_for_one_of_the_rules_leaves_that_one_out(capsys):
    found = report_costs("blockwise,end_to_end", 2, preset="quick", backbone="resnet20", readout_impl="plain")
    assert [cost.rule for cost in found] == ["blockwise"]
    assert "end_to_end is left out: readout_impl plain has no meaning for readout global" in capsys.readouterr().out
    with pytest.raises(UserError, match="is no number of stages"):
        report_costs("blockwise", "x", preset="quick", backbone="resnet20")
