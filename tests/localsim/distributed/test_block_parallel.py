"""Stages spread over 2 and 4 processes, each pair of which may share batches, learn what they learn in one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from processes import on_processes, small_backbone
from test_data_parallel import IMAGES, SMALL, images, largest_difference, share

from localsim import engine
from localsim.assembly import build
from localsim.credit import Credit
from localsim.data import Batch
from localsim.distributed.team import Team, join
from localsim.network import LocalNetwork
from localsim.placement import place_stages

STEPS = 50
# two rows that are proportional below the third stage but for rounding
PROPORTIONAL = Credit([[1, 0, 0, 0], [0.4, 0.9, 1, 0], [0.12, 0.27, 0.3, 1]], (0, 2, 3))
CASES: dict[str, dict[str, Any]] = {
    "reach 1": {"rule": "blockwise"},
    "loco": {"rule": "loco"},
    "deep supervision": {"rule": "deep_supervision"},
    "backpropagation": {"rule": "interlocking", "reach": 4},
    "feedback from the top": {"rule": "clapp_dfb"},
    "the images above": {"rule": "infopro"},
    "proportional credit": {"credit": PROPORTIONAL.to_config()},
    "direct feedback": {"rule": "loco", "transport": "direct_feedback", "readout": "global", "noise": "none"},
}


def make(case: str, dtype: torch.dtype = torch.float64) -> LocalNetwork:
    return build(backbone=small_backbone(), granularity=4, **SMALL | CASES[case]).to(dtype).train()


def descend(net: LocalNetwork) -> engine.Hooks:
    """Return hooks that take a step of plain gradient descent wherever gradients are final."""

    def step(parameters: list[torch.nn.Parameter]) -> None:
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
                    parameter.grad = None

    return engine.Hooks(on_final=step)


def kept(net: LocalNetwork) -> dict[str, Any]:
    return {name: value.numpy() for name, value in net.state_dict().items() if not value.is_meta}


@cache
def alone(case: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    net = make(case, dtype)
    views, labels = share(0, 1, dtype)
    for step in range(STEPS):
        engine.backward(net, *views, labels=labels, key=step, hooks=descend(net))
    return kept(net)


def batches(team: Team, dtype: torch.dtype) -> Any:
    if team.relay is not None and team.relay.below is not None:
        return team.relay.epoch(0)
    views, labels = share(team.copy, team.copies, dtype)
    return iter(lambda: Batch(tuple(views), labels, torch.arange(len(labels))), None)


def spread(rank: int, size: int, cases: list[str], groups: int, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    found = {}
    for case in cases:
        net = make(case, dtype)
        with join(60) as team:
            team.groups = place_stages([1.0] * 4, groups)
            team.copies = size // groups
            team.copy = rank % team.copies
            team.take_part(net)
            relay = team.relay
            assert relay is not None
            hooks = descend(net)
            hooks = engine.Hooks(on_stage=relay.on_stage, on_final=hooks.on_final)
            for step, batch in zip(range(STEPS), batches(team, dtype), strict=False):
                assert team.begin(batch, False, False) == IMAGES
                engine.backward(
                    net,
                    *batch.views,
                    labels=batch.labels,
                    key=step,
                    hooks=hooks,
                    start=relay.start,
                    stop=team.stages.stop,
                    peers=team.peers,
                    links=relay,
                )
            team.finish()
        found[case] = kept(net)
    return found


def together(parts: list[dict[str, dict[str, Any]]], case: str) -> dict[str, Any]:
    """Return the state of the whole network; processes that have the same part must agree to the last bit."""
    whole: dict[str, Any] = {}
    for part in parts:
        for name, value in part[case].items():
            assert name not in whole or (whole[name] == value).all(), name
            whole[name] = value
    return whole


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_fifty_steps_give_the_weights_of_one_process(processes):
    """In float64; where nothing comes down, to the last bit."""
    parts = on_processes(processes, spread, list(CASES), processes, torch.float64)
    for case in CASES:
        expected, found = alone(case), together(parts, case)
        assert largest_difference(expected, found) < 1e-9, case
    assert largest_difference(alone("reach 1"), together(parts, "reach 1")) == 0
    sizes = [sum(value.size for value in part["reach 1"].values()) for part in parts]
    assert sum(sizes) == sum(value.size for value in together(parts, "reach 1").values())


def test_both_ways_of_dividing_go_together():
    cases = ["reach 1", "loco", "feedback from the top"]
    parts = on_processes(4, spread, cases, 2, torch.float64)
    for case in cases:
        assert largest_difference(alone(case), together(parts, case)) < 1e-9, case


def test_what_the_boundary_gradients_carry_matters():
    """Were LoCo's signals lost at the border, the weights would differ by more than the tests above allow."""
    net = make("loco")
    cut = net.credit.matrix.copy()
    cut[1, :2] = 0  # the tap on the third stage, the first above the border
    net.credit = Credit(cut, net.credit.taps)
    views, labels = images()
    for step in range(STEPS):
        engine.backward(net, *views, labels=labels, key=step, hooks=descend(net))
    assert largest_difference(alone("loco"), kept(net)) > 1e-6
