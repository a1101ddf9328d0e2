"""The cells of a sweep: their order, their names, the folders that hold them already, and what is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TINY, tiny_config

from localsim import runs
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.sweep_cells import as_values, covers, folder_name, in_sentences, make_cells

WORDS = st.text("abcz019_.,:/-AZ é", min_size=1, max_size=60)
VALUES = {
    "granularity": st.integers(1, 20) | st.sampled_from(["network", "stage", "block"]),
    "reach": st.integers(1, 20),
    "objective": WORDS,
    "noise": WORDS,
    "projector": st.lists(st.integers(1, 9000), min_size=1, max_size=12),
    "objective_options": st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 3)),
    "lr": st.floats(1e-9, 10),
}
CHOICES = st.lists(st.tuples(*VALUES.values(), st.integers(0, 5)), min_size=2, max_size=6, unique_by=repr)


@settings(deadline=None, max_examples=60)
@given(CHOICES, st.sets(st.sampled_from(list(VALUES)), min_size=1))
def test_different_cells_have_different_safe_names(choices, varied):
    """Also on a file system that does not tell capitals from small letters."""
    cells = {}
    for *values, seed in choices:
        cell = {name: value for name, value in zip(VALUES, values, strict=True) if name in varied}
        cells[repr((cell, seed))] = folder_name(cell, seed)
    assert len(set(cells.values())) == len(cells)
    for name in cells.values():
        assert re.fullmatch(r"[a-z0-9_.+=-]+", name) and len(name) <= 150 and not name.startswith((".", "-"))


def test_names_are_legible_and_stay():
    """Folders of earlier sweeps are called so."""
    assert folder_name({}, 3) == "seed3"
    assert folder_name({"reach": 2, "granularity": 4}, 0) == "granularity4-reach2-seed0"
    assert folder_name({"seed": 1, "granularity": "block"}, 1) == "granularity_block-seed1"
    named = folder_name({"rule": "loco", "objective": "simclr,vicreg", "lr": 1e-05, "noise": "all:0.25"}, 0)
    assert named == "loco-objective_simclr+vicreg-noise_all=0.25-lr1e-05-seed0"
    assert folder_name({"projector": [256, 128]}, 0) == "projector_256+128-seed0"
    assert folder_name({"data": "/some/where/My Images/"}, 0) == "data_my_images.95959b-seed0"
    assert folder_name({"reach": None, "compile": True}, 0) == "reach_default-compile_true-seed0"


def test_lists_are_several_values_but_for_fields_that_are_lists():
    values, free = as_values(
        {
            "reach": (1, 2, 1),
            "granularity": range(1, 3),
            "projector": [8, 8],
            "lr": None,
            "data_root": None,
            "workers": 2,
        }
    )
    assert values == {"reach": [1, 2], "granularity": [1, 2], "projector": [[8, 8]]}
    assert free == {"workers": 2}
    credit = Credit.blockwise(2)
    values, _ = as_values({"projector": [[8, 8], (8,)], "credit": [credit], "objective_options": {"weight": 1}})
    assert values["projector"] == [[8, 8], [8]]
    assert values["credit"] == [credit.to_config()] and values["objective_options"] == [{"weight": 1}]


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"speed": 1}, "unknown setting 'speed'; allowed: rule, preset, "),
        ({"rule": ["blockwise", "hebb"]}, "unknown rule 'hebb'; allowed: "),
        ({"reach": []}, "reach is an empty list; allowed: one value or more"),
        ({"device": ["cpu", "cuda"]}, "device is ['cpu', 'cuda'], but does not change what a run learns; give one"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(asked, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        as_values(asked)


def test_paths_mean_the_same_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "mine.py").write_text(
        "from localsim.credit import Credit\nfrom localsim.rules.rule import Rule\n"
        "RULE = Rule(name='mine_of_paths', summary='', paper='', credit=Credit.blockwise)\n"
    )
    monkeypatch.chdir(tmp_path)
    values, free = as_values({"rule": ["mine.py", "loco"], "data": ["images", "embedded"], "data_root": "images"})
    assert values == {"rule": [str(tmp_path / "mine.py"), "loco"], "data": [str(tmp_path / "images"), "embedded"]}
    assert free == {"data_root": str(tmp_path / "images")}
    cells, _, _ = make_cells([{"rule": values["rule"]}], {}, tmp_path)
    assert [(cell.name, cell.rule_file) for cell in cells] == [
        ("mine_of_paths-seed0", str(tmp_path / "mine.py")), ("loco-seed0", None),
    ]  # fmt: skip


def asked(**more):
    values, free = as_values({**TINY, **more})
    assert free == {"device": "cpu"}
    return values


def names(cells):
    return [cell.name for cell in cells]


def test_seeds_are_outermost_and_the_last_field_changes_fastest(tmp_path):
    cells, left_out, _ = make_cells([asked(reach=[1, 2], seed=[4, 0], granularity=[3, 2])], {}, tmp_path)
    assert names(cells) == [
        f"granularity{k}-reach{n}-seed{seed}" for seed in (4, 0) for k in (3, 2) for n in (1, 2)
    ]  # fmt: skip
    assert not left_out
    assert (cells[1].config.granularity, cells[1].config.reach, cells[1].config.seed) == (3, 2, 4)
    assert cells[1].config == tiny_config(granularity=3, reach=2, seed=4, device="auto")


@settings(deadline=None, max_examples=8)
@given(st.sets(st.integers(1, 3), min_size=1), st.sets(st.integers(1, 3), min_size=1), st.integers(1, 3))
def test_a_product_has_every_combination_once(granularities, reaches, seeds):
    values = asked(granularity=sorted(granularities), reach=sorted(reaches), seed=list(range(seeds)))
    cells, _, _ = make_cells([values, values], {}, Path("no folder at all"))
    found = [(cell.config.granularity, cell.config.reach, cell.config.seed) for cell in cells]
    assert len(found) == len(set(found)) == len(set(names(cells))) == len(granularities) * len(reaches) * seeds


def test_a_rule_is_not_given_what_has_no_meaning_for_it(tmp_path):
    cells, left_out, notes = make_cells([asked(rule=["blockwise", "end_to_end"], reach=[1, 2])], {}, tmp_path)
    assert names(cells) == ["blockwise-reach1-seed0", "blockwise-reach2-seed0", "end_to_end-seed0"]
    assert notes == ["end_to_end has no reach to choose: its one loss always reaches every stage"] and not left_out
    cells, left_out, _ = make_cells([asked(rule="end_to_end", reach=[1, 2], seed=[0, 1])], {}, tmp_path)
    assert not cells
    assert in_sentences(left_out) == [
        f"reach{n} is left out: --reach {n} has no meaning for rule end_to_end: its one loss always reaches every "
        "stage; use --rule blockwise --reach N"
        for n in (1, 2)
    ]


def test_what_is_left_out_is_told_once_per_reason():
    reasons = {"too big": ["a", "b", "a"], "too small": ["a"], "odd": list("abcde")}
    assert in_sentences(reasons) == [
        "a, b are left out: too big", "a is left out: too small", "a, b, c and 2 more are left out: odd",
    ]  # fmt: skip


def test_a_run_of_an_equal_configuration_is_a_cell_whatever_its_name(tmp_path):
    config = tiny_config(granularity=2, device="cpu", workers=3)
    runs.start_run(tmp_path / "made by hand", config)
    values = asked(granularity=[1, 2])
    cells, _, _ = make_cells([values], {"device": "auto"}, tmp_path)
    assert names(cells) == ["granularity1-seed0", "made by hand"]
    # of two copies the one that is probed
    runs.start_run(tmp_path / "copy", config)
    (tmp_path / "copy" / "probe.json").write_text("[]")
    assert names(make_cells([values], {}, tmp_path)[0]) == ["granularity1-seed0", "copy"]


def test_a_later_list_finds_the_cells_of_an_earlier_one(tmp_path):
    """Although with more that varies they would be called otherwise."""
    first = asked(granularity=[1, 2])
    for cell in make_cells([first], {}, tmp_path)[0]:
        runs.start_run(cell.path, cell.config)
    more = asked(granularity=[1, 2], objective=["barlow_twins", "vicreg"], seed=[0, 1])
    cells, _, _ = make_cells([first, {**more, "seed": [0]}], {}, tmp_path)
    assert names(cells) == [
        "granularity1-seed0", "granularity2-seed0", "granularity1-objective_vicreg-seed0",
        "granularity2-objective_vicreg-seed0",
    ]  # fmt: skip
    assert covers(more, {**more, "seed": [1]}) and not covers(first, more) and not covers(more, first)


def test_another_configuration_under_a_cells_name_is_an_error_that_names_the_field(tmp_path):
    runs.start_run(tmp_path / "granularity2-seed0", tiny_config(granularity=2, epochs=7, device="cpu"))
    message = re.escape("granularity2-seed0 holds epochs=7, but 2 is asked for; give both values to have both")
    with pytest.raises(UserError, match=message):
        make_cells([asked(granularity=[1, 2])], {}, tmp_path)
    cells, _, _ = make_cells([asked(granularity=[1, 2], epochs=[2, 7])], {}, tmp_path)
    assert names(cells)[-1] == "granularity2-seed0"
    # and of two lists for one folder
    with pytest.raises(UserError, match=r"seed0 holds lr=0\.003, but 0\.1 is asked for"):
        make_cells([asked(), asked(lr=0.1)], {}, tmp_path)


def test_a_slip_in_a_list_is_an_error_and_no_cell_to_leave_out():
    with pytest.raises(UserError, match="unknown granularity 'x'; allowed: a number, network, stage, block"):
        as_values({"granularity": [1, "x"]})
