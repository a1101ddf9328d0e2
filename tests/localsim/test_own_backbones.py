"""Backbones of one's own: a small network without batch norm, of which localsim knows nothing, used like any other."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import images, through, tiny_config, train_in
from torch import nn

import localsim
from localsim import engine
from localsim.analysis import features
from localsim.analysis.regimes import layers_to_read
from localsim.assembly import build_network
from localsim.backbones import (
    UnitBlock,
    build_backbone,
    receptive_fields,
    register_backbone,
    trace_units,
    trunk_state_dict,
)
from localsim.cost import cost
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.own_backbones import REGISTERED
from localsim.partition import partition
from localsim.runs import load_run


@pytest.fixture(autouse=True)
def mine():
    register_backbone("mine", make, split)


def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(2, outputs), nn.SiLU())


def make() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "first": layer(3, 8, 2),
            "body": nn.Sequential(layer(8, 8), layer(8, 12, 2), layer(12, 12)),
            "last": nn.Conv2d(12, 16, 1),
            "classifier": nn.Linear(16, 10),
        }
    )


def split(model):
    body = model["body"]
    units = [
        UnitBlock("first", [("first", model["first"])]),
        *(UnitBlock(f"body.{place}", [(f"body.{place}", part)]) for place, part in enumerate(body[:2])),
        UnitBlock("end", [("body.2", body[2]), ("last", model["last"])]),
    ]
    return units, [0, 2]


def test_it_is_built_with_its_own_names_and_draws():
    torch.manual_seed(4)
    backbone = build_backbone("mine")
    torch.manual_seed(4)
    model = make()
    assert ([unit.name for unit in backbone.units], backbone.natural_cuts) == (
        ["first", "body.0", "body.1", "end"],
        (0, 2),
    )
    net = localsim.build("blockwise", preset="quick", backbone="mine")
    assert net.units_per_stage == [2, 2]
    left = model.load_state_dict(net.trunk_state_dict(), strict=False)
    assert set(left.missing_keys) == {"classifier.weight", "classifier.bias"} and not left.unexpected_keys
    model.load_state_dict(trunk_state_dict(backbone.units), strict=False)
    x = images()
    expected = model["last"](model["body"](model["first"](x)))
    assert torch.equal(through(backbone.units, x), expected)


def test_seeds_decide_its_weights_and_rules_share_them():
    trunks = [
        build_network(tiny_config(rule, backbone="mine", seed=seed)).trunk_state_dict()
        for rule, seed in (("blockwise", 0), ("end_to_end", 0), ("blockwise", 1))
    ]
    name = "body.1.0.weight"
    assert torch.equal(trunks[0][name], trunks[1][name]) and not torch.equal(trunks[0][name], trunks[2][name])


@pytest.mark.parametrize(
    ("granularity", "cuts", "starts"),
    [(None, "auto", [0, 2]), (3, "auto", [0, 2, 3]), ("block", "auto", [0, 1, 2, 3]), (None, "body.1,end", [0, 2, 3])],
)
def test_it_is_cut_anywhere(granularity, cuts, starts):
    assert [stage.start for stage in partition(build_backbone("mine"), granularity, cuts)] == starts


def test_balanced_cuts_and_cost_know_its_maps():
    assert len(partition(build_backbone("mine"), 2, "balanced", image_size=32)) == 2
    predicted = cost(tiny_config(backbone="mine", granularity="block"))
    assert predicted.units == (1, 1, 1, 1) and predicted.gradient_path == 1 and predicted.held_bytes > 0


@settings(deadline=None, max_examples=6)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=6, max_size=6),
    st.sampled_from([(None, "body.0,end"), (3, "auto")]),
)
def test_the_engine_gives_the_gradients_of_plain_autograd(entries, cut):
    """Each tap's gradient by a graph of its own, weighted and summed by the definition of the matrix."""
    matrix = np.zeros((3, 3))
    matrix[np.tril_indices(3)] = entries
    credit = Credit(matrix, (0, 1, 2))
    config = tiny_config(
        backbone="mine", granularity=cut[0], cuts=cut[1], credit=credit.to_config(), noise="none", readout="global",
        objective="vicreg",
    )  # fmt: skip
    net = build_network(config).double()
    views = [images(6, 16).double(), images(7, 16)[1:].double()]
    engine.backward(net, *views, key=0)
    for stage_index, stage in enumerate(net.stages):
        weights = list(stage.parameters())
        expected = [torch.zeros_like(w) for w in weights]
        for tap_index, tap in enumerate(net.taps):
            embeddings = tuple(tap(through(list(net.stages)[: tap.stage + 1], view)) for view in views)
            found = torch.autograd.grad(tap.objective(embeddings, None), weights, allow_unused=True)
            for total, grad in zip(expected, found, strict=True):
                if grad is not None:
                    total += matrix[tap_index, stage_index] * grad
        for weight, total in zip(weights, expected, strict=True):
            got = torch.zeros_like(weight) if weight.grad is None else weight.grad
            torch.testing.assert_close(got, total, rtol=1e-10, atol=1e-12)


def test_a_run_of_it_is_trained_resumed_read_and_not_opened_without_it(tmp_path):
    path = tmp_path / "run"
    chosen = {"backbone": "mine", "granularity": "block", "readout": "global", "epochs": 1}
    train_in(path, max_steps=2, **chosen)
    trained = train_in(path, **chosen)
    run = load_run(path)
    assert run.step == 5
    opened = run.network().trunk_state_dict()
    assert all(torch.equal(value, trained.trunk_state_dict()[name]) for name, value in opened.items())
    assert layers_to_read(run, "ends") == {"units": ["body.0", "end"]}
    found = features(run, torch.rand(5, 3, 16, 16), **layers_to_read(run, "ends"))
    assert {name: found[name].shape for name in found} == {"body.0": (5, 8), "end": (5, 16)}
    within = features(run, torch.rand(5, 3, 16, 16), modules=["body.2.0", "last"])
    assert {name: within[name].shape for name in within} == {"body.2.0": (5, 12), "last": (5, 16)}
    del REGISTERED["mine"]
    with pytest.raises(UserError, match=r"^unknown backbone 'mine'; allowed: .*resnet18.*; one of your own is regis"):
        run.network()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"stem": "cifar"},
            "stem 'cifar' has no meaning for mine, which begins with a stem of your own; allowed: imag",
        ),
        ({"width": 0.5}, "width 0.5 has no meaning for mine, whose channels are fixed; allowed: 1"),
    ],
)
def test_settings_of_localsims_networks_are_refused(options, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        build_backbone("mine", **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet50", make, split), "the name 'resnet50' is taken by a backbone of localsim; choose another"),
        (("my/net", make, split), "the backbone is called 'my/net'; allowed: letters, digits, _ and -"),
        (("net", make(), split), "backbone net: make must be a function, not an object of type ModuleDict"),
    ],
)
def test_what_cannot_be_registered_is_refused(arguments, message):
    before = dict(REGISTERED)
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        register_backbone(*arguments)
    assert before == REGISTERED


def test_a_name_belongs_to_the_module_that_registered_it():
    def edited(model):
        return split(model)

    def foreign(model):
        return split(model)

    register_backbone("mine", make, edited)  # as a file that is executed again does
    assert REGISTERED["mine"][1] is edited
    foreign.__module__ = "localsim_rule_other"
    with pytest.raises(UserError, match=r"^the name 'mine' is taken by a backbone of \S*test_own_backbones; choose an"):
        register_backbone("mine", make, foreign)


def unit(name: str, *parts: nn.Module) -> UnitBlock:
    return UnitBlock(name, [(f"{name}.{place}", part) for place, part in enumerate(parts)])


CONV = nn.Conv2d(3, 3, 1)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (([], [0]), "backbone net: split must return unit blocks (UnitBlock), one or more, not ()"),
        (([CONV], [0]), "backbone net: split must return unit blocks (UnitBlock), one or more, not (Conv2d("),
        ([unit("a", CONV)], "backbone net cannot be built: ValueError: not enough values to unpack"),
        (([unit("a", CONV), unit("a", nn.ReLU())], [0]), "backbone net: two unit blocks are called a; every one needs"),
        (([unit("a", CONV), unit("b", nn.ReLU())], [1]), "backbone net: the natural stages begin at [1]; allowed: 0, "),
        (([unit("a", CONV), unit("b", nn.ReLU())], [0, 2]), "backbone net: the natural stages begin at [0, 2]; allow"),
        (([unit("a", CONV)], []), "backbone net: the natural stages begin at []; allowed: 0, then rising indices"),
        (([unit("a", CONV), unit("b", CONV)], [0]), "backbone net: two unit blocks share weights; a loss could not"),
        (([UnitBlock("a", [("x", nn.Conv2d(3, 3, 1))]), UnitBlock("b", [("x", nn.Conv2d(3, 3, 1))])], [0]),
         "backbone net: two weights are called x.weight; every part of a unit block needs its own name"),
    ],
)  # fmt: skip
def test_what_is_no_backbone_is_told(returned, message):
    register_backbone("net", lambda: nn.Identity(), lambda model: returned)
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        build_backbone("net")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([nn.Flatten()], "unit block a of net gives (2, 3072) for 2 images; allowed: square maps (images, "),
        ([nn.Conv2d(3, 4, (1, 3))], "unit block a of net gives (2, 4, 32, 30) for 2 images; allowed: square maps"),
        ([nn.Linear(7, 7)], "images of 32 px do not pass net: a cannot run on a map of 32 x 32 (RuntimeError: "),
    ],
)  # fmt: skip
def test_unit_blocks_that_give_no_maps_are_told(parts, message):
    register_backbone("net", lambda: nn.Identity(), lambda model: ([unit("a", *parts)], [0]))
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        trace_units(build_backbone("net"), 32)


@pytest.mark.parametrize(
    ("part", "kind"), [(nn.AvgPool2d(2), "AvgPool2d"), (nn.Conv2d(3, 3, 3, dilation=2, padding=2), "Conv2d")]
)
def test_receptive_fields_that_are_not_known_are_refused(part, kind):
    assert receptive_fields(build_backbone("mine").units) == [3, 7, 11, 19]
    register_backbone("net", lambda: nn.Identity(), lambda model: ([unit("a", part)], [0]))
    message = f"the receptive field of unit block a is not known, for it has a {kind}; allowed: convolutions and max-"
    with pytest.raises(UserError, match=f"^{message}"):
        receptive_fields(build_backbone("net").units)
