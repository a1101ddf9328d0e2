"""The resolved configuration: presets, overrides, checks, the file it is kept in, and the published numbers."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localsim.config import Config
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.optim import scaled_lr
from localsim.presets import PRESETS, resolve
from localsim.rules import rules
from localsim.rules.objectives import make_objective


def resolved(preset: str = "quick", **overrides) -> Config:
    return resolve("blockwise", preset, overrides)


def sentence(**overrides) -> str:
    with pytest.raises(UserError) as error:
        resolved(**overrides)
    return str(error.value)


# -- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "preset"),
    [
        (None, "quick"),
        ("embedded", "quick"),
        ("cifar10", "cifar10"),
        ("cifar100", "cifar10"),
        ("stl10", "stl10"),
        ("imagenet", "imagenet"),
        ("some/images", "folder"),
    ],
)
def test_the_data_set_chooses_the_preset(data, preset):
    config = resolve("blockwise", None, {"data": data})
    assert config.preset == preset
    assert config.data == (data or "embedded")


def test_a_preset_of_ones_own_choice_stays():
    config = resolve("blockwise", "imagenet", {"data": "stl10"})
    assert (config.preset, config.data, config.batch_size) == ("imagenet", "stl10", 2048)


def test_the_folder_preset_needs_a_folder():
    assert sentence(preset="folder") == "preset 'folder' needs --data with a folder of images"
    assert resolved("folder", data="some/images").data == "some/images"


def test_overrides_win_over_preset_and_rule():
    plain = resolved()
    changed = resolved(epochs=7, readout="global", noise="hw:0.5", lr=None)
    assert (changed.epochs, changed.readout, changed.noise) == (7, "global", "hw:0.5")
    assert dataclasses.replace(changed, epochs=plain.epochs, readout=plain.readout, noise=plain.noise) == plain


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "folder"])
@pytest.mark.parametrize("rule", rules)
def test_every_rule_resolves_under_every_preset(rule, preset):
    config = resolve(rule, preset)
    assert (config.rule, config.preset) == (rule, preset)
    chosen = rules[rule]
    assert (config.granularity, config.readout, config.objective, config.noise) == (
        chosen.granularity,
        chosen.readout,
        chosen.objective,
        str(chosen.noise),
    )


def test_listed_cuts_replace_the_rules_granularity():
    assert resolved(cuts="layer2.0,layer3.0").granularity is None
    assert resolved(cuts="layer2.0,layer3.0", granularity=3).granularity == 3
    assert resolved(cuts="balanced").granularity == "stage"


def test_the_imagenet_preset_is_the_published_run():
    config = resolve("blockwise", "imagenet")
    published = {
        "data": "imagenet",
        "backbone": "resnet50",
        "stem": "imagenet",
        "image_size": 224,
        "granularity": "stage",
        "reach": None,
        "credit": None,
        "zero_init_residual": True,
        "readout": "expand",
        "expand_width": 2048,
        "projector": [8192, 8192, 8192],
        "objective": "barlow_twins",
        "noise": "all:0.25",
        "augmentation": "barlow_twins",
        "epochs": 300,
        "batch_size": 2048,
        "optimizer": "lars",
        "lr": 0.2,
        "lr_scaling": "linear",
        "momentum": 0.9,
        "weight_decay": 1e-6,
        "warmup_epochs": 10,
        "final_lr_factor": 0.001,
        "probe_protocol": "paper",
    }
    assert {name: getattr(config, name) for name in published} == published
    assert scaled_lr(config.lr, config.batch_size) == pytest.approx(1.6)
    objective = make_objective(config.objective, config.objective_options)
    assert (objective.lambda_, objective.scale) == (0.0051, 0.024)


# -- checks -----------------------------------------------------------------------------------------------------------

LOWEST = {
    "expand_width": 1,
    "train_images": 1,
    "test_images": 1,
    "batch_size": 2,
    "weight_decay": 0,
    "momentum": 0,
    "warmup_epochs": 0,
    "final_lr_factor": 0,
    "seed": 0,
    "probe_images": 1,
    "max_steps": 1,
    "workers": 0,
    "log_every": 1,
    "checkpoint_minutes": 0,
}
POSITIVE = ("lr", "epochs", "image_size")
WHOLE = (
    "reach", "expand_width", "image_size", "train_images", "test_images", "epochs", "batch_size", "seed",
    "probe_images", "max_steps", "workers", "log_every",
)  # fmt: skip


@pytest.mark.parametrize(("name", "low"), LOWEST.items())
def test_numbers_below_their_range(name, low):
    assert getattr(resolved(**{name: low}), name) == low
    for value in (low - 1, float("nan"), float("inf"), "many", True):
        assert sentence(**{name: value}) == f"{name} is {value!r}; allowed: numbers from {low}"


@pytest.mark.parametrize("name", POSITIVE)
def test_numbers_that_must_be_positive(name):
    assert getattr(resolved(**{name: 1}), name) == 1
    assert sentence(**{name: 0}) == f"{name} is 0; allowed: numbers above 0"
    for value in (-1, float("nan"), "many"):
        assert sentence(**{name: value}) == f"{name} is {value!r}; allowed: numbers above 0"


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(name):
    assert sentence(**{name: 2.5}) == f"{name} is 2.5; allowed: whole numbers"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("provenance", "private, identical, frozen"),
        ("schedule", "simultaneous, sequential"),
        ("view_strength", "uniform, receptive_field"),
        ("transport", "exact, feedback_alignment, sign_symmetric, direct_feedback"),
        ("on_collapse", "stop, continue"),
        ("feature_cache", "True, False"),
        ("lr_scaling", "linear, none"),
        ("precision", "full, bf16"),
        ("probe_protocol", "logistic, paper, none"),
        ("zero_init_residual", "True, False"),
        ("channels_last", "True, False"),
    ],
)
def test_choices(name, allowed):
    assert sentence(**{name: "some"}) == f"{name} is 'some'; allowed: {allowed}"


@pytest.mark.parametrize("widths", [[], [8, 0], [8, 2.0], "8", 8])
def test_projector_widths(widths):
    expected = f"projector is {widths!r}; allowed: a list of whole numbers above 0, e.g. [256, 256]"
    assert sentence(projector=widths) == expected
    assert resolved(projector=(8, 4)) == resolved(projector=[8, 4])


def test_what_does_not_exist_is_named():
    assert sentence(batchsize=4).startswith("unknown setting 'batchsize'; allowed: rule, preset, granularity, ")
    assert sentence(preset="slow") == f"unknown preset 'slow'; allowed: {', '.join(PRESETS)}"
    assert sentence(objective="vigreg").startswith("unknown objective 'vigreg'; allowed: barlow_twins")
    assert sentence(objective_options={"lambda_": -1.0}) == "barlow_twins: lambda_ is -1.0; allowed: numbers >= 0"
    assert sentence(noise="all").startswith("noise 'all' is not understood")
    with pytest.raises(UserError, match="unknown rule 'loca'"):
        resolve("loca")


def test_reach_and_a_matrix_contradict_each_other():
    message = "reach and an explicit credit matrix contradict each other; give one of them"
    assert sentence(reach=2, credit=Credit.blockwise(4).to_config()) == message


# -- the file ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from(["quick", "cifar10", "stl10", "imagenet"]),
    st.fixed_dictionaries(
        {},
        optional={
            "epochs": st.integers(1, 10**6),
            "lr": st.floats(1e-300, 1e300),
            "projector": st.lists(st.integers(1, 9), min_size=1),
            "credit": st.sampled_from([Credit.overlapping(4).to_config(), Credit.untrained(2).to_config()]),
            "objective_options": st.just({"lambda_": 0.1}),
            "data_root": st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"])),
            "device": st.sampled_from(["cpu", "cuda"]),
            "max_steps": st.integers(1, 9),
        },
    ),
)
def test_round_trip_through_json(preset, overrides):
    config = resolved(preset, **overrides)
    assert Config.from_json(json.loads(json.dumps(config.to_json())), "config.json") == config


def test_a_file_of_something_else_is_named():
    values = resolved().to_json()
    del values["epochs"], values["lr"]
    values["colour"] = "red"
    with pytest.raises(UserError) as error:
        Config.from_json(values, "runs/a/config.json")
    assert str(error.value) == (
        "runs/a/config.json is not a configuration of this version of localsim: "
        "unknown entries colour; missing entries epochs, lr"
    )
    with pytest.raises(UserError, match="epochs is -1"):
        Config.from_json({**resolved().to_json(), "epochs": -1}, "config.json")


def test_entries_with_a_default_may_be_missing():
    config = resolved()
    values = config.to_json()
    for name in ("max_steps", "device", "workers", "log_every", "checkpoint_minutes"):
        del values[name]
    assert Config.from_json(values, "config.json") == config


def test_changes_that_decide_the_numbers():
    config = resolved()
    assert config.changed_by({}) == {}
    assert config.changed_by({"epochs": config.epochs, "seed": 0}) == {}
    assert config.changed_by({"epochs": 9, "seed": 1}) == {"epochs": (config.epochs, 9), "seed": (0, 1)}
    free = {"max_steps": 3, "device": "cuda", "workers": 5, "checkpoint_minutes": 0.5}
    assert config.changed_by(free) == {}
    assert config.changed_by({**free, "log_every": 3}) == {"log_every": (10, 3)}
    assert config.changed_by({"projector": tuple(config.projector)}) == {}
    with pytest.raises(UserError, match="unknown setting 'colour'; allowed: rule, "):
        config.changed_by({"colour": "red"})
