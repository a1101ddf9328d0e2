"""Transports: what none of them changes, and what cannot be done."""

import copy

import pytest
import torch
import torch.nn.functional as F
from by_hand import (
    CROSSING,
    LAYERS,
    assert_close,
    draw,
    feedback_of,
    gradients,
    install,
    make_layer,
    parts_of,
    resnet20_stage,
    small_net,
)
from torch import nn

from localsim.errors import UserError
from localsim.transport import TRANSPORTS, direct_reads, set_transport


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TRANSPORTS)
def test_values_names_and_statistics_are_those_of_the_exact_network(name, training):
    plain, ours = resnet20_stage().train(training), install(resnet20_stage(), name).train(training)
    x = draw(4, 3, 16, 16, dtype=torch.float32)
    with torch.enable_grad():
        for _ in range(2):
            assert torch.equal(plain(x.clone().requires_grad_()), ours(x.clone().requires_grad_()))
    with torch.no_grad():
        assert torch.equal(plain(x), ours(x))
    state, expected = ours.state_dict(), plain.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[key], expected[key]) for key in state)
    counters = {int(value) for key, value in state.items() if key.endswith("num_batches_tracked")}
    assert counters == ({3} if training else {0})
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in plain.named_parameters()]


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "plain batch norm"])
def test_a_layers_own_parameters_have_their_exact_gradient(kind, name):
    layer, x = make_layer(kind)
    upstream = draw(*layer(x).shape, key=2)
    _, expected = gradients(layer, x, upstream)
    ours = install(copy.deepcopy(layer), name)
    grads = torch.autograd.grad(ours(x.requires_grad_()), list(ours.parameters()), upstream)
    for grad, reference in zip(grads, expected.values(), strict=True):
        assert_close(grad, reference)


def test_exact_installs_nothing():
    net = install(resnet20_stage(), "exact")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert feedback_of(net) == {}


@pytest.mark.parametrize("name", TRANSPORTS)
def test_without_gradients_there_is_no_extra_work(name, monkeypatch):
    import localsim.transport as transport

    net = install(resnet20_stage(), name)
    monkeypatch.setattr(transport, "_pathway", lambda *_: pytest.fail("a pathway back was computed"))
    with torch.no_grad(), direct_reads() as reads:
        net(draw(2, 3, 8, 8, dtype=torch.float32).requires_grad_())
    assert reads == []


@pytest.mark.parametrize("name", CROSSING)
def test_a_pathway_that_overflows_leaves_the_values_alone(name):
    layer = install(nn.Linear(2, 2, bias=False), name)
    with torch.no_grad():
        layer.weight.fill_(1e-3)
    if name == "feedback_alignment":
        layer.get_buffer("feedback").fill_(3e38)
    else:
        layer.weight.data[0, 0] = 3e38
    x = torch.tensor([[0.0, 100.0]], requires_grad=True)
    out = layer(x)
    assert out.isfinite().all() and torch.equal(out, F.linear(x, layer.weight))


# -- what cannot be done ----------------------------------------------------------------------------------------------


def test_an_unknown_transport_is_named_with_the_allowed_ones():
    with pytest.raises(UserError, match="'learned'; allowed: exact, feedback_alignment, sign_symmetric, direct_"):
        install(small_net(), "learned")


@pytest.mark.parametrize("width", [None, 0])
def test_direct_feedback_needs_the_width_of_the_error(width):
    with pytest.raises(UserError, match=f"width of the error, not {width}"):
        set_transport(small_net().named_modules(), "direct_feedback", 0, width)


@pytest.mark.parametrize("name", TRANSPORTS[1:])
def test_a_layer_has_one_transport(name):
    layer = parts_of(install(small_net(), name))["conv"]
    with pytest.raises(UserError, match="layer conv already has a transport"):
        set_transport([("conv", layer)], "sign_symmetric", 0)


def test_a_stage_has_one_transport():
    net = install(small_net(), "direct_feedback")
    with pytest.raises(UserError, match="layer 0 already has a transport"):
        install(net, "direct_feedback")
