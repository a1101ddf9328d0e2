"""Every objective under every rule, and taps that differ in objective, head and readout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import SMALL, refusal, small, step

from localsim.assembly import build, build_network
from localsim.network import LocalNetwork
from localsim.presets import resolve
from localsim.rules import own_rules
from localsim.rules.objectives import OBJECTIVES

NAMES = [rule.name for rule in own_rules()]
# what an objective brings with it: head and readout under a rule that has no head of its own
OWN = {
    "barlow_twins": ("projector", "global"),
    "vicreg": ("projector", "global"),
    "simclr": ("projector", "global"),
    "supcon": ("projector", "global"),
    "infonce": ("predictor", "patches"),
    "hinge": ("predictor", "patches"),
    "lpl": ("none", "global"),
    "cross_entropy": ("classifier", "global"),
    "predsim": ("predsim", "map"),
    "infopro": ("infopro", "map"),
}


# -- every objective under every rule ---------------------------------------------------------------------------------


def test_the_table_has_every_objective():
    assert set(OWN) == set(OBJECTIVES)


@pytest.mark.parametrize("objective", OWN)
@pytest.mark.parametrize("rule", NAMES)
def test_every_objective_under_every_rule(rule, objective):
    if rule == "untrained":
        said = refusal(rule, objective=objective)
        assert said == f"--objective {objective} has no meaning for rule untrained: it has no loss"
        return
    config = resolve(rule, "quick", small(rule, objective=objective))
    assert config.objective == objective
    net = build_network(config)
    losses = step(net)
    assert sorted(losses) == list(range(net.credit.num_taps))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(type(tap.objective) is OBJECTIVES[objective] for tap in net.taps)
    reached = np.flatnonzero(net.credit.matrix.any(axis=0))
    for stage in reached:
        assert any(p.grad is not None and p.grad.any() for p in net.stages[stage].parameters()), f"stage {stage}"


def test_clapp_dfb_takes_infonce_between_views():
    """Without being told: the head predicts another view and says so."""
    config = resolve("clapp_dfb", "quick", small("clapp_dfb", objective="infonce"))
    assert config.objective_options == {"pair": "views"} and config.views == 2
    assert config.head == "feedback_predictor"
    assert all(torch.isfinite(loss) for loss in step(build_network(config)).values())


@pytest.mark.parametrize("objective", OWN)
def test_objectives_bring_head_and_readout_where_the_rule_has_none(objective):
    config = resolve("end_to_end", "quick", {"objective": objective})
    assert (config.head, config.readout) == OWN[objective]
    assert config.patches == ("16:8" if OWN[objective][1] == "patches" else "none")
    (tap,) = build_network(resolve("end_to_end", "quick", small("end_to_end", objective=objective))).taps
    assert tap.stage == 2


def test_the_command_of_the_readme():
    """`--rule blockwise --objective vicreg --reach 2 --granularity 8` just works."""
    config = resolve("blockwise", "quick", {**SMALL, "objective": "vicreg", "reach": 2, "granularity": 8})
    net = build_network(config)
    np.testing.assert_array_equal(net.credit.matrix, np.eye(8) + np.eye(8, k=-1))
    assert len(step(net)) == 8


# -- one per tap ------------------------------------------------------------------------------------------------------


def kinds(net: LocalNetwork) -> list[tuple[str, str, str]]:
    return [(type(tap.objective).__name__, type(tap.head).__name__, type(tap.readout).__name__) for tap in net.taps]


def test_every_tap_has_its_own_objective_and_that_ones_head():
    net = build("blockwise", preset="quick", **SMALL, objective="barlow_twins,vicreg,simclr")
    assert kinds(net) == [(name, "Projector", "Expand") for name in ("BarlowTwins", "VICReg", "SimCLR")]
    net = build("blockwise", preset="quick", **SMALL, objective="lpl, infopro, cross_entropy")
    assert kinds(net) == [("LPL", "NoHead", "Expand"), ("InfoPro", "InfoPro", "Map"),
                          ("CrossEntropy", "Classifier", "Expand")]  # fmt: skip
    assert len(step(net)) == 3
    net = build("blockwise", preset="quick", **SMALL, objective="simclr,infonce,supcon", patches="8:4")
    assert [objective for objective, _, _ in kinds(net)] == ["SimCLR", "InfoNCE", "SupCon"]
    assert all(torch.isfinite(loss) for loss in step(net).values())


def test_heads_and_readouts_are_listed_too():
    net = build("blockwise", preset="quick", **SMALL, objective="cross_entropy", head="mirrored,classifier,next_stage",
                readout="map,local2x2,map")  # fmt: skip
    assert kinds(net) == [("CrossEntropy", "Mirrored", "Map"), ("CrossEntropy", "Classifier", "LocalPool"),
                          ("CrossEntropy", "NextStage", "Map")]  # fmt: skip
    assert len(step(net)) == 3
    (tap, *_) = build("blockwise", preset="quick", **SMALL, objective="cross_entropy", head="mirrored").taps
    assert tap.readout.kind == "map", "an explicit head brings its readout along"
