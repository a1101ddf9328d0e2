"""Transports: forward values untouched, and gradients against references written out by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from localsim.backbones import UnitBlock, build_backbone
from localsim.errors import UserError
from localsim.network import Stage
from localsim.rng import keyed
from localsim.transport import TRANSPORTS, direct_reads, set_transport

CROSSING = ("feedback_alignment", "sign_symmetric")
ERROR_WIDTH = 6


def install(net: nn.Module, name: str, seed: int = 0) -> nn.Module:
    set_transport(net.named_modules(), name, seed, ERROR_WIDTH)
    return net


def draw(*shape: int, key: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(key), dtype=dtype)


def resnet20_stage(key: int = 0) -> Stage:
    """The stem and blocks of the first and second group: strides, shortcuts by convolution, ReLUs in place."""
    with keyed(key, "stage"):
        units = build_backbone("resnet20", zero_init_residual=False).units
    return Stage([units[0], *units[3:6]])


def small_net() -> nn.Sequential:
    """Two stages: conv - batch norm - ReLU - grouped conv - ReLU - pool - linear - batch norm, and linear layers."""
    lower = {
        "conv": nn.Conv2d(3, 4, 3, padding=1), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU(inplace=True),
        "grouped": nn.Conv2d(4, 6, 3, padding=1, groups=2), "relu2": nn.ReLU(), "pool": nn.AvgPool2d(2),
        "flat": nn.Flatten(1), "linear": nn.Linear(6 * 16, 6), "norm2": nn.BatchNorm1d(6),
    }  # fmt: skip
    upper = {"rows": nn.Unflatten(1, (3, 2)), "first": nn.Linear(2, 4), "tanh": nn.Tanh(), "second": nn.Linear(4, 1)}
    stages = [Stage([UnitBlock("lower", lower.items())]), Stage([UnitBlock("upper", upper.items())])]
    for number, parameter in enumerate(parameter for stage in stages for parameter in stage.parameters()):
        parameter.data = draw(*parameter.shape, key=number) / 3
    return nn.Sequential(*stages).double()


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.second(self.relu(self.first(x)))
        out += x
        return self.relu(out)


def parts_of(net: nn.Module) -> dict[str, nn.Module]:
    """Return what a network's unit blocks consist of, by name."""
    units = [module for module in net.modules() if isinstance(module, UnitBlock)]
    return {name: part for unit in units for name, part in zip(unit.part_names, unit.parts, strict=True)}


def feedback_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in net.named_buffers() if name.endswith("feedback")}


def gradients(net: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the gradients of <net(x), upstream> by x and by every parameter."""
    x = x.clone().requires_grad_()
    names, parameters = zip(*net.named_parameters(), strict=True)
    to_x, *rest = torch.autograd.grad(net(x), [x, *parameters], upstream)
    return to_x, dict(zip(names, rest, strict=True))


def assert_close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max().item() < tolerance * max(1.0, reference.abs().max().item())


def redraw(layer: nn.Module) -> nn.Module:
    """Move a batch norm's gain, bias and running statistics away from 1 and 0."""
    with torch.no_grad():
        for number, value in enumerate((*layer.parameters(), *layer.buffers())):
            if value.is_floating_point():
                value.copy_(draw(*value.shape, key=number).abs() + 0.3)
    return layer


def normalised(x: torch.Tensor, axes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    spread = (x.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()
    return (x - x.mean(axes, keepdim=True)) / spread, spread


def below_normalisation(
    g: torch.Tensor, normal: torch.Tensor, spread: torch.Tensor, axes: tuple[int, ...]
) -> torch.Tensor:
    return (g - g.mean(axes, keepdim=True) - normal * (g * normal).mean(axes, keepdim=True)) / spread


LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 7, 7)),
    "strided conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (5, 4, 8, 8)),
    "grouped conv": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2, groups=2), (5, 4, 7, 7)),
    "reflecting conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (5, 4, 7, 7)),
    "linear": (lambda: nn.Linear(4, 6), (5, 4)),
    "linear of positions": (lambda: nn.Linear(4, 6, bias=False), (5, 3, 4)),
    "batch norm": (lambda: nn.BatchNorm2d(4), (5, 4, 3, 3)),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "batch norm of sequences": (lambda: nn.BatchNorm1d(4, track_running_stats=False), (5, 4, 3)),
    "plain batch norm": (lambda: nn.BatchNorm2d(4, affine=False), (5, 4, 3, 3)),
}


def make_layer(kind: str) -> tuple[nn.Module, torch.Tensor]:
    make, shape = LAYERS[kind]
    with keyed(0, "layer"):
        layer = make().double()
    return (redraw(layer) if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) else layer), draw(*shape, key=1)


# -- what no transport changes ----------------------------------------------------------------------------------------


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


# -- what a transport changes: the gradient to a layer's input --------------------------------------------------------


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


# -- direct feedback --------------------------------------------------------------------------------------------------


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


# -- feedback weights -------------------------------------------------------------------------------------------------


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


# -- learning ---------------------------------------------------------------------------------------------------------


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
