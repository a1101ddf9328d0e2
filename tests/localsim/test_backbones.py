from __future__ import annotations

import copy
import re
from functools import cache

import pytest
import torch
import torchvision
from tiny import images, through
from torch import nn

from localsim.backbones import (
    BACKBONES,
    SCALABLE,
    TRACE_BATCH,
    build_backbone,
    load_trunk_state_dict,
    receptive_fields,
    trace_units,
    trunk_state_dict,
    unit_shapes,
)
from localsim.cifar_resnets import CifarBasicBlock, CifarResNet
from localsim.errors import UserError

RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101"]
VGGS = ["vgg11", "vgg11_bn"]
CIFAR_BLOCKS = {"resnet20": 3, "resnet32": 5, "resnet110": 18}

# for tests that leave the weights alone: building a VGG initialises 120 million classifier weights too
built = cache(build_backbone)


def whole_model(name):
    """The published model whose forward ends in the flattened map before pooling."""
    if name in CIFAR_BLOCKS:
        model = CifarResNet(CIFAR_BLOCKS[name])
    else:
        model = torchvision.models.get_model(name, weights=None)
    model.avgpool = nn.Identity()
    if name in VGGS:
        model.classifier = nn.Identity()
    else:
        model.fc = nn.Identity()
    return model


def randomise(state):
    generator = torch.Generator().manual_seed(0)
    for value in state.values():
        if value.is_floating_point():
            value.copy_(0.5 + torch.rand(value.shape, generator=generator) if value.dim() == 1 else value)


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", [*RESNETS, *VGGS, *CIFAR_BLOCKS])
def test_trunk_loads_into_the_published_model_and_back_with_equal_outputs(name):
    torch.manual_seed(0)
    backbone, model = build_backbone(name), whole_model(name)
    randomise(trunk_state_dict(backbone.units))
    model.load_state_dict(trunk_state_dict(backbone.units), strict=True)
    for train in (True, False):  # training first, so that evaluation sees running statistics that have moved
        model.train(train)
        for unit in backbone.units:
            unit.train(train)
        with torch.no_grad():
            ours, theirs = through(backbone.units, images()).flatten(1), model(images())
        assert ours.std() > 0
        assert torch.equal(ours, theirs)
    moved = model.state_dict()
    assert list(trunk_state_dict(backbone.units)) == list(moved)
    again = built(name)
    load_trunk_state_dict(again.units, moved)
    assert all(torch.equal(value, moved[key]) for key, value in trunk_state_dict(again.units).items())
    with torch.no_grad():
        assert torch.equal(through([unit.eval() for unit in again.units], images()).flatten(1), model(images()))


@pytest.mark.parametrize(
    ("name", "zero"), [("resnet18", True), ("resnet50", True), ("resnet50", False), ("vgg11", True)]
)
def test_initialisation_is_torchvisions_own(name, zero):
    options = {} if name in VGGS else {"zero_init_residual": zero}
    torch.manual_seed(3)
    theirs = torchvision.models.get_model(name, weights=None, **options).state_dict()
    torch.manual_seed(3)
    ours = trunk_state_dict(build_backbone(name, zero_init_residual=zero).units)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    if name not in VGGS:
        last = "layer1.0.bn3.weight" if name == "resnet50" else "layer1.0.bn2.weight"
        assert (ours[last] == (0 if zero else 1)).all()


def test_resnet50_has_the_published_number_of_parameters():
    backbone = built("resnet50")
    trunk = sum(num_parameters(unit) for unit in backbone.units)
    assert trunk == 23_508_032
    assert trunk + 2048 * 1000 + 1000 == 25_557_032


@pytest.mark.parametrize(("name", "count"), [("resnet20", 269_722), ("resnet32", 464_154), ("resnet110", 1_727_962)])
def test_cifar_resnets_have_the_published_number_of_parameters(name, count):
    # He et al. 2016, Table 6: 0.27M, 0.46M, 1.7M, with the 10-way classifier
    assert num_parameters(CifarResNet(CIFAR_BLOCKS[name])) == count
    assert sum(num_parameters(unit) for unit in build_backbone(name).units) == count - (64 * 10 + 10)
    depth = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in CifarResNet(CIFAR_BLOCKS[name]).modules())
    assert name == f"resnet{depth}"


def test_cifar_shortcut_keeps_every_second_pixel_and_appends_zero_channels():
    block = CifarBasicBlock(16, 32, stride=2)
    nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 16, 9, 9)
    expected = torch.zeros(2, 32, 5, 5)
    for i in range(5):
        for j in range(5):
            expected[:, :16, i, j] = x[:, :, 2 * i, 2 * j].relu()
    assert torch.equal(block(x), expected)


def test_cifar_resnet_gives_logits_and_zero_init_makes_each_block_its_shortcut():
    assert CifarResNet(1, num_classes=7)(images()).shape == (2, 7)
    units = build_backbone("resnet20").units
    stem = units[0](images())
    assert torch.equal(units[1](stem), stem)
    units = build_backbone("resnet20", zero_init_residual=False).units
    assert not torch.equal(units[1](stem), stem)


@pytest.mark.parametrize(
    ("name", "num_units", "natural", "names"),
    [
        ("resnet18", 9, (0, 3, 5, 7), ["stem", "layer1.0", "layer1.1", "layer2.0"]),
        ("resnet34", 17, (0, 4, 8, 14), ["stem", "layer1.0"]),
        ("resnet50", 17, (0, 4, 8, 14), ["stem", "layer1.0"]),
        ("resnet101", 34, (0, 4, 8, 31), ["stem", "layer1.0"]),
        ("vgg11", 8, (0, 1, 2, 4, 6), [f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18)]),
        ("vgg11_bn", 8, (0, 1, 2, 4, 6), [f"features.{i}" for i in (0, 4, 8, 11, 15, 18, 22, 25)]),
        ("resnet20", 10, (0, 4, 7), ["stem", "layer1.0", "layer1.1", "layer1.2", "layer2.0"]),
        ("resnet32", 16, (0, 6, 11), ["stem"]),
        ("resnet110", 55, (0, 19, 37), ["stem"]),
    ],
)
def test_unit_blocks_and_natural_stages(name, num_units, natural, names):
    backbone = built(name)
    assert (backbone.name, len(backbone.units), backbone.natural_cuts) == (name, num_units, natural)
    assert [unit.name for unit in backbone.units][: len(names)] == names
    later = [backbone.units[start].name for start in natural[1:]]
    if name not in VGGS:
        assert later == [f"layer{stage}.0" for stage in range(2, len(natural) + 1)]


def test_every_backbone_is_tested_above():
    # those that can be scaled are tested in test_unnormalised.py
    assert set(BACKBONES) == {*RESNETS, *VGGS, *CIFAR_BLOCKS, *SCALABLE}


def test_max_pool_closes_the_unit_of_its_convolution():
    kinds = [[type(part).__name__ for part in unit.parts] for unit in built("vgg11_bn").units[1:3]]
    assert kinds == [["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"], ["Conv2d", "BatchNorm2d", "ReLU"]]


def test_cifar_stem_keeps_the_resolution():
    backbone = build_backbone("resnet50", stem="cifar")
    assert unit_shapes(backbone, 32)[0] == (64, 32, 32)
    assert unit_shapes(backbone, 32)[-1] == (2048, 4, 4)
    state = trunk_state_dict(backbone.units)
    assert state["conv1.weight"].shape == (64, 3, 3, 3)
    # Kaiming normal over the fan-out, 64 x 3 x 3
    assert state["conv1.weight"].std() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)
    assert list(state) == list(trunk_state_dict(built("resnet50").units))
    assert unit_shapes(build_backbone("resnet20", stem="cifar"), 32) == unit_shapes(build_backbone("resnet20"), 32)


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "resnet32"])
def test_traced_shapes_are_those_of_a_real_forward_and_nothing_is_changed(name):
    backbone = built(name)
    before = {key: value.clone() for key, value in trunk_state_dict(backbone.units).items()}
    backbone.units[0].train()
    backbone.units[1].eval()
    with torch.no_grad():
        shapes = unit_shapes(backbone, 40)
    assert backbone.units[0].training and not backbone.units[1].training
    assert all(torch.equal(value, before[key]) for key, value in trunk_state_dict(backbone.units).items())
    x = images(size=40)
    for unit, shape in zip(backbone.units, shapes, strict=True):
        x = unit(x)
        assert tuple(x.shape[1:]) == shape


def test_trace_counts_what_a_convolution_and_relu_save():
    # input and, kept once though convolution, ReLU and max-pool all touch it, the rectified map; then int64 indices
    unit = trace_units(built("vgg11"), 32)[0]
    expected = [3 * 32 * 32 * 4, 64 * 32 * 32 * 4, 64 * 16 * 16 * 8]
    assert sorted(unit.saved.values()) == sorted(TRACE_BATCH * size for size in expected)


def test_trunk_keys_do_not_depend_on_where_unit_blocks_are_registered():
    backbone = build_backbone("resnet18")
    keys = list(trunk_state_dict(backbone.units))
    stages = nn.ModuleDict({"first": nn.Sequential(*backbone.units[:4]), "second": nn.Sequential(*backbone.units[4:])})
    nn.SyncBatchNorm.convert_sync_batchnorm(stages)
    assert list(trunk_state_dict([*stages["first"], *stages["second"]])) == keys
    assert {key.split(".")[0] for key in trunk_state_dict(stages["second"])} == {"layer2", "layer3", "layer4"}


def test_loading_ignores_classifiers_and_accepts_weights_without_batch_counters():
    backbone = build_backbone("resnet18")
    model = torchvision.models.resnet18(weights=None)
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    backbone.units[0](images())
    load_trunk_state_dict(backbone.units, state)
    ours = trunk_state_dict(backbone.units)
    assert torch.equal(ours["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
    assert ours["bn1.num_batches_tracked"] == 0
    vgg = built("vgg11")
    load_trunk_state_dict(vgg.units, {**trunk_state_dict(vgg.units), "classifier.0.weight": torch.zeros(1)})


def test_loading_other_weights_says_what_differs_and_copies_nothing():
    backbone = build_backbone("resnet18")
    before = {key: value.clone() for key, value in trunk_state_dict(backbone.units).items()}
    state = {key: torch.zeros_like(value) for key, value in before.items()}
    for name in ("bn1.weight", "bn1.bias", "layer1.0.bn1.weight", "layer4.1.bn2.bias"):
        del state[name]
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    state["layer9.weight"] = torch.zeros(1)
    message = (
        "these weights are of another architecture: "
        "missing: bn1.weight, bn1.bias, layer1.0.bn1.weight and 1 more; unexpected: layer9.weight; "
        "of another shape: conv1.weight (64, 3, 3, 3) instead of (64, 3, 7, 7)"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_trunk_state_dict(backbone.units, state)
    assert all(torch.equal(value, before[key]) for key, value in trunk_state_dict(backbone.units).items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "resnet51"},
            "unknown backbone 'resnet51'; allowed: "
            "resnet18, resnet34, resnet50, resnet101, vgg11, vgg11_bn, resnet20, resnet32, resnet110, vgg6, "
            "preact_resnet50; one of your own is registered by a file: --rule path/to/rule.py",
        ),
        ({"name": "resnet50", "stem": "tiny"}, "unknown stem 'tiny'; allowed: imagenet, cifar"),
        (
            {"name": "vgg11", "stem": "cifar"},
            "stem 'cifar' has no meaning for vgg11, which begins with a 3x3 convolution; allowed: imagenet",
        ),
        (
            {"name": "preact_resnet50", "stem": "cifar"},
            "stem 'cifar' has no meaning for preact_resnet50, which begins with a 5x5 convolution; allowed: imagenet",
        ),
        (
            {"name": "resnet20", "width": 0.5},
            "width 0.5 has no meaning for resnet20, whose channels are fixed; allowed: 1, "
            "or one of the backbones vgg6, preact_resnet50",
        ),
        ({"name": "vgg6", "width": 0}, "width 0 is no factor for channels; allowed: numbers above 0"),
        ({"name": "vgg6", "width": float("nan")}, "width nan is no factor for channels; allowed: numbers above 0"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        build_backbone(**arguments)


def seen_by_the_centre(units, size):
    """The side of what the centre of each unit block's output depends on, by the gradient of a positive network."""
    units = copy.deepcopy(units)
    for unit in units:
        for module in unit.eval().modules():
            if isinstance(module, nn.Conv2d):
                nn.init.constant_(module.weight, 1 / module.weight[0].numel())
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
            for name, child in list(module.named_children()):
                if isinstance(child, nn.MaxPool2d):  # whose gradient reaches one of its inputs only
                    setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
    # a strip is enough, for the fields are square; float64, for the corners weigh little
    x = torch.ones(1, 3, 32, size, dtype=torch.float64, requires_grad=True)
    out, sides = x, []
    for unit in units:
        out = unit.double()(out)
        centre = out[0, :, out.shape[2] // 2, out.shape[3] // 2].sum()
        (gradient,) = torch.autograd.grad(centre, x, retain_graph=True)
        columns = gradient[0].abs().amax((0, 1)).nonzero().flatten()
        assert 0 < columns[0] and columns[-1] < size - 1, "the image is too small to show the whole field"
        sides.append(int(columns[-1] - columns[0]) + 1)
    return sides


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 512), ("resnet20", 128), ("vgg11", 256), ("vgg6", 96), ("preact_resnet50", 96)]
)
def test_receptive_fields_are_what_the_gradient_of_the_centre_covers(name, size):
    backbone = built(name)
    before = {key: value.clone() for key, value in trunk_state_dict(backbone.units).items()}
    fields = receptive_fields(backbone.units)
    assert fields == seen_by_the_centre(backbone.units, size)
    assert all(torch.equal(value, before[key]) for key, value in trunk_state_dict(backbone.units).items())


def test_receptive_field_of_the_cifar_stem():
    assert receptive_fields(build_backbone("resnet18", stem="cifar").units)[:2] == [3, 7]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (16, "image size 16 is too small for vgg11: features.18 cannot run on a map of 1 x 1"),
        (0, "image size 0 is not a number of pixels; allowed: whole numbers from 1"),
        (32.0, "image size 32.0 is not a number of pixels; allowed: whole numbers from 1"),
    ],
)
def test_image_sizes_that_cannot_be_run_are_refused(size, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        unit_shapes(built("vgg11"), size)
