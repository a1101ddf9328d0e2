"""The fused `expand` readout against conv, batch norm, ReLU and mean run one after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LargestMade
from torch import Tensor, nn

from localsim import build, engine
from localsim.errors import UserError
from localsim.memory import HeldBytes
from localsim.rng import keyed
from localsim.rules import expand
from localsim.rules.expand import Expand


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Make slices of a few channels, the last one narrower, as they are for maps of a real network."""
    monkeypatch.setattr(expand, "_SLICE", 1)
    monkeypatch.setattr(expand, "_FEWEST_CHANNELS", 3)


def pair(channels: int, width: int, kernel: int, dtype: torch.dtype = torch.float64) -> tuple[Expand, Expand]:
    """Return a plain and a fused readout with equal weights, gains of either sign, one of them zero."""
    with keyed("expand test", channels, width, kernel):
        plain = Expand(channels, width, kernel, impl="plain").double()
        for values in (plain.bn.weight, plain.bn.bias, plain.bn.running_mean):
            nn.init.normal_(values)
    with torch.no_grad():
        plain.bn.weight[0] = 0
        plain.bn.running_var.fill_(1.7)
    plain = plain.to(dtype)
    fused = copy.deepcopy(plain)
    fused.impl = "fused"
    return plain, fused


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def learned(readout: Expand, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Return the pooled map, its gradients with respect to the map and all parameters, and the buffers."""
    x = x.clone().requires_grad_()
    pooled = readout(x)
    grads = torch.autograd.grad((pooled * weights).sum(), [x, *readout.parameters()])
    return [pooled, *grads, *(buffer.double() for buffer in readout.buffers())]


@settings(deadline=None, max_examples=40)
@given(
    images=st.integers(2, 5), channels=st.integers(1, 6), width=st.integers(1, 11), kernel=st.sampled_from([1, 3]),
    height=st.integers(1, 6), columns=st.integers(1, 6), training=st.booleans(), last=st.booleans(),
)  # fmt: skip
def test_fused_is_plain_in_values_gradients_and_running_statistics(
    images, channels, width, kernel, height, columns, training, last
):
    x, weights = drawn(images, channels, height, columns), drawn(images, width)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    results = [learned(readout.train(training), x, weights) for readout in pair(channels, width, kernel)]
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_finite_differences(training):
    _, fused = pair(3, 7, 1)
    x = drawn(4, 3, 2, 3).requires_grad_()

    def pooled(x: Tensor, *values: Tensor) -> Tensor:
        made = copy.deepcopy(fused).train(training)  # running statistics of its own: every call moves them
        return torch.func.functional_call(
            made, dict(zip(("conv.weight", "bn.weight", "bn.bias"), values, strict=True)), x
        )

    assert torch.autograd.gradcheck(pooled, (x, *fused.parameters()), eps=1e-6, atol=1e-6)


def test_only_what_needs_a_gradient_gets_one():
    _, fused = pair(3, 7, 1)
    x = drawn(4, 3, 2, 3)
    whole = learned(fused, x, drawn(4, 7))
    fused.conv.weight.requires_grad_(False)
    fused.bn.requires_grad_(False)
    x.requires_grad_()
    pooled = fused(x)
    torch.testing.assert_close(torch.autograd.grad((pooled * drawn(4, 7)).sum(), x)[0], whole[1])
    assert not fused(x.detach()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_both_are_near_the_exact_result(dtype):
    """The two round differently, under bfloat16 autocast and in the kernels for maps with channels last."""
    x, weights = drawn(8, 16, 6, 6), drawn(8, 24)
    exact = learned(pair(16, 24, 1)[0], x.to(dtype).double(), weights)
    errors = []
    for readout in pair(16, 24, 1, torch.float32):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            made = learned(readout, x.to(dtype), weights.float())
        assert made[0].dtype == dtype and all(grad.dtype == torch.float32 for grad in made[2:5])
        errors.append(
            [((a.double() - b).norm() / b.norm()).item() for a, b in zip(made, exact, strict=True) if b.norm()]
        )
    worst = 2e-6 if dtype == torch.float32 else 0.05
    for plain, fused in zip(*errors, strict=True):
        assert fused < worst and plain < worst


def test_the_expanded_map_is_never_held():
    plain, fused = pair(4, 64, 1, torch.float32)
    x = drawn(2, 4, 16, 16, dtype=torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()
    held = {}
    for readout in (plain, fused):
        with HeldBytes([*readout.parameters(), x]) as counted:
            kept = readout(x)
        held[readout.impl] = counted.peak
        del kept
    expanded = 2 * 64 * 16 * 16 * 4
    assert held["plain"] >= 2 * expanded  # what batch norm reads and what ReLU gives
    assert held["fused"] <= 10 * 64 * 4  # a few numbers per channel


def test_the_expanded_map_is_never_made():
    _, fused = pair(4, 64, 1)
    x = drawn(2, 4, 16, 16).contiguous(memory_format=torch.channels_last)
    with LargestMade() as made:
        learned(fused, x, drawn(2, 64))
    assert made.numel <= 2 * 16 * 16 * 4  # the map that is read; three channels of the expanded one are less


def test_auto_is_fused_for_large_maps_only(monkeypatch):
    readout = Expand(4, 64)
    calls = []
    monkeypatch.setattr(expand._Fused, "apply", lambda x, *rest: calls.append(x.shape) or torch.zeros(len(x), 64))
    monkeypatch.setattr(expand, "_LARGE", 64 * 2 * 9)
    readout(drawn(2, 4, 2, 4, dtype=torch.float32))
    assert not calls
    readout(drawn(2, 4, 3, 3, dtype=torch.float32))
    assert calls == [(2, 4, 3, 3)]


def test_layers_that_are_listened_to_run_plainly():
    plain, fused = pair(3, 7, 1)
    heard = []
    fused.conv.register_forward_hook(lambda _module, _args, out: heard.append(out.shape))
    x = drawn(4, 3, 2, 2)
    assert torch.equal(fused(x), plain(x)) and heard == [(4, 7, 2, 2)]


@pytest.mark.parametrize("change", ["backward hook", "no statistics", "no gains", "synchronised", "one value"])
def test_what_slices_cannot_do_is_done_plainly(change, monkeypatch):
    plain, fused = pair(3, 7, 1)
    monkeypatch.setattr(expand._Fused, "apply", lambda *_args: pytest.fail("this is not for slices"))
    x = drawn(4, 3, 2, 2)
    if change == "backward hook":
        fused.bn.register_full_backward_hook(lambda _module, _into, _out: None)
    elif change == "synchronised":
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused).eval()
    elif change == "one value":
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            fused(x[:1, :, :1, :1])
        return
    else:
        off = {"track_running_stats": change != "no statistics", "affine": change != "no gains"}
        plain.bn = nn.BatchNorm2d(7, **off).double()
        fused.bn = copy.deepcopy(plain.bn)
    if change != "synchronised":
        assert torch.equal(fused(x), plain(x))
    assert fused.eval()(x).shape == (4, 7) and fused(x[:0]).shape == (0, 7)


def test_a_cumulative_average_is_kept_as_batch_norm_keeps_it():
    """The control `calibrated` collects statistics that way."""
    pair_of_them = pair(3, 7, 1)
    for readout in pair_of_them:
        readout.bn.reset_running_stats()
        readout.bn.momentum = None
        for number in range(3):
            readout(drawn(4, 3, 2, 2) + number)
    for plain, fused in zip(*(readout.buffers() for readout in pair_of_them), strict=True):
        torch.testing.assert_close(fused, plain)


def test_autocast_leaves_float64_alone():
    plain, fused = pair(3, 7, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fused(drawn(4, 3, 2, 2)), plain(drawn(4, 3, 2, 2)))


def blockwise_gradients(impl: str, precision: str, dtype: torch.dtype) -> list[Tensor]:
    """Return losses and gradients of one step without noise, whose draws would depend on the dtype."""
    net = build("blockwise", preset="quick", backbone="resnet18", readout_impl=impl, projector=[16, 16], noise="none")
    net, views = net.to(dtype).train(), drawn(2, 6, 3, 32, 32).to(dtype)
    losses = engine.backward(net, *views, key=1, precision=precision)
    return [*losses.values(), *(p.grad for p in net.parameters() if p.grad is not None)]


def test_blockwise_learns_the_same_with_either():
    exact, fused = (blockwise_gradients(impl, "full", torch.float64) for impl in ("plain", "fused"))
    assert len(exact) == len(fused) > 70
    for a, b in zip(fused, exact, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-12
    errors = {}
    for impl in ("plain", "fused"):
        rounded = blockwise_gradients(impl, "bf16", torch.float32)
        errors[impl] = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(rounded, exact, strict=True)]
    # each rounds in its own way; over all parameters neither is further from what is exact
    assert sum(errors["fused"]) < 1.1 * sum(errors["plain"])


def test_what_makes_no_sense_is_told():
    with pytest.raises(UserError, match="unknown readout_impl 'fast'; allowed: auto, fused, plain"):
        Expand(3, 4, impl="fast")
    with pytest.raises(UserError, match="readout_impl fused has no meaning for readout global"):
        build("blockwise", preset="quick", readout="global", readout_impl="fused")
    with pytest.raises(UserError, match="readout_impl fused cannot carry transport feedback_alignment"):
        build("blockwise", preset="quick", transport="feedback_alignment", readout_impl="fused")
