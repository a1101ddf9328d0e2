"""The networks of patch-wise rules, against their published architecture written out by hand."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from tiny import images, through
from torch import nn
from torch.nn import functional

from localsim.backbones import (
    SCALABLE,
    build_backbone,
    load_trunk_state_dict,
    trace_units,
    trunk_state_dict,
    unit_shapes,
)
from localsim.errors import UserError
from localsim.unnormalised import preact_resnet50, vgg6

built = cache(build_backbone)


def published_vgg6(state, x):
    for index, pooled in ((0, False), (2, True), (5, False), (7, True), (10, True), (13, True)):
        weight, bias = state[f"features.{index}.weight"], state[f"features.{index}.bias"]
        x = functional.relu(functional.conv2d(x, weight, bias, padding=1))
        x = functional.max_pool2d(x, 2) if pooled else x
    return x


def published_preact_resnet50(state, x):
    def convolve(name, x, **options):
        return functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    x = convolve("conv1", x, padding=2)
    for stage, (num_blocks, first_stride) in enumerate(((3, 1), (4, 2), (6, 2)), start=1):
        for block in range(num_blocks):
            name, stride = f"layer{stage}.{block}", 1 if block else first_stride
            rectified = functional.relu(x)
            shortcut = x if block else convolve(f"{name}.shortcut", rectified, stride=stride)
            out = functional.relu(convolve(f"{name}.conv1", rectified))
            out = functional.relu(convolve(f"{name}.conv2", out, stride=stride, padding=1))
            x = convolve(f"{name}.conv3", out) + shortcut
    return x


@pytest.mark.parametrize(
    ("name", "whole", "published"),
    [("vgg6", vgg6, published_vgg6), ("preact_resnet50", preact_resnet50, published_preact_resnet50)],
)
def test_trunk_is_the_published_network_and_its_weights_go_round(name, whole, published):
    torch.manual_seed(0)
    backbone = build_backbone(name, zero_init_residual=False, width=0.25)
    state = trunk_state_dict(backbone.units)
    for value in state.values():
        if value.dim() == 1:
            value.copy_(torch.randn(value.shape) / 10)
    with torch.no_grad():
        ours = through(backbone.units, images(2, 16))
        torch.testing.assert_close(ours, published(state, images(2, 16)))
        model = whole(0.25)
        model.load_state_dict(state, strict=True)
        assert list(model.state_dict()) == list(state)
        assert torch.equal(model(images(2, 16)), ours)
        again = build_backbone(name, width=0.25)
        load_trunk_state_dict(again.units, model.state_dict())
        assert torch.equal(through(again.units, images(2, 16)), ours)


def test_vgg6_has_one_unit_block_per_layer_and_the_published_sizes():
    backbone = built("vgg6")
    assert [unit.name for unit in backbone.units] == [f"features.{i}" for i in (0, 2, 5, 7, 10, 13)]
    assert backbone.natural_cuts == tuple(range(6))
    assert unit_shapes(backbone, 16) == [
        (128, 16, 16), (256, 8, 8), (256, 8, 8), (512, 4, 4), (1024, 2, 2), (1024, 1, 1)
    ]  # fmt: skip
    kinds = [[type(part).__name__ for part in unit.parts] for unit in backbone.units[:2]]
    assert kinds == [["Conv2d", "ReLU"], ["Conv2d", "ReLU", "MaxPool2d"]]
    channels = (3, 128, 256, 256, 512, 1024, 1024)
    count = sum(9 * i * o + o for i, o in pairwise(channels))
    assert sum(p.numel() for unit in backbone.units for p in unit.parameters()) == count
    with pytest.raises(
        UserError, match=r"^image size 15 is too small for vgg6: features.13 cannot run on a map of 1 x 1$"
    ):
        trace_units(backbone, 15)


def test_preact_resnet50_has_a_stem_and_thirteen_blocks_in_three_stages():
    backbone = built("preact_resnet50")
    names = [f"layer{stage}.{block}" for stage, num in ((1, 3), (2, 4), (3, 6)) for block in range(num)]
    assert [unit.name for unit in backbone.units] == ["stem", *names]
    assert backbone.natural_cuts == (0, 4, 8)
    shapes = [(64, 16, 16), *[(256, 16, 16)] * 3, *[(512, 8, 8)] * 4, *[(1024, 4, 4)] * 6]
    assert unit_shapes(backbone, 16) == shapes


@pytest.mark.parametrize("name", SCALABLE)
def test_nothing_normalises(name):
    kinds = {type(module).__name__ for unit in built(name).units for module in unit.modules()}
    assert not [kind for kind in kinds if "Norm" in kind]
    # so a patch is seen in the same way whatever else is in the batch
    x = images(4, 16)
    with torch.no_grad():
        units = built(name).units
        torch.testing.assert_close(through(units, x)[:1], through(units, x[:1]))


def test_width_multiplies_all_channels_but_leaves_at_least_eight():
    assert [shape[0] for shape in unit_shapes(build_backbone("vgg6", width=0.3), 16)] == [38, 77, 77, 154, 307, 307]
    assert [shape[0] for shape in unit_shapes(build_backbone("vgg6", width=0.01), 16)] == [8, 8, 8, 8, 10, 10]
    channels = [shape[0] for shape in unit_shapes(build_backbone("preact_resnet50", width=0.5), 16)]
    assert channels == [32, *[128] * 3, *[256] * 4, *[512] * 6]
    channels = [shape[0] for shape in unit_shapes(build_backbone("preact_resnet50", width=0.01), 16)]
    assert channels == [8, *[32] * 13]


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("name", SCALABLE)
def test_activations_keep_their_size_through_an_untrained_network(name, zero):
    torch.manual_seed(0)
    x = images(16, 16)
    with torch.no_grad():
        for unit in build_backbone(name, zero_init_residual=zero, width=0.5).units:
            x = unit(x)
            assert 0.5 < x.square().mean().sqrt() < 4, unit.name


@pytest.mark.parametrize("name", SCALABLE)
def test_weights_are_kaiming_normal_over_the_fan_in_and_biases_zero(name):
    torch.manual_seed(0)
    state = trunk_state_dict(build_backbone(name, zero_init_residual=False).units)
    for key, value in state.items():
        if key.endswith("bias"):
            assert not value.any()
        else:
            scale = 13**-0.5 if "conv3" in key else 1
            assert value.std().item() == pytest.approx(scale * (2 / value[0].numel()) ** 0.5, rel=0.06), key


def test_zero_init_makes_each_block_its_shortcut():
    units = build_backbone("preact_resnet50", width=0.2).units
    with torch.no_grad():
        stem = units[0](images(2, 16))
        first = units[1](stem)
        shortcut = units[1].get_submodule("parts.0.shortcut")
        assert isinstance(shortcut, nn.Conv2d)
        assert torch.equal(first, shortcut(stem.relu()))
        assert torch.equal(units[2](first), first)


def test_a_block_leaves_its_input_as_it_was():
    units = build_backbone("preact_resnet50", width=0.2).units
    x = through(units[:2], images(2, 16))
    before = x.clone()
    units[2](x)
    assert (before < 0).any() and torch.equal(x, before)
