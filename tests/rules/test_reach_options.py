"""Transport and provenance change how a tap's gradient is made, never which stages it changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import SMALL, refusal, small, step

from localsim.assembly import build
from localsim.credit import Credit
from localsim.network import LocalNetwork

REACHES = ["end_to_end", "loco", "chunked", "interlocking", "deep_supervision", "man", "clapp", "clapp_dfb"]
TRANSPORTS = ["feedback_alignment", "sign_symmetric", "direct_feedback"]


def assert_reach(net: LocalNetwork, *, heads_learn: bool = True) -> None:
    """Assert that every tap changes the stages of its row, all layers of them, its own head, and nothing else."""
    matrix, taps = net.credit.matrix, net.credit.taps
    for index, tap in enumerate(net.taps):
        alone = LocalNetwork(
            list(net.stages), [tap], Credit(matrix[[index]], (taps[index],)),
            patches=net.patches, image_size=16, transport=net.transport,
        )  # fmt: skip
        net.zero_grad(set_to_none=True)
        step(alone)
        changed = {name for name, p in net.named_parameters() if p.grad is not None}
        own = tuple(f"stages.{stage}." for stage in np.flatnonzero(matrix[index]))
        own += (f"taps.{index}.",) if heads_learn else ()
        assert changed == {name for name, _ in net.named_parameters() if name.startswith(own)}, f"tap {index}"
        for stage in np.flatnonzero(matrix[index]):
            assert any(p.grad.any() for p in net.stages[stage].parameters()), f"tap {index}, stage {stage}"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("rule", REACHES)
def test_a_transport_changes_no_reach(rule, transport):
    net = build(rule, preset="quick", **small(rule, transport=transport)).double()
    assert net.transport == transport
    assert_reach(net)


@pytest.mark.parametrize("rule", REACHES)
def test_frozen_heads_learn_nothing_and_stages_still_do(rule):
    net = build(rule, preset="quick", **small(rule, provenance="frozen")).double()
    assert not any(p.requires_grad for p in net.taps.parameters())
    before = {name: p.clone() for name, p in net.taps.named_parameters()}
    assert_reach(net, heads_learn=False)
    assert all(torch.equal(p, before[name]) for name, p in net.taps.named_parameters())
    private = build(rule, preset="quick", **small(rule)).double()
    assert all(torch.equal(p, before[name]) for name, p in private.taps.named_parameters()), "the same draw, frozen"


@pytest.mark.parametrize("transport", ["feedback_alignment", "direct_feedback"])
def test_frozen_heads_under_a_transport(transport):
    net = build("loco", preset="quick", **SMALL, provenance="frozen", transport=transport).double()
    assert_reach(net, heads_learn=False)


@pytest.mark.parametrize(
    "given",
    [
        {"rule": "blockwise"},
        {"rule": "predsim", "cuts": "layer1.1,layer1.2"},
        {"rule": "clapp", "cuts": "layer1.1,layer1.2", "patches": "8:4"},
    ],
    ids=lambda given: given["rule"],
)
def test_heads_are_private_or_copies_of_one_draw(given):
    private, identical = (build(**given, preset="quick", **SMALL, provenance=kind) for kind in ("private", "identical"))
    # the lowest two heads have one shape, whatever the width of the stage
    own, other = (dict(tap.head.named_parameters()) for tap in list(identical.taps)[:2])
    drawn = {name for name, p in own.items() if p.dim() > 1 and p.any()}
    assert drawn
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
    apart = [dict(tap.head.named_parameters()) for tap in list(private.taps)[:2]]
    assert not any(torch.equal(apart[0][name], apart[1][name]) for name in drawn)
    with torch.no_grad():
        for p in own.values():
            p.add_(1)
    assert not any(torch.equal(own[name], other[name]) for name in drawn), "identical at the start, but not shared"


@pytest.mark.parametrize(
    "given",
    [{"transport": "feedback_alignment"}, {"provenance": "frozen"}, {"schedule": "sequential"}, {"head": "none"},
     {"objective_options": {}}, {"head_options": {}}, {"feature_cache": True}, {"view_strength": "receptive_field"}],
    ids=lambda given: next(iter(given)),
)  # fmt: skip
def test_the_untrained_network_takes_nothing_of_losses(given):
    ((name, value),) = given.items()
    said = refusal("untrained", **given)
    assert said == f"--{name.replace('_', '-')} {value} has no meaning for rule untrained: it has no loss"
