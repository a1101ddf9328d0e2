"""Where heads and options come from, and what does not fit together."""

from __future__ import annotations

import dataclasses

import pytest
from small import SMALL, refusal

from localsim.assembly import build
from localsim.backbones import UnitBlock
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.presets import resolve
from localsim.rules.choices import choose
from localsim.rules.objectives import OBJECTIVES
from localsim.rules.rule import Rule

# -- what stays of the rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "objective", "head", "readout"),
    [
        ("blockwise", "simclr", "projector", "expand"),
        ("blockwise", "predsim", "predsim", "map"),
        ("auglocal", "simclr", "mirrored", "map"),  # a head that ends in whatever the objective reads
        ("auglocal", "infonce", "predictor", "patches"),
        ("man", "vicreg", "next_stage", "map"),
        ("predsim", "simclr", "projector", "global"),
        ("infopro", "cross_entropy", "classifier", "global"),
        ("clapp", "simclr", "projector", "global"),
        ("clapp", "infonce", "predictor", "patches"),
        ("clapp_dfb", "infonce", "feedback_predictor", "global"),
    ],
)
def test_a_rules_head_and_readout_stay_as_far_as_they_fit(rule, objective, head, readout):
    config = resolve(rule, "quick", {"objective": objective})
    assert (config.head, config.readout) == (head, readout)


@pytest.mark.parametrize(
    ("rule", "given", "options"),
    [
        ("clapp", {}, {"sampling": "either"}),
        ("clapp", {"objective": "hinge"}, {"sampling": "either"}),
        ("clapp", {"objective": "hinge,hinge"}, {"sampling": "either"}),
        ("clapp", {"objective": "infonce"}, {}),
        ("clapp", {"objective": "hinge,infonce"}, {}),
        ("clapp", {"objective": "infonce", "objective_options": {"skip": 0}}, {"skip": 0}),
        ("clapp", {"objective_options": {"skip": 0}}, {"sampling": "either", "skip": 0}),
        ("infopro", {}, {"reconstruction": {"from": 1.0, "to": 0.0}}),
        ("infopro", {"objective": "cross_entropy"}, {}),
    ],
)
def test_a_rules_options_go_with_its_objective(rule, given, options):
    assert resolve(rule, "quick", given).objective_options == options


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {"hidden": [4]}),
        ({"head": "classifier"}, {"hidden": [4]}),
        ({"readout": "local2x2"}, {"hidden": [4]}),
        ({"head": "mirrored", "readout": "map"}, {}),
        ({"objective": "simclr"}, {}),
    ],
)
@pytest.mark.parametrize("head", [None, "classifier"])
def test_a_rules_head_options_go_with_its_head(head, given, options):
    rule = Rule(
        name="own", summary=".", paper=".", credit=Credit.banded, objective="cross_entropy", head=head,
        settings={"head_options": {"hidden": [4]}},
    )  # fmt: skip
    assert {**rule.settings, **choose(rule, given)}["head_options"] == options


def test_a_default_head_that_a_rule_names_goes_with_its_objective():
    """Named or not: a classifier is no projector, and a projector of 8 no classifier of 10 classes."""
    plain = Rule(name="own", summary=".", paper=".", credit=Credit.banded, objective="simclr")
    for rule in (plain, dataclasses.replace(plain, head="projector")):
        assert choose(rule, {"objective": "cross_entropy"})["head"] == "classifier"
    without = dataclasses.replace(plain, head="none")
    assert choose(without, {"objective": "vicreg"})["head"] == "none"
    assert choose(without, {"objective": "cross_entropy"})["head"] == "classifier"
    supervised = dataclasses.replace(plain, objective="cross_entropy", head="classifier")
    assert choose(supervised, {"objective": "simclr"})["head"] == "projector"


def test_a_rule_may_list_its_objectives():
    rule = Rule(name="own", summary=".", paper=".", credit=Credit.banded, objective="simclr,lpl,vicreg")
    chosen = choose(rule, {})
    assert (chosen["objective"], chosen["head"], chosen["readout"]) == (
        "simclr,lpl,vicreg", "projector,none,projector", "global",
    )  # fmt: skip
    assert choose(rule, {"objective": "cross_entropy"})["head"] == "classifier"


@pytest.mark.parametrize(("name", "value"), [("objective", "mse"), ("head", "brain")])
def test_unknown_names_of_a_rule_are_told(name, value):
    rule = Rule(name="own", summary=".", paper=".", credit=Credit.banded, **{name: value})
    with pytest.raises(UserError, match=f"^unknown {name} '{value}'; allowed: "):
        choose(rule, {})


# -- patches ----------------------------------------------------------------------------------------------------------


def test_images_are_cut_into_patches_for_taps_that_read_patches():
    assert resolve("blockwise", "quick", {"objective": "hinge"}).patches == "16:8"
    assert resolve("blockwise", "quick", {"objective": "hinge", "patches": "8:4"}).patches == "8:4"
    assert resolve("blockwise", "quick", {"head": "predictor", "objective": "hinge"}).patches == "16:8"
    assert resolve("blockwise", "quick", {"objective": "simclr,simclr,simclr,infonce"}).patches == "16:8"
    assert resolve("blockwise", "quick", {"objective": "simclr"}).patches == "none"


def test_a_rules_patches_are_dropped_for_heads_of_whole_images():
    assert resolve("clapp", "quick").patches == "16:8"
    assert resolve("clapp", "quick", {"objective": "lpl"}).patches == "16:8", "the mean over patches has a meaning"
    assert resolve("clapp", "quick", {"objective": "predsim"}).patches == "none"
    assert resolve("clapp", "quick", {"head": "feedback_predictor"}).patches == "none"


def test_whole_images_and_patches_at_once_are_refused():
    said = "head {} needs whole images, but patches is {}; allowed: none"
    assert refusal("clapp", objective="predsim", patches="8:4") == said.format("predsim", "8:4")
    assert refusal("clapp_dfb", patches="8:4") == said.format("feedback_predictor", "8:4")
    assert refusal("blockwise", objective="hinge,infopro,simclr") == said.format("infopro", "16:8")
    assert refusal("blockwise", objective="hinge", patches="none") == (
        "readout patches needs images cut into patches, e.g. --set patches=16:8"
    )


# -- options per tap ---------------------------------------------------------------------------------------------------


def test_options_of_a_list_go_by_name():
    options = {"simclr": {"temperature": 0.3}, "vicreg": {"sim_weight": 2.0}}
    net = build("blockwise", preset="quick", **SMALL, objective="simclr,vicreg,lpl", objective_options=options)
    assert [tap.objective for tap in net.taps] == [
        OBJECTIVES["simclr"](temperature=0.3), OBJECTIVES["vicreg"](sim_weight=2.0), OBJECTIVES["lpl"](),
    ]  # fmt: skip
    net = build("blockwise", preset="quick", **SMALL, objective="cross_entropy", head="classifier,mirrored,mirrored",
                head_options={"classifier": {"hidden": [5]}, "mirrored": {"depth": 1}})  # fmt: skip
    assert net.taps[0].head[0].out_features == 5
    assert sum(isinstance(block, UnitBlock) for block in net.taps[1].head.blocks) == 1


def test_options_run_from_the_lowest_tap_to_the_highest():
    ramp = {"temperature": {"from": 0.2, "to": 1}}
    net = build("blockwise", preset="quick", **SMALL, objective="simclr", objective_options=ramp)
    assert [tap.objective.temperature for tap in net.taps] == pytest.approx([0.2, 0.6, 1.0])
    (tap,) = build("end_to_end", preset="quick", **SMALL, objective="simclr", objective_options=ramp).taps
    assert tap.objective.temperature == 1.0, "an only tap is the highest"
    nested = {"simclr": ramp}
    net = build("blockwise", preset="quick", **SMALL, objective="simclr,vicreg,simclr", objective_options=nested)
    assert [net.taps[tap].objective.temperature for tap in (0, 2)] == pytest.approx([0.2, 1.0])
    net = build("man", preset="quick", **SMALL, head_options={"momentum": {"from": 0.5, "to": 0.9}})
    assert [tap.head.momentum for tap in net.taps] == pytest.approx([0.5, 0.7, 0.9])


OBJECTIVES_ALLOWED = ", ".join(OBJECTIVES)
LIST = "; allowed: a name, or one per tap, comma-separated, from the lowest up"
RAMP = '; allowed: a value, or {"from": number, "to": number}'


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"objective": "vicreg,simclr"}, "2 objectives are listed, but there are 3 taps; give one, or one per tap"),
        ({"objective": "simclr,simclr"}, "2 objectives are listed, but there are 3 taps; give one, or one per tap"),
        ({"head": "none,none,none,none"}, "4 heads are listed, but there are 3 taps; give one, or one per tap"),
        ({"readout": "global,expand"}, "2 readouts are listed, but there are 3 taps; give one, or one per tap"),
        ({"objective": "lpl,mse,lpl"}, f"unknown objective 'mse'; allowed: {OBJECTIVES_ALLOWED}"),
        ({"objective": "lpl,,lpl"}, f"objective is 'lpl,,lpl'{LIST}"),
        ({"objective": "lpl,"}, f"objective is 'lpl,'{LIST}"),
        ({"objective": ""}, f"objective is ''{LIST}"),
        ({"readout": " "}, f"readout is ' '{LIST}"),
        (
            {"objective": "vicreg,simclr", "head": "projector,projector,none"},
            "2 objectives and 3 heads are listed; give one, or one per tap, of each",
        ),
        (
            {"objective": "simclr,lpl,simclr", "objective_options": {"temperature": 0.5}},
            "options {'temperature': 0.5} are not understood; where taps differ, allowed: options by name, for "
            "simclr, lpl",
        ),
        (
            {"objective": "simclr,lpl,simclr", "objective_options": {"simclr": 0.5}},
            "options {'simclr': 0.5} are not understood; where taps differ, allowed: options by name, for simclr, lpl",
        ),
        (
            {"objective": "simclr,lpl,simclr", "objective_options": {"lpl": {"temperature": 1}}},
            "objective lpl has no option 'temperature'; allowed: pull, push, decorrelation, eps, positives",
        ),
        ({"objective": "simclr", "objective_options": {"heat": 1}},
         "objective simclr has no option 'heat'; allowed: temperature"),
        ({"objective": "simclr", "objective_options": {"temperature": {"from": 1, "until": 2}}},
         f"option temperature of simclr is {{'from': 1, 'until': 2}}{RAMP}"),
        ({"objective": "simclr", "objective_options": {"temperature": {"from": 1}}},
         f"option temperature of simclr is {{'from': 1}}{RAMP}"),
        ({"objective": "simclr", "objective_options": {"temperature": {"from": True, "to": 2}}},
         f"option temperature of simclr is {{'from': True, 'to': 2}}{RAMP}"),
        ({"objective": "simclr", "objective_options": {"temperature": {"from": 1, "to": -1}}},
         "simclr: temperature is -1.0; allowed: numbers > 0"),
        ({"head": "brain"}, "unknown head 'brain'; allowed: projector, none, classifier, "),
        ({"head_options": {"depth": 2}}, "head projector has no option 'depth'; allowed: none"),
        ({"objective": "cross_entropy", "head": "mirrored", "head_options": {"pyramid": {"from": 0, "to": 2}}},
         "mirrored: pyramid is 2.0; allowed: numbers from 0 to 1"),
    ],
)  # fmt: skip
def test_lists_and_options_that_are_not_understood(given, said):
    assert refusal("blockwise", **given).startswith(said)


# -- what does not fit together ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "head", "said"),
    [
        ("simclr", "infopro", "head infopro gives no vector, which objective simclr reads; allowed: projector, none, "
                              "classifier, conv, mirrored, next_stage"),
        ("hinge", "projector", "head projector gives no predictions, which objective hinge reads; allowed: predictor, "
                               "feedback_predictor"),
        ("predsim", "classifier",
         "head classifier gives no similarity, which objective predsim reads; allowed: predsim"),
        ("infopro", "predsim", "head predsim gives no reconstruction, which objective infopro reads; allowed: infopro"),
        ("cross_entropy", "projector", "head projector gives no logits, which objective cross_entropy reads; allowed: "
                                       "classifier, conv, mirrored, next_stage"),
        ("cross_entropy", "none", "head none gives no logits, which objective cross_entropy reads; allowed: "),
        ("simclr,hinge,simclr", "projector", "head projector gives no predictions, which objective hinge reads; "),
        ("simclr", "projector,projector,predsim", "head predsim gives no vector, which objective simclr reads; "),
    ],
)  # fmt: skip
def test_heads_that_do_not_fit_are_refused(objective, head, said):
    assert refusal("blockwise", objective=objective, head=head).startswith(said)


VECTORS = "global, local2x2 (any k x k), expand"


@pytest.mark.parametrize(
    ("rule", "given", "said"),
    [
        ("blockwise", {"readout": "map"},
         f"head projector cannot work on a map, which is what the readout gives; allowed readouts: {VECTORS}"),
        ("blockwise", {"readout": "patches"},
         f"head projector cannot work on patches, which is what the readout gives; allowed readouts: {VECTORS}"),
        ("auglocal", {"readout": "global"},
         "head mirrored cannot work on a vector, which is what the readout gives; allowed readouts: map"),
        ("blockwise", {"objective": "hinge", "readout": "expand"},
         "head predictor cannot work on a vector, which is what the readout gives; allowed readouts: patches"),
        ("blockwise", {"readout": "expand,map,expand"}, "head projector cannot work on a map"),
        ("blockwise", {"readout": "retina"}, f"unknown readout 'retina'; allowed: {VECTORS}"),
    ],
)  # fmt: skip
def test_readouts_that_do_not_fit_are_refused(rule, given, said):
    # patches that are large enough for a predictor, where there are any
    given = {**given, "patches": "8:4"} if resolve(rule, "quick", given).patches != "none" else given
    assert refusal(rule, **given).startswith(said)
