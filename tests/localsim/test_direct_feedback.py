"""Direct feedback: what each layer learns from a projected error, written out by hand."""

import pytest
import torch
import torch.nn.functional as F
from by_hand import (
    ERROR_WIDTH,
    ResidualBlock,
    assert_close,
    below_normalisation,
    draw,
    feedback_of,
    install,
    normalised,
    parts_of,
    small_net,
)
from tiny import images, tiny_config
from torch import nn

from localsim import engine
from localsim.assembly import build_network
from localsim.backbones import UnitBlock
from localsim.network import Stage
from localsim.rng import keyed
from localsim.transport import direct_reads


def heard(module: nn.Module, error: torch.Tensor) -> torch.Tensor:
    return error @ module.get_buffer("feedback")


def learned_directly(stage: nn.Module, x: torch.Tensor, error: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Return the gradients of all parameters for an error, as the engine gets them from one stage."""
    with direct_reads() as reads:
        stage(x)
    names, parameters = zip(*stage.named_parameters(), strict=True)
    grads = torch.autograd.grad(torch.stack(reads).sum(0), parameters, error, allow_unused=True)
    return {name.split("parts.")[-1]: grad for name, grad in zip(names, grads, strict=True)}


def test_direct_feedback_is_the_projected_error_times_the_derivative_of_what_follows():
    """Noekland 2016, section 2, written out; below the batch norms for a gain of 1."""
    net, x, error = install(small_net(), "direct_feedback"), draw(6, 3, 8, 8), draw(6, ERROR_WIDTH, key=1)
    part = parts_of(net)
    ours = learned_directly(net[0], x, error)
    axes = (0, 2, 3)
    made = F.conv2d(x, part["conv"].weight, part["conv"].bias, padding=1)
    normal, spread = normalised(made, axes)
    scaled = normal * part["norm"].weight[:, None, None] + part["norm"].bias[:, None, None]
    delta = heard(part["grouped"], error)[:, :, None, None] / 64 * (scaled > 0)
    assert_close(ours["1.weight"], (delta * normal).sum(axes))
    assert_close(ours["1.bias"], delta.sum(axes))
    delta = below_normalisation(delta, normal, spread, axes)
    assert_close(ours["0.weight"], torch.nn.grad.conv2d_weight(x, part["conv"].weight.shape, delta, padding=1))
    assert_close(ours["0.bias"], delta.sum(axes))

    grouped = F.conv2d(scaled.relu(), part["grouped"].weight, part["grouped"].bias, padding=1, groups=2)
    pooled = heard(part["linear"], error).unflatten(1, (6, 4, 4)) / 4
    delta = pooled.repeat_interleave(2, 2).repeat_interleave(2, 3) * (grouped > 0)
    shape = part["grouped"].weight.shape
    assert_close(ours["3.weight"], torch.nn.grad.conv2d_weight(scaled.relu(), shape, delta, padding=1, groups=2))
    assert_close(ours["3.bias"], delta.sum(axes))

    flat = F.avg_pool2d(grouped.relu(), 2).flatten(1)
    normal, spread = normalised(F.linear(flat, part["linear"].weight, part["linear"].bias), (0,))
    delta = heard(net[0], error)
    assert_close(ours["8.weight"], (delta * normal).sum(0))
    assert_close(ours["8.bias"], delta.sum(0))
    delta = below_normalisation(delta, normal, spread, (0,))
    assert_close(ours["7.weight"], delta.T @ flat)
    assert_close(ours["7.bias"], delta.sum(0))

    x = draw(6, 6, key=2)
    ours = learned_directly(net[1], x, error)
    rows = x.unflatten(1, (3, 2))
    out = F.linear(rows, part["first"].weight, part["first"].bias).tanh()
    delta = heard(part["second"], error)[:, None] / 3 * (1 - out**2)  # three positions
    assert_close(ours["1.weight"], torch.einsum("npo,npi->oi", delta, rows))
    assert_close(ours["1.bias"], delta.sum((0, 1)))
    delta = heard(net[1], error)[:, :, None]  # three channels of one entry
    assert_close(ours["3.weight"], torch.einsum("npo,npi->oi", delta, out))
    assert_close(ours["3.bias"], delta.sum((0, 1)))


def test_a_skip_carries_the_error_of_the_next_read_down_unchanged():
    """Two residual blocks on a stem, by hand."""
    with keyed(0, "blocks"):
        blocks = [ResidualBlock(), ResidualBlock()]
        stage = Stage([UnitBlock("unit", [("stem", nn.Linear(3, 4)), ("one", blocks[0]), ("two", blocks[1])])]).double()
    install(stage, "direct_feedback")
    x, error = draw(7, 3), draw(7, ERROR_WIDTH, key=1)
    ours = learned_directly(stage, x, error)
    inputs, hidden, outputs = [parts_of(stage)["stem"](x).detach()], [], []
    for block in blocks:
        hidden.append(F.linear(inputs[-1], block.first.weight, block.first.bias).relu())
        outputs.append((F.linear(hidden[-1], block.second.weight, block.second.bias) + inputs[-1]).relu())
        inputs.append(outputs[-1])
    delta = heard(stage, error)
    for number in (1, 0):
        block = blocks[number]
        delta = delta * (outputs[number] > 0)
        hidden_delta = heard(block.second, error) * (hidden[number] > 0)
        assert_close(ours[f"{number + 1}.second.weight"], delta.T @ hidden[number])
        assert_close(ours[f"{number + 1}.second.bias"], delta.sum(0))
        assert_close(ours[f"{number + 1}.first.weight"], hidden_delta.T @ inputs[number])
        assert_close(ours[f"{number + 1}.first.bias"], hidden_delta.sum(0))
        delta = delta + heard(block.first, error)
    assert_close(ours["0.weight"], delta.T @ x)


def test_what_a_layer_learns_by_direct_feedback_depends_on_no_weight_above():
    x, error = draw(6, 3, 8, 8), draw(6, ERROR_WIDTH, key=1)
    names = [name for name, _ in small_net()[0].units[0].parts.named_parameters()]
    for highest in ("1.bias", "3.bias", "7.bias"):
        plain, perturbed = (install(small_net(), "direct_feedback")[0] for _ in range(2))
        below = names.index(highest) + 1
        parameters = dict(perturbed.units[0].parts.named_parameters())
        with torch.no_grad():
            for name in names[below:]:
                parameters[name].copy_(draw(*parameters[name].shape, key=below))
        before, after = learned_directly(plain, x, error), learned_directly(perturbed, x, error)
        for name in names[:below]:
            assert torch.equal(before[name], after[name]) and before[name].abs().sum() > 0
        assert not torch.allclose(plain(x), perturbed(x))


def test_direct_feedback_does_not_know_the_learned_gain():
    """A gain that leaves the ReLU where it is leaves the gradient below it where it is."""
    x, error = draw(6, 3, 8, 8), draw(6, ERROR_WIDTH, key=1)
    grads = []
    for gain in (1.0, 3.0):
        net = install(small_net(), "direct_feedback")
        with torch.no_grad():
            parts_of(net)["norm"].weight.fill_(gain)
            parts_of(net)["norm"].bias.zero_()
        grads.append(learned_directly(net[0], x, error)["0.weight"])
    assert torch.equal(*grads)


def test_direct_reads_are_collected_only_while_asked_for():
    net, x = install(small_net(), "direct_feedback"), draw(6, 3, 8, 8)
    net(x)
    assert feedback_of(net) == {}
    with direct_reads() as outer:
        top = net[0](x).detach()
        with direct_reads() as inner:
            net[0](x)
            net[0](x)
        net[1](top)
    net(x)
    assert (len(outer), len(inner)) == (3 + 2, 6)
    assert {read.shape for read in outer} == {(6, ERROR_WIDTH)}
    assert all(read.requires_grad for read in outer)


def test_nothing_is_read_where_all_below_is_frozen():
    net, x = install(small_net(), "direct_feedback"), draw(6, 3, 8, 8)
    part = parts_of(net)
    for frozen, left in ((("conv", "norm"), 2), (("grouped",), 1), (("linear", "norm2"), 0)):
        for name in frozen:
            part[name].requires_grad_(False)
        with direct_reads() as reads:
            net[0](x)
        assert len(reads) == left


def test_a_projected_error_is_about_as_long_as_the_error():
    layer = install(nn.Linear(4000, 2), "direct_feedback")
    x, error = torch.zeros(5, 4000, requires_grad=True), draw(5, ERROR_WIDTH, dtype=torch.float32)
    with direct_reads() as reads:
        layer(x)
    (to_x,) = torch.autograd.grad(reads, x, error)
    assert (to_x.norm(dim=1) / error.norm(dim=1) - 1).abs().max() < 0.1


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("rule", ["end_to_end", "interlocking", "blockwise"])
@pytest.mark.parametrize("eager", [True, False])
def test_the_error_passes_frozen_stages_by(rule, frozen, eager):
    """All that is left to train gets the gradient it has when nothing is frozen, bit for bit."""
    grads = []
    for stages in ((), frozen):
        net = build_network(tiny_config(rule, granularity=3, transport="direct_feedback"))
        for stage in stages:
            net.stages[stage].requires_grad_(False)
        engine.backward(net, images(4, 16), images(4, 16).flip(3), labels=torch.arange(4), key=1, eager=eager)
        grads.append({name: parameter.grad for name, parameter in net.named_parameters()})
    whole, rest = grads
    for name, grad in rest.items():
        expected = whole[name]
        assert expected is not None
        if name.startswith(tuple(f"stages.{stage}." for stage in frozen)):
            assert grad is None
        else:
            assert grad is not None and torch.equal(grad, expected)
