"""Feedback weights: what they depend on, how large they are, and what becomes of them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from by_hand import (
    assert_close,
    draw,
    feedback_of,
    install,
    parts_of,
    resnet20_stage,
    small_net,
)
from torch import nn

from localsim.transport import TRANSPORTS, direct_reads


@pytest.mark.parametrize("name", ["feedback_alignment", "direct_feedback"])
def test_feedback_weights_are_a_function_of_seed_and_layer(name):
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        net = install(resnet20_stage(), name, seed)
        with direct_reads():
            net(draw(2, 3, 8, 8, dtype=torch.float32))
        return feedback_of(net)

    first, again, other = drawn(3), drawn(3), drawn(4)
    assert first.keys() == again.keys() == other.keys() and len(first) > 5
    for layer in first:
        assert torch.equal(first[layer], again[layer]) and not torch.equal(first[layer], other[layer])
    alike = [(a, b) for i, a in enumerate(first.values()) for b in list(first.values())[:i] if a.shape == b.shape]
    assert alike and max(abs(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in alike) < 0.5


def test_feedback_weights_are_as_large_as_the_first_weights():
    wide, zero = nn.Linear(300, 200), nn.Linear(400, 300)
    nn.init.normal_(wide.weight, std=0.7)
    nn.init.zeros_(zero.weight)
    install(nn.ModuleList([wide, zero]), "feedback_alignment")
    assert wide.get_buffer("feedback").std().item() == pytest.approx(0.7, rel=0.03)
    assert zero.get_buffer("feedback").std().item() == pytest.approx(1 / math.sqrt(400), rel=0.03)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_copies_are_networks_of_their_own(name):
    net = install(small_net(), name)
    x = draw(6, 3, 8, 8).requires_grad_()
    with direct_reads():
        net(x).sum().backward()
    twin = copy.deepcopy(net)
    assert feedback_of(twin).keys() == feedback_of(net).keys()
    for buffer in feedback_of(net).values():
        buffer.zero_()
    assert all(buffer.abs().sum() > 0 for buffer in feedback_of(twin).values())
    with torch.no_grad():
        parts_of(net)["conv"].weight.zero_()

    def learned(net: nn.Module) -> list[torch.Tensor | None]:
        with direct_reads() as reads:
            out = net(x)
        loss = sum(read.sum() for read in reads) + out.square().sum()
        return list(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))

    ours, reference = learned(twin), learned(install(small_net(), name))
    for grad, expected in zip(ours, reference, strict=True):
        assert grad is not None and expected is not None
        assert_close(grad, expected)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_works_under_autocast(name):
    net = install(resnet20_stage(), name)
    x = draw(4, 3, 16, 16, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16), direct_reads() as reads:
        out = net(x)
    assert out.dtype == torch.bfloat16 and all(read.dtype == torch.float32 for read in reads)
    loss = sum(read.sum() for read in reads) if name == "direct_feedback" else out.float().square().sum()
    grads = torch.autograd.grad(loss, list(net.parameters()))
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("name", TRANSPORTS)
def test_another_precision_before_or_after_the_first_step_is_the_same(name):
    x, grads = draw(4, 3, 16, 16), []
    for ran in (False, True):
        net = install(resnet20_stage(), name)
        if ran:
            with direct_reads():
                copy.deepcopy(net).eval()(x.float())
                net.eval()(x.float())
        net.double().train()
        with direct_reads() as reads:
            out = net(x)
        loss = sum(read.sum() for read in reads) if name == "direct_feedback" else out.square().sum()
        grads.append(torch.autograd.grad(loss, list(net.parameters())))
        assert all(buffer.dtype == torch.float64 for buffer in feedback_of(net).values())
        assert bool(feedback_of(net)) == (name in ("feedback_alignment", "direct_feedback"))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
