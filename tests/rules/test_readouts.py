"""Readouts and heads against plain torch formulations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from localsim.errors import UserError
from localsim.rng import keyed
from localsim.rules.heads import projector
from localsim.rules.readouts import Expand, Readout, make_readout

SHAPE = (6, 5, 4)  # channels, height, width


def batch() -> torch.Tensor:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def readout(name: str) -> Readout:
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


@pytest.mark.parametrize(
    "name", ["mean", "local", "local0x0", "local2x3", "expand5x5", "subsample0", "residual", "residual0", "Global", ""]
)
def test_unknown_names_are_named(name):
    with pytest.raises(UserError) as error:
        readout(name)
    assert str(error.value) == (
        f"unknown readout {name!r}; allowed: global, local2x2 (any k x k), expand (= expand1x1), expand3x3, "
        "subsample (= subsample4; one in any N), residual1 (any number of blocks), map, patches"
    )


@pytest.mark.parametrize(("name", "num"), [("subsample", 5), ("subsample3", 6), ("subsample7", 2), ("subsample99", 1)])
def test_subsample_is_the_mean_of_different_positions_drawn_per_image(name, num):
    """Positions hold powers of two, so that a mean says which of them were drawn, each at most once."""
    made = readout(name)
    x = (2.0 ** torch.arange(20, dtype=torch.float64)).view(1, 1, 5, 4).expand(50, 6, 5, 4)
    with keyed("draw"):
        sums = (made(x) * num).round().long()
    assert torch.equal(sums, sums[:, :1].expand(-1, 6))  # the same positions in every channel
    assert [bin(value).count("1") for value in sums[:, 0].tolist()] == [num] * 50
    assert len(set(sums[:, 0].tolist())) > 10
    with keyed("draw"):
        assert torch.equal((made(x) * num).round().long(), sums)


def test_subsample_is_the_mean_in_expectation_and_exactly_in_evaluation():
    made, x = readout("subsample"), batch()
    with keyed("many draws"):
        drawn = torch.stack([made(x) for _ in range(4000)])
    mean = x.mean((2, 3))
    # 5 of 20 without replacement: variance s^2 / 5 * (1 - 5 / 20), so one standard error of 4000 draws is below 0.01
    assert float((drawn.mean(0) - mean).abs().max()) < 0.04
    assert float(drawn.std(0).min()) > 0.1
    torch.testing.assert_close(made.eval()(x), mean, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(readout("subsample1")(x), mean, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("num", [1, 3])
def test_residual_is_blocks_of_the_maps_width_and_the_mean(num):
    made, x = readout(f"residual{num}"), batch()
    convs = [module for module in made.modules() if isinstance(module, nn.Conv2d)]
    assert [tuple(conv.weight.shape) for conv in convs] == [(6, 6, 3, 3)] * 2 * num
    h = x
    for i in range(num):
        y = F.relu(F.batch_norm(F.conv2d(h, convs[2 * i].weight, padding=1), None, None, training=True))
        h = F.relu(h + F.batch_norm(F.conv2d(y, convs[2 * i + 1].weight, padding=1), None, None, training=True))
    torch.testing.assert_close(made(x), h.mean((2, 3)), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "kind", "out_shape"),
    [("global", "vector", (6,)), ("local2x2", "vector", (24,)), ("expand", "vector", (7,)),
     ("subsample8", "vector", (6,)), ("residual1", "vector", (6,)), ("map", "map", SHAPE)],
)  # fmt: skip
def test_kind_and_shape_are_what_comes_out(name, kind, out_shape):
    made = readout(name)
    assert made.kind == kind
    assert made.out_shape == out_shape == tuple(made(batch()).shape[1:])
    if kind == "map":
        assert torch.equal(made(batch()), batch())
        return
    assert made.out_features == out_shape[0]
    with keyed("readout test"):
        over = make_readout(name, SHAPE, expand_width=7, grid=(1, 3)).double()
    assert (over.kind, over.out_shape, over.out_features) == ("vector", out_shape, out_shape[0])


def test_patches_lie_as_they_were_cut_and_vectors_are_means_over_them():
    n, rows, columns = 2, 3, 4
    x = torch.randn(n * rows * columns, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = make_readout("patches", SHAPE, expand_width=7, grid=(rows, columns))
    assert (made.kind, made.out_shape) == ("patches", (6, rows, columns))
    out = made(x)
    assert out.shape == (n, 6, rows, columns)
    for i, r, c in [(0, 0, 0), (0, 1, 2), (1, 2, 3), (1, 0, 1)]:
        torch.testing.assert_close(out[i, :, r, c], x[(i * rows + r) * columns + c].mean((1, 2)))
    over = make_readout("local2x2", SHAPE, expand_width=7, grid=(rows, columns))
    whole = make_readout("local2x2", SHAPE, expand_width=7)
    expected = torch.stack([whole(x)[i * 12 : (i + 1) * 12].mean(0) for i in range(n)])
    torch.testing.assert_close(over(x), expected, rtol=1e-13, atol=1e-14)


def test_patches_need_a_grid_and_a_map_needs_whole_images():
    with pytest.raises(UserError, match=r"readout patches needs images cut into patches, e\.g\. --set patches=16:8"):
        make_readout("patches", SHAPE, expand_width=7)
    with pytest.raises(UserError, match="readout map reads whole images, but the images are cut into patches"):
        make_readout("map", SHAPE, expand_width=7, grid=(2, 2))


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
