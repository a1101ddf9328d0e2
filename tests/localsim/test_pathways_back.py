"""The gradient that a transport sends to a layer's input, and that learning with it works."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from by_hand import (
    CROSSING,
    LAYERS,
    ResidualBlock,
    assert_close,
    below_normalisation,
    draw,
    gradients,
    install,
    make_layer,
    normalised,
)
from torch import nn

from localsim.rng import keyed


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_feedback_alignment_with_the_weights_themselves_is_exact(kind, training):
    layer, x = make_layer(kind)
    layer.train(training)
    norm = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
    if norm and layer.affine:
        nn.init.ones_(layer.weight)  # what its pathway back takes it to be
    ours = install(copy.deepcopy(layer), "feedback_alignment")
    if not norm:
        ours.get_buffer("feedback").copy_(layer.weight)
    upstream = draw(*layer(x).shape, key=2)
    x = x.requires_grad_()
    expected = torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)
    for grad, reference in zip(torch.autograd.grad(ours(x), [x, *ours.parameters()], upstream), expected, strict=True):
        assert_close(grad, reference)


def test_feedback_alignment_carries_a_convolutions_gradient_with_b():
    layer = install(make_layer("strided conv")[0], "feedback_alignment")
    upstream = draw(5, 6, 4, 4, key=2)
    to_x, _ = gradients(layer, draw(5, 4, 8, 8), upstream)
    feedback = layer.get_buffer("feedback")
    assert_close(to_x, F.conv_transpose2d(upstream, feedback, stride=2, padding=1, output_padding=1))
    assert not torch.allclose(to_x, F.conv_transpose2d(upstream, layer.weight, stride=2, padding=1, output_padding=1))


def test_sign_symmetric_uses_the_signs_of_the_weights_as_they_are_now():
    conv, linear = make_layer("strided conv")[0], make_layer("linear")[0]
    install(nn.ModuleList([conv, linear]), "sign_symmetric")
    for step in range(2):
        upstream = draw(5, 6, 4, 4, key=step)
        signs = (2 * (conv.weight > 0).double() - 1) * conv.weight.abs().sum() / conv.weight.numel()
        to_x, _ = gradients(conv, draw(5, 4, 8, 8), upstream)
        assert_close(to_x, F.conv_transpose2d(upstream, signs, stride=2, padding=1, output_padding=1))
        upstream = draw(5, 6, key=step)
        signs = (2 * (linear.weight > 0).double() - 1) * linear.weight.abs().sum() / linear.weight.numel()
        assert_close(gradients(linear, draw(5, 4), upstream)[0], upstream @ signs)
        with torch.no_grad():
            for layer in (conv, linear):
                layer.weight.copy_(draw(*layer.weight.shape, key=9))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*CROSSING, "direct_feedback"])
def test_a_batch_norm_sends_its_gradient_down_without_its_learned_gain(name, training):
    """Against the derivative written out: Ioffe & Szegedy 2015, section 3, with another gain."""
    layer, x = make_layer("batch norm")
    layer.train(training)
    with torch.no_grad():
        layer.weight[1] *= -1
    gain = layer.weight.sign() * layer.weight.abs().mean() if name == "sign_symmetric" else torch.ones(4)
    upstream = draw(*x.shape, key=2)
    g = upstream * gain[:, None, None]
    if training:
        expected = below_normalisation(g, *normalised(x, (0, 2, 3)), (0, 2, 3))
    else:
        expected = g / (layer.running_var[:, None, None] + layer.eps).sqrt()
    to_x, _ = gradients(install(layer, name), x, upstream)
    assert_close(to_x, expected)


def test_skips_and_non_linearities_stay_exact():
    """One residual block by hand: z = relu(x + B2-path(relu(B1-path(x))))."""
    with keyed(0, "block"):
        block = install(ResidualBlock().double(), "feedback_alignment")
    x, upstream = draw(7, 4), draw(7, 4, key=1)
    hidden = block.first(x)
    delta = upstream * (block.second(hidden.relu()) + x > 0)
    hidden_delta = (delta @ block.second.get_buffer("feedback")) * (hidden > 0)
    to_x, grads = gradients(block, x, upstream)
    assert_close(to_x, delta + hidden_delta @ block.first.get_buffer("feedback"))
    assert_close(grads["second.weight"], delta.T @ hidden.relu())
    assert_close(grads["first.weight"], hidden_delta.T @ x)
    assert_close(grads["first.bias"], hidden_delta.sum(0))


# -- learning ----------------------------------------------------------------------------------------------------------


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.degrees(math.acos(float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))))


def toy_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(25, 30), nn.Tanh(), nn.Linear(30, 10))


def test_the_angle_to_backpropagation_falls_while_feedback_alignment_learns():
    """Lillicrap et al. 2016, figure 2: the forward weights come to agree with the fixed feedback weights."""
    starts, ends = [], []
    for seed in range(4):
        with keyed(seed, "toy"):
            net, exact = toy_net(), toy_net()
            x = torch.randn(300, 25)
            target = x @ torch.randn(25, 10) / 5
        install(net, "feedback_alignment", seed)
        angles, losses = [], []
        for step in range(151):
            loss = (net(x) - target).square().sum(1).mean()
            grads = torch.autograd.grad(loss, list(net.parameters()))
            if step in (0, 150):
                exact.load_state_dict(net.state_dict())
                (reference,) = torch.autograd.grad((exact(x) - target).square().sum(1).mean(), exact[0].weight)
                angles.append(angle(grads[0], reference))
                losses.append(loss.item())
            with torch.no_grad():
                for parameter, grad in zip(net.parameters(), grads, strict=True):
                    parameter -= 0.1 * grad
        assert losses[1] < 0.1 * losses[0]
        starts.append(angles[0])
        ends.append(angles[1])
    assert min(starts) > 75
    assert max(ends) < 75 and sum(ends) / 4 < sum(starts) / 4 - 25
