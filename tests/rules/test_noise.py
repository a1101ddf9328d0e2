"""The noise between stages: its size along the documented axes, its gradient, its spelling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from localsim.errors import UserError
from localsim.rng import keyed
from localsim.rules.noise import NOISES, BoundaryNoise, Noise, _normal_like, make_boundary

# axes of (batch, channel, height, width) over which the deviation is taken, as the docstring has them
AXES = {"all": (0, 1, 2, 3), "hw": (2, 3), "channel": (0, 2, 3), "c_released": (2,)}
KINDS = list(AXES)


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return a map whose deviation differs between all samples, channels and columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    for axis in (0, 1, 3):
        sizes = [1] * 4
        sizes[axis] = shape[axis]
        x = x * torch.linspace(0.5, 2.0, shape[axis], dtype=torch.float64).reshape(sizes) + 0.3
    return x


def noisy(kind: str, x: torch.Tensor, sigma: float = 0.25) -> torch.Tensor:
    with keyed("noise test"):
        return BoundaryNoise(Noise(kind, sigma))(x)


def test_every_kind_is_tested():
    assert set(NOISES) == {"none", *KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_sigma_times_deviation_times_the_draw(kind):
    x = maps(3, 4, 5, 6)
    with keyed("noise test"):
        draw = _normal_like(x, 0)
    scale = np.std(x.numpy(), axis=AXES[kind], ddof=1, keepdims=True)
    np.testing.assert_allclose((noisy(kind, x) - x).numpy(), 0.25 * scale * draw.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_size_of_the_noise_along_its_axes(kind):
    x = maps(4, 3, 160, 4)
    axes = AXES[kind]
    added = (noisy(kind, x, 0.5) - x).numpy()
    measured, asked = added.std(axis=axes), 0.5 * x.numpy().std(axis=axes, ddof=1)
    count = np.prod([x.shape[axis] for axis in axes])
    # the deviation of a deviation measured on n draws is 1 / sqrt(2 n)
    np.testing.assert_allclose(measured / asked, 1, atol=5 / np.sqrt(2 * count))
    assert np.abs(added.mean(axis=axes) / asked).max() < 5 / np.sqrt(count)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_flows_through_the_deviation(kind):
    x = maps(2, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: noisy(kind, y), (x,), fast_mode=False)
    (whole,) = torch.autograd.grad(noisy(kind, x).square().sum(), x)
    with keyed("noise test"):
        draw = _normal_like(x, 0)
    cut = x + 0.25 * x.detach().std(AXES[kind], keepdim=True) * draw
    (without,) = torch.autograd.grad(cut.square().sum(), x)
    assert (whole - without).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "part of a map", "expanded"])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_precisions(kind, layout, dtype):
    """Values and gradients are those of the formula in float64, with the noise that was drawn."""
    x = maps(3, 4, 6, 5).to(dtype)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "part of a map":
        x = x[:, 1:, ::2]
    elif layout == "expanded":
        x = x[:, :1].expand(-1, 4, -1, -1)
    with keyed("noise test"):
        draw = _normal_like(x, 0)
    assert draw.dtype == dtype and draw.unique().numel() > 0.6 * draw.numel() and abs(draw.double().std() - 1) < 0.2
    x, g = x.detach().requires_grad_(), maps(*x.shape, seed=2).to(dtype)
    made = [noisy(kind, x), *torch.autograd.grad(noisy(kind, x), x, g)]
    wide = x.detach().double().requires_grad_()
    exact = wide + 0.25 * wide.std(AXES[kind], keepdim=True) * draw.double()
    expected = [exact, *torch.autograd.grad(exact, wide, g.double())]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for a, b in zip(made, expected, strict=True):
        assert a.dtype == dtype and (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_none_in_evaluation_mode(kind):
    x = maps(2, 3, 4, 4)
    assert BoundaryNoise(Noise(kind, 0.25)).eval()(x) is x
    assert not torch.equal(noisy(kind, x), x)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("hw", (4, 3, 1, 1)), ("c_released", (4, 3, 1, 1)), ("c_released", (4, 3, 1, 5)), ("all", (1, 1, 1, 1))],
)
def test_a_single_value_has_no_deviation_and_gets_no_noise(kind, shape):
    x = maps(*shape).requires_grad_()
    out = noisy(kind, x)
    assert torch.equal(out, x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_map_has_finite_gradients(kind):
    x = torch.full((2, 3, 4, 4), 1.5, dtype=torch.float64, requires_grad=True)
    noisy(kind, x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("kind", ["all", "channel"])
def test_maps_of_one_pixel_still_differ_over_the_batch(kind):
    x = maps(6, 3, 1, 1)
    out = noisy(kind, x)
    assert out.isfinite().all()
    assert (out != x).all()


def test_boundary_without_noise_is_the_identity():
    assert isinstance(make_boundary(Noise()), nn.Identity)
    assert isinstance(make_boundary(Noise("hw", 0.1)), BoundaryNoise)


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.floats(0, 1e6, exclude_min=True))
def test_spelling_round_trip(kind, sigma):
    noise = Noise(kind, sigma)
    assert Noise.parse(str(noise)) == noise


def test_spelling():
    assert Noise.parse("all:0.25") == Noise("all", 0.25)
    assert Noise.parse("none") == Noise("none", 0.0) == Noise()
    assert str(Noise("all", 0.25)) == "all:0.25"
    assert str(Noise()) == "none"


KINDS_TEXT = "all, hw, channel, c_released"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("all", f"noise 'all' is not understood; allowed: none, or KIND:SIGMA with KIND of {KINDS_TEXT}"),
        ("", f"noise '' is not understood; allowed: none, or KIND:SIGMA with KIND of {KINDS_TEXT}"),
        ("all:0.1:2", f"noise 'all:0.1:2' is not understood; allowed: none, or KIND:SIGMA with KIND of {KINDS_TEXT}"),
        ("c:0.25", f"unknown noise 'c'; allowed: none, or KIND:SIGMA with KIND of {KINDS_TEXT}"),
        ("all:x", "noise sigma 'x' is not a number; allowed: numbers > 0, e.g. all:0.25"),
        ("all:-0.1", "noise sigma is -0.1; allowed: numbers >= 0, e.g. all:0.25"),
        ("all:nan", "noise sigma is nan; allowed: numbers >= 0, e.g. all:0.25"),
        ("all:inf", "noise sigma is inf; allowed: numbers >= 0, e.g. all:0.25"),
        ("none:0.1", "noise 'none' with sigma 0.1 means nothing; use none, or e.g. all:0.25"),
        ("all:0", "noise 'all' with sigma 0 means nothing; use none, or e.g. all:0.25"),
    ],
)
def test_what_is_no_noise_is_named(text, sentence):
    with pytest.raises(UserError) as error:
        Noise.parse(text)
    assert str(error.value) == sentence
