"""Fuzzed configurations, in `config.json` and on the command line: an error sentence or success, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fuzzing import STEPS, assert_sentence, command, fuzz, make_run, outcome, refused, without_pictures
from hypothesis import strategies as st

import localsim
from localsim.config import Config
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.presets import PRESETS, resolve
from localsim.rules import rules
from localsim.rules.heads import HEADS
from localsim.rules.objectives import OBJECTIVES
from localsim.runs import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("fuzzed") / "run")


@pytest.fixture(scope="module")
def plain(run) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


# -- what is drawn ----------------------------------------------------------------------------------------------------

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
"""Whatever JSON can hold, NaN and infinities too, as Python reads and writes them."""

EXTREME: list[Any] = [
    0, -1, 1, 2, 1.5, -0.0, 1e-320, 1e308, 2**53, 2**63, -(2**63), 2**64, 10**30, 10**400, float("nan"), float("inf"),
    -float("inf"), "", "\0", "\n", "x" * 9000, "\ud800", "../" * 9, "/dev/null", "9" * 5000, "none", "auto", "my.py",
    [], {}, [[]], [0], [10**30], {"from": 0, "to": 1}, {"x" * 9000: "\n"}, True, False, None,
]  # fmt: skip
MEANT: list[Any] = [
    *rules, *OBJECTIVES, *HEADS, *PRESETS, "vgg6", "resnet20", "sgd", "lars", "adamw", "global", "expand", "local2x2",
    "map", "patches", "subsample", "all:0.25", "hw:1", "all:nan", "channel:1e400", "8:4", "0:0", "16:1", "sequential",
    "feedback_alignment", "direct_feedback", "sign_symmetric", "balanced", "features.5", "network", "stage", "block",
    "units", "fused", "plain", "small", "crop_flip", "cpu", "cuda", "meta", "bf16", "full", "identical", "frozen", 3, 7,
    "barlow_twins,vicreg", "barlow_twins,", "local0x0", "subsample0", "residual1", 1e-5, {"lambda_": "x"},
    {"lambda_": float("nan")}, {"lambda_": {"from": 0, "to": 1}}, {"hidden": "a"}, {"hidden": [0]}, {"steps": -1},
    Credit.overlapping(2).to_config(), Credit.blockwise(3).to_config(),
    {"num_stages": -2, "taps": [], "matrix": []}, {"num_stages": "2", "taps": [], "matrix": []},
    {"num_stages": 2, "taps": [0.5, float("nan")], "matrix": [[1, 0], [0, 1]]},
    {"num_stages": 2, "taps": [0, 10**30], "matrix": [[1, 0], [0, 1]]},
    {"num_stages": 2, "taps": "01", "matrix": [[1, 0], [0, 1]]},
    {"num_stages": 2, "taps": [0, 1], "matrix": [[1], [0, 10**400]]},
]  # fmt: skip
"""Values that some field takes, for this field or another."""

VALUE = ANY | st.sampled_from(EXTREME) | st.sampled_from(MEANT)
SLOW = {"compile": (True, 1), "backbone_width": (2, 3, 7)}
"""What is taken and takes longer than all cases together."""


def _quick(changes: dict[str, Any]) -> bool:
    """Say whether no value is a number that is taken and makes something large: nothing is learned from building it."""
    for name, value in changes.items():
        if value in SLOW.get(name, ()) or (isinstance(value, int | float) and 40 < abs(value) < 2**31):
            return False
        if name == "projector" and isinstance(value, list) and any(isinstance(v, int) and v > 40 for v in value):
            return False
    return True


NAMES = st.sampled_from(Config.names())
CHANGES = st.dictionaries(NAMES, VALUE, min_size=1, max_size=3).filter(_quick)


def _damaged(data: bytes, damage: tuple[str, int, bytes]) -> bytes:
    """Return a file's bytes cut off, with bytes overwritten or with bytes put in between."""
    kind, place, noise = damage
    place %= len(data) + 1
    return {
        "cut": data[:place],
        "over": data[:place] + noise + data[place + len(noise) :],
        "between": data[:place] + noise + data[place:],
        "alone": noise,
    }[kind]


DAMAGE = st.tuples(
    st.sampled_from(["cut", "over", "between", "alone"]),
    st.integers(0, 10**4),
    st.binary(max_size=8) | st.sampled_from([b'"rule": 1, ', b"{" * 9, b"[" * 99_999, b"9" * 5000, b"NaN", b"\xff"]),
)

# -- config.json ------------------------------------------------------------------------------------------------------


def test_any_bytes_in_the_place_of_a_configuration(run, plain, tmp_path):
    data = json.dumps(plain, indent=2).encode()

    def check(damage: tuple[str, int, bytes]) -> None:
        (tmp_path / "config.json").write_bytes(_damaged(data, damage))
        opened = outcome(lambda: localsim.load_run(tmp_path))
        assert isinstance(opened, Run) or "config.json" in str(opened)

    fuzz(300, DAMAGE, check)


def test_any_json_in_the_place_of_a_configuration(plain, tmp_path):
    entries = st.dictionaries(NAMES | st.text(max_size=10), VALUE, max_size=5)
    either = ANY | entries | st.tuples(entries, st.sets(NAMES, max_size=2))

    def check(value: Any) -> None:
        if isinstance(value, tuple):  # the run's own, with some entries changed, added or missing
            value = {name: entry for name, entry in {**plain, **value[0]}.items() if name not in value[1]}
        (tmp_path / "config.json").write_text(json.dumps(value))
        opened = outcome(lambda: localsim.load_run(tmp_path))
        assert isinstance(opened, Run) or "config.json" in str(opened)

    fuzz(250, either, check)


def test_a_network_of_any_configuration(run, plain, tmp_path):
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")

    def check(case: tuple[dict[str, Any], str]) -> None:
        changes, which = case
        (tmp_path / "config.json").write_text(json.dumps({**plain, **changes}))
        outcome(lambda: localsim.load_run(tmp_path).network(which))

    fuzz(400, st.tuples(CHANGES, st.sampled_from(["trained", "untrained"])), check)


def test_any_configuration_is_resumed_or_refused(run, plain, tmp_path, monkeypatch):
    without_pictures(monkeypatch)
    copy = shutil.copytree(run, tmp_path / "run")

    def check(changes: dict[str, Any]) -> None:
        (copy / "config.json").write_text(json.dumps({**plain, **changes}))
        command("run", "--out", str(copy), "--resume", "--set", f"max_steps={STEPS}")

    check({})
    fuzz(200, CHANGES, check)


# -- the command line -------------------------------------------------------------------------------------------------


def test_any_settings_are_resolved_or_refused(plain):
    def check(case: tuple[str, str | None, dict[str, Any]]) -> None:
        rule, preset, changes = case
        config = outcome(lambda: resolve(rule, preset, changes))
        if isinstance(config, Config):
            assert Config.from_json(json.loads(json.dumps(config.to_json())), "config.json") == config

    overrides = st.dictionaries(NAMES | st.text(max_size=8), VALUE, max_size=4)
    presets = st.none() | st.sampled_from([*PRESETS]) | st.text(max_size=8)
    fuzz(250, st.tuples(st.sampled_from([*rules]) | st.text(max_size=8), presets, overrides), check)


# of which every value is refused when the configuration is resolved: nothing is ever trained
REFUSED = st.sampled_from(["epochs", "batch_size", "lr", "seed", "precision", "schedule", "transport", "projector"])
SET = st.one_of(
    st.tuples(
        REFUSED,
        st.sampled_from(["x", "-1", "NaN", "1e999", '""', "[", "{}", '{"a": [1]}', "[0]", "null,", "null", "9" * 5000]),
    ),
    st.tuples(st.text(max_size=8).filter(lambda name: name not in Config.names()), st.text(max_size=8)),
).map("=".join)


@pytest.mark.parametrize("name", ["run", "cost"])
def test_any_set_on_the_command_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def check(texts: list[str]) -> None:
        code, said = command(name, *(argument for text in texts for argument in ("--set", text)))
        assert code == 2 and said

    fuzz(150, st.lists(SET, min_size=1, max_size=3), check)
    assert not any(tmp_path.iterdir())


def test_null_is_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("run", "--set", "colour=null") == (
        2, "localsim: --set 'colour=null' sets nothing; leave it out, or give a value"
    )  # fmt: skip


# -- what was found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": None}, "batch_size is None; allowed: numbers from 2"),
        ({"expand_width": None}, "expand_width is None; allowed: numbers from 1"),
        ({"image_size": 2**64}, f"image_size is {2**64}; allowed: whole numbers below 2147483648"),
        ({"seed": 2**63}, f"seed is {2**63}; allowed: whole numbers below {2**63}"),
        ({"warmup_epochs": 10**400}, "warmup_epochs is 10"),
        ({"momentum": 10**400}, "momentum is 10"),
        ({"projector": [10**30]}, "projector is [10"),
        ({"backbone_width": 1e308}, "backbone_width is 1e+308; allowed: numbers above 0, up to 100"),
        ({"preset": "\ud800"}, r"preset is '\ud800'; allowed: at most 4096 characters that can be printed"),
        ({"cuts": "x" * 9000}, "cuts is 'xxx"),
    ],
)
def test_values_that_ended_in_a_traceback(plain, tmp_path, changes, told):
    (tmp_path / "config.json").write_text(json.dumps({**plain, **changes}))
    assert refused(lambda: localsim.load_run(tmp_path)).startswith(f"{tmp_path / 'config.json'}: {told}")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"objective": "sgd"}, "unknown objective 'sgd'; allowed: barlow_twins, "),
        ({"credit": {"num_stages": -2, "taps": [], "matrix": []}}, "the credit entry needs num_stages (a number)"),
        ({"credit": {"num_stages": 2, "taps": [0.5, 1], "matrix": [[1, 0], [0, 1]]}}, "tap 0 reads stage 0.5; allowed"),
        ({"credit": {"num_stages": 1, "taps": [0], "matrix": [[10**400]]}}, "the credit matrix must be a rectangular"),
    ],
)
def test_networks_that_ended_in_a_traceback(plain, tmp_path, changes, told):
    (tmp_path / "config.json").write_text(json.dumps({**plain, **changes}))
    assert refused(lambda: localsim.load_run(tmp_path).network("untrained")).startswith(told)


@pytest.mark.parametrize("text", ["[" * 99_999, '{"a": ' * 99_999, "9" * 5000, "\ufeff{}"])
def test_files_that_json_itself_cannot_take(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json cannot be read: " in refused(lambda: localsim.load_run(tmp_path))


def test_a_long_message_loses_its_middle():
    text = str(UserError("a" * 700 + "b" * 9000 + "c" * 300))
    assert_sentence(text)
    assert text.startswith("a" * 600) and text.endswith("c" * 300)
    assert str(UserError("a" * 1000)) == "a" * 1000
