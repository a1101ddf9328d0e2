"""Readouts and heads against plain torch formulations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from localsim.errors import UserError
from localsim.rng import keyed
from localsim.rules.heads import projector
from localsim.rules.readouts import Expand, LocalPool, make_readout

SHAPE = (6, 5, 4)  # channels, height, width


def batch() -> torch.Tensor:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def readout(name: str) -> LocalPool | Expand:
    with keyed("readout test"):
        return make_readout(name, SHAPE, expand_width=7).double()


def test_global_is_the_mean_over_positions():
    made = readout("global")
    torch.testing.assert_close(made(batch()), batch().flatten(2).mean(2), rtol=1e-14, atol=1e-15)
    assert made.out_features == 6
    assert not list(made.parameters())
    assert torch.equal(readout("local1x1")(batch()), made(batch()))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_local_is_the_mean_over_regions(k):
    made, x = readout(f"local{k}x{k}"), batch()
    _, height, width = SHAPE
    rows = [(i * height // k, -(-(i + 1) * height // k)) for i in range(k)]
    columns = [(j * width // k, -(-(j + 1) * width // k)) for j in range(k)]
    regions = [x[:, :, a:b, c:d].mean((2, 3)) for a, b in rows for c, d in columns]
    torch.testing.assert_close(made(x), torch.stack(regions, 2).flatten(1), rtol=1e-14, atol=1e-15)
    assert made.out_features == made(x).shape[1] == 6 * k * k


@pytest.mark.parametrize(("name", "size"), [("expand", 1), ("expand1x1", 1), ("expand3x3", 3)])
def test_expand_is_convolution_batch_norm_relu_and_mean(name, size):
    made, x = readout(name), batch()
    assert isinstance(made, Expand)
    assert made.conv.weight.shape == (7, 6, size, size)
    assert made.conv.bias is None
    assert made.out_features == 7
    maps = F.conv2d(x, made.conv.weight, padding=size // 2)
    mean, variance = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), correction=0, keepdim=True)
    pooled = ((maps - mean) / (variance + 1e-5).sqrt()).clamp(min=0).flatten(2).mean(2)
    torch.testing.assert_close(made(x), pooled, rtol=1e-11, atol=1e-13)
    made.eval()
    with torch.no_grad():
        made.bn.running_mean.fill_(0.1)
        made.bn.running_var.fill_(4.0)
    pooled = ((maps - 0.1) / (4 + 1e-5) ** 0.5).clamp(min=0).flatten(2).mean(2)
    torch.testing.assert_close(made(x), pooled, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("name", "k"), [("local5x5", 5), ("local10x10", 10)])
def test_regions_finer_than_the_map_are_refused(name, k):
    with pytest.raises(UserError, match=f"readout {name} needs maps of {k}x{k} or more, but a stage's map is 5x4"):
        readout(name)


@pytest.mark.parametrize("name", ["mean", "local", "local0x0", "local2x3", "expand5x5", "Global", ""])
def test_unknown_names_are_named(name):
    with pytest.raises(UserError) as error:
        readout(name)
    assert str(error.value) == (
        f"unknown readout {name!r}; allowed: global, local2x2 (any k x k), expand (= expand1x1), expand3x3"
    )


def test_projector_of_the_paper_has_151_million_parameters():
    with torch.device("meta"):
        head = projector(2048, [8192, 8192, 8192])
    kinds = [type(layer) for layer in head]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
    num = sum(p.numel() for p in head.parameters())
    assert num == 2048 * 8192 + 2 * 8192**2 + 2 * 2 * 8192
    assert round(num / 1e6, 1) == 151.0


def test_projector_of_one_layer_is_linear():
    head = projector(6, [4])
    assert [type(layer) for layer in head] == [nn.Linear]
    assert head[0].weight.shape == (4, 6)


@pytest.mark.parametrize("widths", [[], [8, 0], [-1]])
def test_projector_widths_are_checked(widths):
    with pytest.raises(UserError, match="is not a list of positive widths"):
        projector(6, widths)
