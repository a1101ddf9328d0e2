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
from localsim.rules import get_rule, own_rules, rules

SMALL = {
    "preset": "quick",
    "backbone": "resnet20",
    "image_size": 16,
    "projector": [8, 8],
    "expand_width": 8,
    "zero_init_residual": False,  # with zero gains the weights inside a residual branch get a gradient of zero
}
PATCHED = {name for name, rule in rules.items() if "patches" in rule.settings}
LEARNING = sorted(name for name, rule in rules.items() if rule.credit(4).num_taps)


def small(rule: str, **settings) -> LocalNetwork:
    patches = {"patches": "8:4"} if rule in PATCHED else {}
    return build(rule, **{**SMALL, **patches, **settings}).double()


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
        credit = Credit(matrix[[index]], (taps[index],))
        alone = LocalNetwork(list(net.stages), [tap], credit, patches=net.patches, image_size=16)
        net.zero_grad(set_to_none=True)
        engine.backward(alone, *views(), labels=torch.arange(4), key=3)
        changed = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
        touched = {name for name, p in net.named_parameters() if p.grad is not None}
        stages = tuple(f"stages.{stage}." for stage in np.flatnonzero(matrix[index]))
        declared = {name for name, _ in net.stages.named_parameters(prefix="stages") if name.startswith(stages)}
        own = {name for name, _ in net.named_parameters() if name.startswith(f"taps.{index}.")}
        assert changed - own == touched - own == declared, f"tap {index} of {rule}"
        # all of its readout and head, but for a part that its objective gives no weight (InfoPro's highest decoder)
        assert (not own or changed & own) and all("decoder" in name for name in own - changed), f"tap {index} of {rule}"


@pytest.mark.parametrize(
    ("rule", "num_stages", "matrix"),
    [
        ("untrained", 3, np.zeros((0, 3))),
        ("end_to_end", 3, np.ones((1, 3))),
        ("blockwise", 3, np.eye(3)),
        ("layerwise", 10, np.eye(10)),
        ("lcl", 10, np.eye(10)),
        ("loco", 3, [[1, 1, 0], [0, 1, 1]]),
        ("stopgrad_overlap", 3, [[2, 0, 0], [1, 2, 0], [0, 1, 2]]),
        ("chunked", 3, [[1, 1, 0], [0, 0, 1]]),
        ("interlocking", 3, [[0, 0, 0], [1, 0, 0], [0, 1, 1]]),
        ("deep_supervision", 3, np.tril(np.ones((3, 3)))),
        ("greedy_infomax", 3, np.eye(3)),
        ("clapp", 10, np.eye(10)),
        ("clapp_dfb", 10, np.eye(10)),
        ("lpl", 10, np.eye(10)),
        ("greedy_supervised", 3, np.eye(3)),
        ("predsim", 10, np.eye(10)),
        ("infopro", 3, np.eye(3)),
        ("auglocal", 10, np.eye(10)),
        ("man", 3, np.eye(3)),
    ],
)
def test_matrices_on_resnet20(rule, num_stages, matrix):
    net = small(rule)
    assert len(net.stages) == num_stages
    np.testing.assert_array_equal(net.credit.matrix, matrix)
    taps = range(num_stages - len(matrix), num_stages) if rule != "chunked" else (1, 2)
    assert [tap.stage for tap in net.taps] == list(taps)


def test_the_table_of_matrices_has_every_rule():
    (mark,) = test_matrices_on_resnet20.pytestmark
    assert [row[0] for row in mark.args[1]] == [rule.name for rule in own_rules()]


@pytest.mark.parametrize(
    ("rule", "reach", "credit"),
    [
        ("loco", 3, Credit.overlapping(3, 3)),
        ("chunked", 1, Credit.blockwise(3)),
        ("chunked", 3, Credit.end_to_end(3)),
        ("interlocking", 1, Credit.blockwise(3)),
        ("interlocking", 3, Credit.interlocking(3, 3)),
        ("greedy_supervised", 2, Credit.banded(3, 2)),
    ],
)
def test_reach_means_what_the_rule_makes_of_it(rule, reach, credit):
    assert small(rule, reach=reach).credit == credit


def test_taps_wait_for_the_activity_of_the_highest_stage_under_direct_feedback():
    net = small("clapp_dfb")
    assert {tap.context for tap in net.taps} == {9} and {tap.fires for tap in net.taps} == {9}


def test_one_module_of_greedy_infomax_is_cpc():
    assert small("greedy_infomax", granularity=1).credit == Credit.end_to_end(1)


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
    private, identical = (small("blockwise", provenance=init) for init in ("private", "identical"))
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


def test_heads_of_different_widths_are_copies_where_shapes_agree():
    first, *others = (dict(tap.head.named_parameters()) for tap in small("loco", provenance="identical").taps)
    for other in others:
        assert [name for name in first if first[name].shape != other[name].shape] == ["0.weight"]
        assert all(torch.equal(first[name], other[name]) for name in first if name != "0.weight")


def test_direct_feedback_refuses_errors_of_the_size_of_images():
    with pytest.raises(UserError, match="the embeddings of head infopro have 24,586; allowed: up to 20,000"):
        small("infopro", transport="direct_feedback", image_size=64)


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
    with pytest.raises(
        UserError, match=f"^unknown rule 'loca'; allowed: {', '.join(rules)}; a rule of your own goes by its file"
    ):
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
