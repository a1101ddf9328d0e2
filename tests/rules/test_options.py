"""Options of objective and head: a rule's own stay unless replaced one by one, shared ones are said once."""

from __future__ import annotations

import pytest

from localsim.credit import Credit
from localsim.errors import UserError
from localsim.presets import PRESETS, SUPERVISED, resolve
from localsim.rules.choices import choose
from localsim.rules.heads import HEADS
from localsim.rules.objectives import OBJECTIVES
from localsim.rules.rule import Rule


@pytest.mark.parametrize(
    ("rule", "given", "kept"),
    [
        ("clapp", {}, {"sampling": "either"}),
        ("clapp", {"asymmetric": True}, {"sampling": "either", "asymmetric": True}),
        ("clapp", {"sampling": "both"}, {"sampling": "both"}),
        ("clapp_dfb", {"sampling": "either"}, {"pair": "views", "sampling": "either"}),
        ("infopro", {"task": 2.0}, {"reconstruction": {"from": 1.0, "to": 0.0}, "task": 2.0}),
        ("infopro", {"reconstruction": {"from": 5, "to": 1}}, {"reconstruction": {"from": 5, "to": 1}}),
        ("infopro", {"reconstruction": 3.0}, {"reconstruction": 3.0}),
        ("blockwise", {"lambda_": 0.1}, {"lambda_": 0.1}),
    ],
)
def test_a_rules_options_stay_but_for_those_that_are_given(rule, given, kept):
    assert resolve(rule, "quick", {"objective_options": given}).objective_options == kept


def test_they_go_with_their_objective():
    assert resolve("clapp", "quick", {"objective": "infonce"}).objective_options == {}
    replaced = resolve("infopro", "quick", {"objective": "cross_entropy", "head": "classifier"})
    assert replaced.objective_options == replaced.head_options == {}


@pytest.mark.parametrize(
    ("rule", "option", "value"),
    [("clapp", "asymmetric", True), ("clapp", "skip", 0), ("greedy_infomax", "skip", 2), ("infopro", "contrast", True)],
)
@pytest.mark.parametrize("where", ["objective_options", "head_options"])
def test_an_option_that_objective_and_head_share_is_said_once(rule, option, value, where):
    config = resolve(rule, "quick", {where: {option: value}})
    assert config.objective_options[option] == config.head_options[option] == value


def test_a_contradiction_is_refused():
    with pytest.raises(UserError) as error:
        resolve("clapp", "quick", {"objective_options": {"skip": 2}, "head_options": {"skip": 0}})
    assert str(error.value) == (
        "skip is 2 for objective hinge, but 0 for head predictor; give it once, in objective_options or head_options"
    )


def test_where_heads_differ_shared_options_are_compared_tap_by_tap():
    given = {"objective": "hinge,infonce,hinge", "head": "predictor", "head_options": {"skip": 0}}
    with pytest.raises(UserError, match="skip is 1 for objective hinge, but 0 for head predictor"):
        resolve("blockwise", "quick", given)
    both = {"hinge": {"skip": 0}, "infonce": {"skip": 0}}
    assert resolve("blockwise", "quick", {**given, "objective_options": both}).objective_options == both


def test_what_is_shared_is_known():
    """A new option of one name in an objective and a head that fit would be shared from then on: on purpose?"""
    found = {
        (objective, head, name)
        for objective, kind in OBJECTIVES.items()
        for head, made in HEADS.items()
        if made.gives in kind.reads.split(" or ")
        for name in kind.__dataclass_fields__
        if name in made.__init__.__annotations__
    }
    assert found == {
        ("hinge", "predictor", "skip"), ("hinge", "predictor", "asymmetric"), ("infonce", "predictor", "skip"),
        ("infonce", "predictor", "asymmetric"), ("infopro", "infopro", "contrast"),
    }  # fmt: skip


def test_an_option_that_the_rule_names_may_be_given_on_either_side():
    own = Rule(
        name="own", summary=".", paper=".", credit=Credit.banded, readout="patches", objective="hinge",
        settings={"objective_options": {"skip": 2}},
    )  # fmt: skip
    for given in ({}, {"objective_options": {"skip": 0}}, {"head_options": {"skip": 0}}):
        chosen = choose(own, given)
        assert chosen["objective_options"]["skip"] == chosen["head_options"]["skip"] == (0 if given else 2)


# -- recipes ----------------------------------------------------------------------------------------------------------

RECIPE = ("augmentation", "optimizer", "lr", "lr_scaling", "weight_decay")


def recipe(rule: str, **given) -> dict:
    config = resolve(rule, "cifar10", given)
    return {name: getattr(config, name) for name in RECIPE}


def test_losses_of_labels_have_the_recipe_of_supervised_networks_and_losses_of_views_the_presets():
    """So that a rule and its control differ in the rule alone."""
    preset = {name: PRESETS["cifar10"][name] for name in RECIPE}
    assert recipe("greedy_supervised") == recipe("end_to_end", objective="cross_entropy") == SUPERVISED
    assert recipe("deep_supervision", objective="barlow_twins") == recipe("blockwise") == preset
    assert recipe("interlocking", objective="simclr") == recipe("predsim", objective="vicreg") == preset
    assert recipe("interlocking") == SUPERVISED | {"lr_scaling": "none", "weight_decay": 2e-4}
    mixed = recipe("blockwise", objective="cross_entropy,simclr,simclr,simclr")
    assert mixed == preset, "views of a loss that compares them are needed"
    assert recipe("greedy_supervised", lr=0.3, augmentation="small") == SUPERVISED | {
        "lr": 0.3,
        "augmentation": "small",
    }
