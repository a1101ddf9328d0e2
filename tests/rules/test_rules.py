"""Every rule changes exactly what its credit matrix declares, from one and the same initialisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from localsim import engine
from localsim.assembly import build
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.network import LocalNetwork
from localsim.presets import resolve
from localsim.rules import get_rule, rules

SMALL = {
    "preset": "quick",
    "backbone": "resnet20",
    "image_size": 16,
    "projector": [8, 8],
    "expand_width": 8,
    "zero_init_residual": False,  # with zero gains the weights inside a residual branch get a gradient of zero
}
LEARNING = sorted(name for name, rule in rules.items() if rule.credit(4).num_taps)


def small(rule: str, **settings) -> LocalNetwork:
    return build(rule, **{**SMALL, **settings}).double()


def views(num_images: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(num_images, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2)]


def trunk(net: LocalNetwork) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.trunk_state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# -- reach ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", LEARNING)
def test_every_tap_changes_exactly_the_stages_of_its_row(rule):
    net = small(rule)
    matrix, taps = net.credit.matrix, net.credit.taps
    for index, tap in enumerate(net.taps):
        alone = LocalNetwork(list(net.stages), [tap], Credit(matrix[[index]], (taps[index],)))
        net.zero_grad(set_to_none=True)
        engine.backward(alone, *views(), labels=torch.arange(4), key=3)
        changed = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
        touched = {name for name, p in net.named_parameters() if p.grad is not None}
        own = (*(f"stages.{stage}." for stage in np.flatnonzero(matrix[index])), f"taps.{index}.")
        declared = {name for name, _ in net.named_parameters() if name.startswith(own)}
        assert changed == touched == declared, f"tap {index} of {rule}"


@pytest.mark.parametrize(
    ("rule", "num_stages", "matrix"),
    [
        ("blockwise", 3, np.eye(3)),
        ("layerwise", 10, np.eye(10)),
        ("end_to_end", 3, np.ones((1, 3))),
        ("untrained", 3, np.zeros((0, 3))),
    ],
)
def test_matrices_on_resnet20(rule, num_stages, matrix):
    net = small(rule)
    assert len(net.stages) == num_stages
    np.testing.assert_array_equal(net.credit.matrix, matrix)
    assert [tap.stage for tap in net.taps] == list(range(num_stages - len(matrix), num_stages))


def test_the_untrained_network_learns_nothing():
    net = small("untrained")
    assert engine.backward(net, *views()) == {}
    assert all(p.grad is None for p in net.parameters())


def test_blockwise_with_four_stages_cuts_resnet50_as_published():
    net = build("blockwise", preset="quick", granularity=4, backbone="resnet50", projector=[4], expand_width=4)
    assert [stage.name for stage in net.stages] == [
        "stem..layer1.2",
        "layer2.0..layer2.3",
        "layer3.0..layer3.5",
        "layer4.0..layer4.2",
    ]
    assert net.units_per_stage == [4, 4, 6, 3]
    assert net.credit == Credit.blockwise(4)


def test_layerwise_is_one_unit_block_per_stage():
    net = small("layerwise")
    assert net.units_per_stage == [1] * 10
    names = [f"layer{layer}.{block}" for layer in (1, 2, 3) for block in range(3)]
    assert [stage.name for stage in net.stages] == ["stem", *names]


@pytest.mark.parametrize(("rule", "num_stages"), [("blockwise", 3), ("layerwise", 10)])
@pytest.mark.parametrize("reach", [1, 2, 3])
def test_reach_gives_the_banded_matrix(rule, num_stages, reach):
    band = np.tril(np.ones((num_stages, num_stages))) - np.tril(np.ones((num_stages, num_stages)), -reach)
    np.testing.assert_array_equal(small(rule, reach=reach).credit.matrix, band)


def test_a_matrix_of_ones_own_takes_the_rules_place():
    credit = Credit(np.array([[0.5, 2.0, 0.0]]), (1,))
    net = small("blockwise", credit=credit)
    assert net.credit == credit
    assert [tap.stage for tap in net.taps] == [1]


# -- initialisation ---------------------------------------------------------------------------------------------------


def test_all_rules_of_one_seed_start_from_the_same_trunk():
    first = trunk(small("blockwise"))
    for rule in rules:
        assert_same(trunk(small(rule)), first)
    assert_same(trunk(small("blockwise", granularity=5, readout="global", noise="none", projector=[4])), first)
    other = trunk(small("blockwise", seed=1))
    assert not torch.equal(other["conv1.weight"], first["conv1.weight"])


def test_projectors_are_private_or_copies_of_one_draw():
    private, identical = (small("blockwise", projector_init=init) for init in ("private", "identical"))
    first, *others = (tap.head.state_dict() for tap in identical.taps)
    for other in others:
        assert_same(other, first)
    heads = [tap.head[0].weight for tap in private.taps]
    assert not any(torch.equal(heads[i], heads[j]) for i in range(3) for j in range(i))
    readouts = [tap.readout.conv.weight for tap in identical.taps]
    assert not torch.equal(readouts[0], readouts[1][:, :16]), "only the projectors are copies, not the readouts"
    with torch.no_grad():
        identical.taps[0].head[0].weight.zero_()
    assert identical.taps[1].head[0].weight.any(), "identical at the start, but not shared"


def test_building_leaves_torchs_generator_as_it_was():
    before = torch.get_rng_state()
    small("blockwise")
    assert torch.equal(torch.get_rng_state(), before)


# -- what has no meaning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "option", "value", "reason"),
    [
        ("end_to_end", "reach", 2, "its one loss always reaches every stage; use --rule blockwise --reach N"),
        ("layerwise", "granularity", 4, "it is one unit block per stage; use --rule blockwise --granularity N"),
        ("layerwise", "cuts", "layer2.0", "it is one unit block per stage; use --rule blockwise --cuts ..."),
        ("untrained", "reach", 2, "it has no loss"),
        ("untrained", "objective", "barlow_twins", "it has no loss"),
        ("untrained", "readout", "global", "it has no loss"),
        ("untrained", "noise", "all:0.25", "it has no loss"),
    ],
)
def test_meaningless_overrides_are_refused(rule, option, value, reason):
    with pytest.raises(UserError) as error:
        resolve(rule, "quick", {option: value})
    assert str(error.value) == f"--{option} {value} has no meaning for rule {rule}: {reason}"
    assert resolve(rule, "quick", {option: None}) == resolve(rule, "quick"), "None counts as not given"


def test_the_untrained_network_takes_no_credit_matrix():
    with pytest.raises(UserError, match="has no meaning for rule untrained: it has no loss"):
        build("untrained", preset="quick", credit=Credit.blockwise(4))


def test_unknown_rules_are_named():
    with pytest.raises(UserError, match=f"^unknown rule 'loca'; allowed: {', '.join(rules)}$"):
        get_rule("loca")


def test_every_rule_goes_by_its_own_name():
    for name, rule in rules.items():
        assert rule.name == name
        assert get_rule(name) is rule
        assert rule.summary.endswith(".")


def test_what_does_not_fit_the_backbone_is_named():
    with pytest.raises(UserError, match="reach 4 does not fit 3 stages; allowed: 1 to 3"):
        small("blockwise", reach=4)
    with pytest.raises(UserError, match="readout local8x8 needs maps of 8x8 or more, but a stage's map is 4x4"):
        small("blockwise", readout="local8x8")
    with pytest.raises(UserError, match="the credit matrix has 2 stages but the network has 3"):
        small("blockwise", credit=Credit.blockwise(2))
