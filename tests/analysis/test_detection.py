from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import tiny_config, train_in
from torch import nn

from localsim.analysis.detection import (
    KINDS,
    TransferCheck,
    backbone_name,
    check_transfer,
    coloured_boxes,
    detection_model,
)
from localsim.assembly import build_network
from localsim.errors import UserError
from localsim.network import LocalNetwork
from localsim.runs import load_run

STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def network(backbone: str = "resnet18", stem: str = "imagenet", **settings) -> LocalNetwork:
    net = build_network(tiny_config(backbone=backbone, stem=stem, image_size=32, **settings)).eval()
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # as if it had seen something
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(0.1 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return net


@pytest.fixture(scope="module")
def resnet18() -> LocalNetwork:
    return network()


@pytest.mark.parametrize("stem, stride", [("imagenet", 4), ("cifar", 1)])
def test_the_trunk_of_the_detector_computes_what_the_network_computes(stem, stride):
    net = network(stem=stem)
    trunk = detection_model(net, num_classes=3, **STATISTICS).eval().backbone.body
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = list(trunk(images).values())
        for ours, theirs in zip(net.stage_outputs(images), maps, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert [m.shape[-1] for m in maps] == [32 // (stride * 2**level) for level in range(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_transfer_of_a_network_passes_and_is_deterministic(kind, resnet18):
    before = {name: x.clone() for name, x in resnet18.state_dict().items()}
    check = check_transfer(resnet18, steps=2, kind=kind, size=64, batch_size=1, **STATISTICS)
    assert check.passed and check.backbone == "resnet18"
    assert (check.compared, check.different) == (100, ())  # 20 convolutions, 20 batch norms of 4 tensors
    assert (check.trainable, check.without_gradient) == (20, ())
    assert len(check.losses) == 2
    for loss in check.losses:
        parts = {name: value for name, value in loss.items() if name != "total"}
        assert len(parts) == (4 if kind == "faster_rcnn" else 5)
        assert loss["total"] == pytest.approx(sum(parts.values()), rel=1e-5)
        assert all(torch.isfinite(torch.tensor(value)) for value in parts.values())
    assert "100 of 100" in str(check) and "passed" in str(check)
    assert all(torch.equal(x, before[name]) for name, x in resnet18.state_dict().items()), "the network itself stays"
    if kind == "faster_rcnn":
        again = check_transfer(resnet18, steps=1, kind=kind, size=64, batch_size=1, **STATISTICS)
        assert again.losses[0] == check.losses[0]


def test_a_loss_that_is_not_finite_a_weight_that_differs_or_gets_no_gradient_fails():
    good = TransferCheck("faster_rcnn", "resnet18", "frozen", ({"total": 1.0},), 100, (), (), 20)
    assert good.passed
    for change in ({"losses": ({"total": math.nan},)}, {"different": ("conv1.weight",)}, {"without_gradient": ("a",)}):
        assert not replace(good, **change).passed


def test_trained_batch_norms_travel_with_their_counters(resnet18):
    check = check_transfer(resnet18, steps=1, norm="batch", size=64, batch_size=2, **STATISTICS)
    assert (check.compared, check.trainable) == (120, 60) and check.passed


def test_a_trunk_whose_residual_branches_are_frozen_at_zero_fails_the_check():
    net = network(zero_init_residual=True)
    check = check_transfer(net, steps=1, size=64, batch_size=1, **STATISTICS)
    assert not check.passed and "FAILED" in str(check)
    assert "layer1.0.conv1.weight" in check.without_gradient and "conv1.weight" not in check.without_gradient


@pytest.mark.parametrize("layers, first", [(0, None), (1, "layer4"), (3, "layer2"), (5, "conv1")])
def test_only_the_upper_layers_asked_for_are_trained(layers, first, resnet18):
    trunk = detection_model(resnet18, num_classes=3, trainable_layers=layers, norm="batch", **STATISTICS).backbone.body
    trained = [name.split(".")[0] for name, tensor in trunk.named_parameters() if tensor.requires_grad]
    assert (trained[0] if trained else None) == first
    assert ("bn1" in trained) == (layers == 5)


def test_the_detector_normalises_and_resizes_as_told(resnet18):
    model = detection_model(resnet18, num_classes=7, min_size=100, max_size=200, boxes_per_image=32, **STATISTICS)
    assert (model.transform.image_mean, model.transform.image_std) == ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    assert (model.transform.min_size, model.transform.max_size) == ((100,), 200)
    assert model.roi_heads.box_predictor.cls_score.out_features == 7
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 32
    assert detection_model(resnet18, num_classes=2).transform.image_mean == [0.485, 0.456, 0.406]


def test_a_run_brings_the_statistics_of_its_data(tmp_path):
    settings = {"backbone": "resnet18", "image_size": 32, "train_images": 8, "test_images": 10, "epochs": 1}
    net = train_in(tmp_path / "run", **settings)
    run = load_run(tmp_path / "run")
    model = detection_model(run, num_classes=2)
    assert model.transform.image_mean != [0.485, 0.456, 0.406]
    weights = model.backbone.body.state_dict()
    assert all(torch.equal(weights[name], x) for name, x in net.trunk_state_dict().items() if name in weights)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_resnets_are_known_by_their_blocks(name):
    with torch.device("meta"):
        net = build_network(tiny_config(backbone=name, stem="imagenet", image_size=32))
    assert backbone_name(net) == name


@pytest.mark.parametrize("backbone", ["resnet20", "vgg6"])
def test_other_backbones_are_refused(backbone):
    net = build_network(tiny_config(backbone=backbone, image_size=32))
    with pytest.raises(UserError, match="cannot carry a detector; allowed backbones: resnet18, resnet34, resnet50, re"):
        detection_model(net, num_classes=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "yolo"}, "unknown detector 'yolo'; allowed: faster_rcnn, mask_rcnn"),
        ({"norm": "group"}, "unknown norm 'group'; allowed: frozen, batch"),
        ({"num_classes": 1}, "num_classes 1 must be at least 2"),
        ({"trainable_layers": 6}, "trainable_layers 6 must lie between 0 and 5"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean and std go together"),
    ],
)
def test_what_cannot_be_built_is_said(options, message, resnet18):
    with pytest.raises(UserError, match=message):
        detection_model(resnet18, **{"num_classes": 2, **options})


def test_a_check_of_no_steps_is_refused(resnet18):
    with pytest.raises(UserError, match="steps >= 1, size >= 32 and batch_size >= 1, not 0, 128 and 2"):
        check_transfer(resnet18, steps=0)


def test_made_up_boxes_are_where_their_colour_is():
    images, targets = coloured_boxes(6, 64, seed=1)
    assert torch.equal(images, coloured_boxes(6, 64, seed=1)[0])
    assert images.shape == (6, 3, 64, 64) and 0 <= float(images.min()) and float(images.max()) <= 1
    for image, target in zip(images, targets, strict=True):
        assert 1 <= len(target["boxes"]) <= 4
        assert int(target["masks"].sum(0).max()) == 1, "no rectangle hides another"
        for box, label, mask in zip(target["boxes"].int().tolist(), target["labels"], target["masks"], strict=True):
            x1, y1, x2, y2 = box
            assert 0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 64 and 1 <= int(label) <= 4
            assert int(mask.sum()) == (x2 - x1) * (y2 - y1) == int(mask[y1:y2, x1:x2].sum())
            colours = image[:, y1:y2, x1:x2].flatten(1)
            assert torch.equal(colours.amin(1), colours.amax(1)) and float(colours[:, 0].std()) > 0.1
