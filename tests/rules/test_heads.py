"""Heads: shapes and kinds at real sites, and every equation against an independent formulation."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from localsim.backbones import UnitBlock, build_backbone, unit_shapes
from localsim.errors import UserError
from localsim.gradients import constant
from localsim.rng import keyed
from localsim.rules.heads import HEADS, make_head
from localsim.rules.heads.auxiliary import InfoPro, Mirrored, NextStage, mirrored_blocks
from localsim.rules.heads.classifier import PredSim
from localsim.rules.heads.predictor import FeedbackPredictor, Predictor
from localsim.rules.heads.projector import Projector
from localsim.rules.readouts import make_readout
from localsim.rules.site import Site
from localsim.transport import TRANSPORTS, set_transport

CLASSES, WIDTHS = 5, (9, 7)
NETS = {"resnet20": 32, "vgg11": 32, "resnet18": 32}


def site(
    shape=(6,), *, stage=0, num_stages=3, unit=0, top_shape=(8, 2, 2), above=(), num_classes: int | None = CLASSES
):
    """Return a site; its end is a linear layer of 4."""
    return Site(
        stage=stage, num_stages=num_stages, unit=unit, num_units=unit + 1 + len(above), shape=shape,
        top_shape=top_shape, above=tuple(above), image_shape=(3, 16, 16), widths=WIDTHS, num_classes=num_classes,
        end=lambda width: nn.Linear(width, 4),
    )  # fmt: skip


def head(name: str, at: Site, **options):
    with keyed("head test"):
        return make_head(name, at, options).double()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Net:
    """What `end_step` reads of a network."""

    units: list[UnitBlock]


def blocks(name: str = "resnet20", image_size: int = 32) -> tuple[list[UnitBlock], list[tuple[int, int, int]]]:
    with keyed("trunk of the head test"):
        backbone = build_backbone(name)
    return list(backbone.units), unit_shapes(backbone, image_size)


# -- every head at real sites -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", NETS)
@pytest.mark.parametrize("name", HEADS)
def test_shapes_kinds_and_a_gradient_to_the_map_at_every_unit_block(name, backbone):
    units, shapes = blocks(backbone, NETS[backbone])
    made, n, size = HEADS[name], 2, NETS[backbone]
    for unit in sorted({0, 1, len(units) // 2, len(units) - 2, len(units) - 1}):
        grid = (3, 2) if made.takes == "patches" else None
        readout = make_readout(
            {"vector": "global"}.get(made.takes, made.takes), shapes[unit], expand_width=8, grid=grid
        )
        assert readout.kind == made.takes
        at = site(
            readout.out_shape, stage=unit, num_stages=len(units), unit=unit, top_shape=shapes[-1],
            above=units[unit + 1 :],
        )  # fmt: skip
        built = head(name, at)
        x = draw(n * (6 if grid else 1), *shapes[unit]).relu().requires_grad_()
        images = draw(n, 3, size, size)
        contexts = {"top": draw(n, *shapes[-1]), "images": images}
        context = getattr(made, "context", None)
        read = readout(x)
        assert read.shape == (n, *readout.out_shape)
        embedding = built(read) if context is None else built(read, contexts[context])
        channels = shapes[unit][0]
        expected = {
            "projector": [(n, WIDTHS[-1])], "none": [(n, channels)], "classifier": [(n, CLASSES)],
            "predsim": [(n, CLASSES), (n, channels)], "predictor": [(n, channels, 3, 2)] * 2,
            "feedback_predictor": [(n, channels, 1, 1)] * 2, "mirrored": [(n, 4)], "next_stage": [(n, 4)],
            "conv": [(n, 4)],
            "infopro": [(n, CLASSES), images.shape, images.shape],
            "stale_statistics": [(n, channels), (channels,), (channels,)],
        }[name]  # fmt: skip
        parts = embedding if isinstance(embedding, tuple) else (embedding,)
        assert isinstance(embedding, tuple) == (made.gives != "vector")
        assert [tuple(part.shape) for part in parts] == [tuple(shape) for shape in expected]
        sum((part * draw(*part.shape, seed=3)).sum() for part in parts).backward()
        assert x.grad is not None and bool(x.grad.flatten(1).abs().sum(1).gt(0).all())
        assert all(p.grad is None for block in units for p in block.parameters())
        trained = [p for p in built.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert bool(trained) == bool(list(built.parameters()))


def test_names_options_and_kinds_are_checked():
    with pytest.raises(UserError, match="unknown head 'mlp'; allowed: projector, none, classifier, conv, predsim"):
        make_head("mlp", site())
    with pytest.raises(UserError, match=r"head mirrored has no option 'width'; allowed: depth, pyramid$"):
        make_head("mirrored", site((6, 4, 4)), {"width": 3})
    with pytest.raises(UserError, match=r"head none has no option 'depth'; allowed: none$"):
        make_head("none", site(), {"depth": 3})
    with pytest.raises(UserError, match=r"head predsim cannot work on a vector, .*; allowed readouts: map$"):
        make_head("predsim", site())
    with pytest.raises(UserError, match=r"head predictor cannot work on a map, .*; allowed readouts: patches$"):
        make_head("predictor", site((6, 7, 7)), kind="map")
    with pytest.raises(UserError, match=r"head mirrored cannot work on patches, .*; allowed readouts: map$"):
        make_head("mirrored", site((6, 7, 7)), kind="patches")
    with pytest.raises(
        UserError, match=r"head classifier cannot work on a map, .*; allowed readouts: global, local2x2"
    ):
        make_head("classifier", site((6, 7, 7)))
    with pytest.raises(UserError, match="a classifier needs images with labels"):
        make_head("classifier", site(num_classes=None))


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("classifier", (6,), {"hidden": 128}, r"classifier: hidden is 128; allowed: a list of positive widths"),
        ("classifier", (6,), {"hidden": [0]}, r"classifier: hidden is \[0\]"),
        ("mirrored", (6, 4, 4), {"depth": 0}, "mirrored: depth is 0; allowed: whole numbers from 1"),
        ("mirrored", (6, 4, 4), {"pyramid": 1.5}, "mirrored: pyramid is 1.5; allowed: numbers from 0 to 1"),
        ("next_stage", (6, 4, 4), {"momentum": -0.1}, "next_stage: momentum is -0.1; allowed: numbers from 0 to 1"),
        ("predictor", (6, 7, 7), {"skip": -2}, "predictor: skip is -2; allowed: whole numbers from -1"),
        ("predictor", (6, 7, 7), {"steps": 0}, "predictor: steps is 0; allowed: whole numbers from 1"),
        ("predictor", (6, 7, 7), {"asymmetric": 1}, "predictor: asymmetric is 1; allowed: False, True"),
        ("infopro", (6, 4, 4), {"contrast": "yes"}, "infopro: contrast is 'yes'; allowed: False, True"),
        ("feedback_predictor", (6,), {"lateral": None}, "feedback_predictor: lateral is None"),
    ],
)
def test_option_values_are_checked(name, shape, options, message):
    with pytest.raises(UserError, match=message):
        make_head(name, site(shape), options)


# -- projector --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", [(5, 5), (4, 3, 6), (4,)])
def test_all_views_at_once_equal_view_after_view(transport, training, sizes):
    """Embeddings, running statistics, and gradients of weights and reads, however these cross the layers."""
    apart = head("projector", site()).train(training)
    assert isinstance(apart, Projector)
    set_transport(apart.named_modules(), transport, seed=1, error_width=3)
    together = copy.deepcopy(apart)
    found = []
    for made, embed in ((apart, lambda xs: [apart(x) for x in xs]), (together, together.forward_views)):
        reads = [draw(size, 6, seed=seed).requires_grad_() for seed, size in enumerate(sizes)]
        embeddings = embed(reads)
        upstream = [draw(*z.shape, seed=9 + i) for i, z in enumerate(embeddings)]
        targets = [*reads, *made.parameters()]
        grads = torch.autograd.grad(embeddings, targets, upstream, allow_unused=True)
        found.append([*embeddings, *grads, *made.buffers()])
    assert sum(x is not None for x in found[0]) > len(sizes) + 1
    for ours, reference in zip(found[1], found[0], strict=True):
        assert (ours is None) == (reference is None)
        if ours is not None and reference is not None:
            torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-14)


def test_all_views_at_once_call_a_linear_layer_once_and_a_batch_norm_view_by_view():
    made, calls = head("projector", site()), []
    for layer in made:
        layer.register_forward_pre_hook(lambda layer, args: calls.append((type(layer), len(args[0]))))
    made.forward_views([draw(4, 6), draw(3, 6)])
    assert calls == [(nn.Linear, 7), (nn.BatchNorm1d, 4), (nn.BatchNorm1d, 3), (nn.ReLU, 7), (nn.Linear, 7)]
    assert made[1].num_batches_tracked == 2


# -- classifier and predsim -------------------------------------------------------------------------------------------


def test_classifier_is_linear_or_an_mlp():
    assert [type(layer) for layer in head("classifier", site())] == [nn.Linear]
    made = head("classifier", site(), hidden=[11])
    assert [type(layer) for layer in made] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert made[0].weight.shape == (11, 6) and made[3].weight.shape == (CLASSES, 11)


def test_predsim_features_are_standard_deviations_of_a_convolution():
    made, x = head("predsim", site((6, 4, 5))), draw(3, 6, 4, 5)
    assert isinstance(made, PredSim)
    assert torch.equal(made(x)[0], made.classify.bias.expand(3, -1))  # W starts at zero
    nn.init.normal_(made.classify.weight)
    logits, features = made(x)
    weights = made.classify.weight.detach().numpy()
    expected = x.numpy().mean((2, 3)) @ weights.T + made.classify.bias.detach().numpy()
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-12, atol=1e-13)
    maps = F.conv2d(x, made.compare.weight, padding=1).detach().numpy()
    np.testing.assert_allclose(features.detach().numpy(), maps.std((2, 3), ddof=1), rtol=1e-12)


def test_predsim_on_one_position_compares_the_convolution_itself():
    made, x = head("predsim", site((6, 1, 1))), draw(3, 6, 1, 1)
    expected = x[:, :, 0, 0] @ made.compare.weight[:, :, 1, 1].T
    torch.testing.assert_close(made(x)[1], expected, rtol=1e-12, atol=1e-14)


# -- predictors -------------------------------------------------------------------------------------------------------


def test_predictions_are_one_matrix_per_step():
    made, z = head("predictor", site((6, 7, 4))), draw(3, 6, 7, 4)
    assert isinstance(made, Predictor)
    first, *predictions = made(z)
    assert first is z and len(predictions) == 5
    for p, matrix in zip(predictions, made.matrices, strict=True):
        weights = matrix.weight.detach().numpy()[:, :, 0, 0]
        np.testing.assert_allclose(p.detach().numpy(), np.einsum("dc,ncij->ndij", weights, z.numpy()), rtol=1e-11)


@pytest.mark.parametrize(("rows", "skip", "steps"), [(7, 1, 5), (7, 0, 5), (4, 1, 2), (3, 1, 1), (1, -1, 1), (9, 1, 5)])
def test_as_many_steps_as_fit_but_five(rows, skip, steps):
    assert len(head("predictor", site((6, rows, 2)), skip=skip).matrices) == steps


@pytest.mark.parametrize(
    ("rows", "options", "needed"), [(2, {}, 3), (1, {"skip": 0}, 2), (7, {"steps": 6}, 8), (4, {"steps": 3}, 5)]
)
def test_too_few_rows_for_the_steps_are_named(rows, options, needed):
    with pytest.raises(UserError, match=rf"predictor needs {needed} or more rows .*, but there are {rows};"):
        make_head("predictor", site((6, rows, 2)), options)


def test_asymmetric_gradients_are_those_of_the_two_term_formula():
    """For f(z, p) = sum(z[below] * p): dz = p at the targets + W2^T z[below] at the contexts, none through W1."""
    made = head("predictor", site((6, 4, 2)), steps=1, asymmetric=True)
    z = draw(3, 6, 4, 2).requires_grad_()
    target, p, q = made(z)
    (target[:, :, 2:] * p[:, :, :-2]).sum().add((constant(target)[:, :, 2:] * q[:, :, :-2]).sum()).backward()
    above, below = z.detach().numpy()[:, :, :-2], z.detach().numpy()[:, :, 2:]
    w1 = made.matrices[0].weight.detach().numpy()[:, :, 0, 0]
    w2 = made.context_matrices[0].weight.detach().numpy()[:, :, 0, 0]
    dz = np.zeros(z.shape)
    dz[:, :, 2:] += np.einsum("dc,ncij->ndij", w1, above)
    dz[:, :, :-2] += np.einsum("dc,ndij->ncij", w2, below)
    assert z.grad is not None
    np.testing.assert_allclose(z.grad.numpy(), dz, rtol=1e-11, atol=1e-13)
    outer = np.einsum("ndij,ncij->dc", below, above)
    for matrix in (made.matrices[0], made.context_matrices[0]):
        np.testing.assert_allclose(matrix.weight.grad.numpy()[:, :, 0, 0], outer, rtol=1e-11, atol=1e-12)
    assert not np.allclose(w1, w2)


@pytest.mark.parametrize("lateral", [False, True])
def test_feedback_predicts_from_the_top_and_reaches_the_stage_through_the_target_only(lateral):
    made = head("feedback_predictor", site(), lateral=lateral)
    assert isinstance(made, FeedbackPredictor)
    z, top = draw(3, 6).requires_grad_(), draw(3, 8, 2, 2, seed=1)
    target, p = made(z, top)
    weight = made.matrix.weight.detach()
    expected = top.mean((2, 3)) @ weight[:, :8].T
    if lateral:
        expected = expected + z.detach() @ weight[:, 8:].T
    assert weight.shape == (6, 14 if lateral else 8)
    torch.testing.assert_close(p.detach()[:, :, 0, 0], expected, rtol=1e-12, atol=1e-14)
    (target * p).sum().backward()
    torch.testing.assert_close(z.grad, expected, rtol=1e-12, atol=1e-14)


# -- mirrored ---------------------------------------------------------------------------------------------------------


def test_mirrored_blocks_of_all_sixteen_sites_of_resnet32():
    """D = 6, pyramid 0.5: the depth falls from 6 by 2.5 * position, and the highest block above is always taken."""
    chosen = [mirrored_blocks(15 - stage, 6, 0.5, stage / 15) for stage in range(16)]
    assert [len(which) for which in chosen] == [6, 6, 6, 6, 5, 5, 5, 5, 5, 4, 4, 4, 3, 2, 1, 0]
    assert chosen[0] == [1, 4, 7, 9, 11, 14]  # round(2.5 i) - 1, halves to even
    assert chosen[10] == [0, 1, 3, 4]
    for stage, which in enumerate(chosen[:15]):
        assert which[-1] == 14 - stage and sorted(set(which)) == which


@pytest.mark.parametrize(("depth", "pyramid", "position", "num"), [(6, 0, 1, 6), (6, 1, 1, 1), (1, 0.5, 0.3, 1)])
def test_mirrored_depth_at_its_ends(depth, pyramid, position, num):
    assert len(mirrored_blocks(20, depth, pyramid, position)) == num


def test_mirrored_never_takes_a_block_twice():
    for above in range(1, 60):
        for depth in range(1, 62):
            which = mirrored_blocks(above, depth, 0, 0.5)
            assert len(set(which)) == len(which) == min(depth, above)
            assert min(which) >= 0 and which == sorted(which) and which[-1] == above - 1


def test_mirrored_draws_weights_of_its_own_and_leaves_the_trunk_alone():
    units, shapes = blocks()
    with torch.no_grad():
        for p in (p for unit in units for p in unit.parameters()):
            p.fill_(7)
    before = [copy.deepcopy(unit.state_dict()) for unit in units]
    made = head("mirrored", site(shapes[1], unit=1, top_shape=shapes[-1], above=units[2:]), depth=4, pyramid=0)
    assert isinstance(made, Mirrored)
    made(draw(2, *shapes[1]))
    for unit, state in zip(units, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in unit.state_dict().items())
    shared = {id(p) for unit in units for p in unit.parameters()}
    for module in made.blocks.modules():
        assert not shared & {id(p) for p in module.parameters()}
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all()) and bool((module.bias == 0).all())


def test_mirrored_adapts_channels_and_size_where_blocks_are_left_out():
    """ResNet-20 above layer1.0: of 8 blocks the 4th (layer2.1, 32 x 16 x 16) and the 8th (layer3.2, 64 x 8 x 8)."""
    units, shapes = blocks()
    made = head("mirrored", site(shapes[1], unit=1, top_shape=shapes[-1], above=units[2:]), depth=2, pyramid=0)
    x = draw(2, *shapes[1])
    sizes = []
    for layer in made.blocks:
        x = layer(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(32, 16, 16), (32, 16, 16), (64, 8, 8), (64, 8, 8)]
    whole = head("mirrored", site(shapes[1], unit=1, top_shape=shapes[-1], above=units[2:]), depth=9, pyramid=0)
    assert [block.name for block in whole.blocks] == [unit.name for unit in units[2:]]  # nothing left out: no adapter


# -- infopro ----------------------------------------------------------------------------------------------------------


def test_infopro_target_is_the_pixels_where_a_batch_holds_black_and_white():
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pixels[0, :, 0, 0], pixels[1, :, 2, 3] = 0, 1
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    made = head("infopro", site((6, 4, 4)))
    _, _, target = made(draw(4, 6, 4, 4), (pixels - mean) / std)
    torch.testing.assert_close(target, pixels, rtol=0, atol=1e-14)
    _, _, target = made(draw(4, 6, 4, 4), draw(4, 3, 8, 8))
    assert float(target.min()) == 0 and float(target.max()) == 1
    assert torch.equal(made(draw(4, 6, 4, 4), torch.full((4, 3, 8, 8), 0.3))[2], torch.zeros(4, 3, 8, 8))


def test_infopro_target_is_constant():
    images = draw(2, 3, 8, 8).requires_grad_()
    assert not head("infopro", site((6, 4, 4)))(draw(2, 6, 4, 4), images)[2].requires_grad


@pytest.mark.parametrize(("channels", "top", "wide", "stride"), [(16, 64, 32, 2), (32, 64, 64, 2), (64, 64, 64, 1)])
def test_infopro_head_has_the_widths_of_the_released_code(channels, top, wide, stride):
    made = head("infopro", site((channels, 8, 8), top_shape=(top, 8, 8)), contrast=True)
    assert isinstance(made, InfoPro)
    conv = made.features[0]
    assert isinstance(conv, nn.Conv2d)
    assert (conv.out_channels, conv.stride[0]) == (wide, stride)
    vector, image, _ = made(draw(2, channels, 8, 8), draw(2, 3, 32, 32))
    assert vector.shape == (2, 128) and image.shape == (2, 3, 32, 32)


# -- next stage -------------------------------------------------------------------------------------------------------


def test_next_stage_average_follows_the_closed_form():
    units, shapes = blocks()
    for unit in units:
        unit.double()
    made = head("next_stage", site(shapes[2], unit=2, top_shape=shapes[-1], above=units[3:]), momentum=0.9)
    assert isinstance(made, NextStage) and made.average is not None
    names = [name for name, _ in units[3].named_parameters()]
    history = [copy.deepcopy(dict(units[3].named_parameters()))]
    assert all(torch.equal(dict(made.average.named_buffers())[name], history[0][name]) for name in names)
    for step in range(3):
        with torch.no_grad():
            for i, p in enumerate(units[3].parameters()):
                p.add_(draw(*p.shape, seed=100 * step + i))
        history.append(copy.deepcopy(dict(units[3].named_parameters())))
        made.end_step(Net(units))
    averages, copied = dict(made.average.named_buffers()), dict(made.copy.named_parameters())
    for name in names:
        w = [values[name].detach() for values in history]
        expected = 0.9**3 * w[0] + 0.1 * (0.9**2 * w[1] + 0.9 * w[2] + w[3])
        torch.testing.assert_close(averages[name], expected, rtol=1e-12, atol=1e-13)
        assert torch.equal(copied[name], w[0])


def test_next_stage_average_is_saved_and_not_trained_but_lets_the_gradient_through():
    units, shapes = blocks()
    made = head("next_stage", site(shapes[2], unit=2, top_shape=shapes[-1], above=units[3:]))
    assert not list(made.average.parameters())
    assert {f"average.{name}" for name in units[3].state_dict()} <= set(made.state_dict())
    assert all(not value.requires_grad for value in made.average.buffers())
    twin = copy.deepcopy(units[3]).double()
    for p in made.copy.parameters():
        nn.init.zeros_(p)  # the shortcut of LB stays
    x = draw(2, *shapes[2]).relu().requires_grad_()
    y = x.detach().clone().requires_grad_()
    made(x).sum().backward()
    made.end(F.relu(y).mean((2, 3)) + twin(y).mean((2, 3))).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-14)
    fresh = head("next_stage", site(shapes[2], unit=2, top_shape=shapes[-1], above=units[3:]))
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh(x), made(x))


def test_next_stage_of_the_highest_stage_has_nothing_to_follow():
    made = head("next_stage", site((8, 2, 2), stage=2, unit=5, top_shape=(8, 2, 2)))
    made.end_step(Net([]))
    x = draw(3, 8, 2, 2)
    torch.testing.assert_close(made(x), made.end(x.mean((2, 3))))


# -- conv -------------------------------------------------------------------------------------------------------------


def test_conv_is_convolutions_batch_norms_and_a_mean():
    made, h = head("conv", site((6, 5, 5)), channels=[7, 3], kernel=3), draw(4, 6, 5, 5)
    x = h
    for index in (0, 3):
        x = torch.nn.functional.conv2d(x, made.layers[index].weight, padding=1)
        centred = x - x.mean((0, 2, 3), keepdim=True)
        x = (centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()).clamp(min=0)
    expected = x.mean((2, 3)) @ made.end.weight.T + made.end.bias
    torch.testing.assert_close(made(h), expected, rtol=1e-12, atol=1e-12)
    assert head("conv", site((6, 5, 5)))(h).shape == (4, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channels": []}, "conv: channels is []; allowed: a list of positive numbers, e.g. [128, 64]"),
        ({"channels": [8, 0]}, "conv: channels is [8, 0]; allowed"),
        ({"kernel": 2}, "conv: kernel is 2; allowed: odd numbers from 1"),
    ],
)
def test_conv_options(options, said):
    with pytest.raises(UserError) as error:
        head("conv", site((6, 5, 5)), **options)
    assert str(error.value).startswith(said)
