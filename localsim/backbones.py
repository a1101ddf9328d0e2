"""Backbones as rows of unit blocks, the smallest pieces between which a network may be cut; torchvision's names kept.

A unit block is the stem, one residual block (a cut inside a skip connection is ill-defined) or one convolution layer
of a VGG with what follows it up to the next convolution.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from localsim.cifar_resnets import BLOCKS_PER_STAGE, CifarResNet
from localsim.errors import UserError, one_of
from localsim.own_backbones import REGISTERED, Split, make_registered
from localsim.unit_blocks import Backbone as Backbone
from localsim.unit_blocks import UnitBlock as UnitBlock
from localsim.unnormalised import preact_resnet50, vgg6

STEMS = ("imagenet", "cifar")
_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
_VGGS = ("vgg11", "vgg11_bn", "vgg6")
# backbones with one stem only, and the kernel of its convolution
_FIXED_STEMS = {**dict.fromkeys(_VGGS, "3x3"), "preact_resnet50": "5x5"}
SCALABLE = ("vgg6", "preact_resnet50")
"""The backbones whose channels can be scaled by a width."""
_CLASSIFIERS = ("fc.", "classifier.")
_SHORTCUTS = {"downsample", "shortcut"}
# layers of a user's own backbone that take positions together, and of which `receptive_fields` knows no size
_UNCOUNTED = (nn.MultiheadAttention, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ConvTranspose2d)
# batch norm over a single image fails on a 1 x 1 map, so two are traced
TRACE_BATCH = 2


@dataclass(frozen=True)
class UnitTrace:
    """What one unit block does to a float32 batch of `TRACE_BATCH` images in a training forward.

    Attributes:
        shape: `(channels, height, width)` of its output.
        saved: bytes of every storage that autograd keeps for its backward, by an identity that is shared between
            the unit blocks of one trace: a block's output may be kept by itself and by the next block.
            Parameters and buffers are left out.
    """

    shape: tuple[int, int, int]
    saved: dict[int, int]


def _torchvision_resnet(name: str, zero_init_residual: bool, width: float) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, zero_init_residual=zero_init_residual)


def _torchvision_vgg(name: str, zero_init_residual: bool, width: float) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None)


def _cifar_resnet(name: str, zero_init_residual: bool, width: float) -> nn.Module:
    return CifarResNet(BLOCKS_PER_STAGE[name], zero_init_residual=zero_init_residual)


BACKBONES: dict[str, Callable[[bool, float], nn.Module]] = {
    **{name: partial(_torchvision_resnet, name) for name in _RESNETS},
    **{name: partial(_torchvision_vgg, name) for name in ("vgg11", "vgg11_bn")},
    **{name: partial(_cifar_resnet, name) for name in BLOCKS_PER_STAGE},
    "vgg6": lambda zero_init_residual, width: vgg6(width),
    "preact_resnet50": lambda zero_init_residual, width: preact_resnet50(width, zero_init_residual=zero_init_residual),
}
"""localsim's own backbones: the function that builds the whole model, given `zero_init_residual` and `width`."""


def register_backbone(name: str, make: Callable[[], nn.Module], split: Split) -> None:
    """Add a backbone of one's own: from then on `backbone=name` and `--backbone name` mean it, in this process.

    A configuration keeps the name and never the code, so what opens a run must have registered its backbone first: in a
    rule file (`--rule FILE`), in the module of an entry point of the group `localsim.rules`, or by hand.

    Args:
        name: letters, digits, `_`, `-`. A name of localsim's own is refused, as is one that another module has
            registered; the same module may register it again, as an edited file does.
        make: returns the whole model; it draws its weights from torch's default generator, which the run's seed sets.
        split: from that model to `(unit blocks, natural cuts)`, see `Backbone`. Every unit block maps `(n, c, h, w)` to
            `(n, c', h', w')`, the first one images with three channels; the result is square for square images.

    Raises:
        UserError: the name is of another form, or taken. What `make` and `split` return is checked when the backbone is
            built.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"the backbone is called {name!r}; allowed: letters, digits, _ and -")
    if name in BACKBONES:
        raise UserError(f"the name {name!r} is taken by a backbone of localsim; choose another")
    for what, function in (("make", make), ("split", split)):
        if not callable(function) or isinstance(function, nn.Module):  # one model would be shared by all networks
            raise UserError(
                f"backbone {name}: {what} must be a function, not an object of type {type(function).__name__}"
            )
    before = REGISTERED.get(name)
    if before is not None and _home(before[1]) != _home(split):
        raise UserError(f"the name {name!r} is taken by a backbone of {_home(before[1])}; choose another")
    REGISTERED[name] = make, split


def _home(function: Callable[..., object]) -> str:
    return str(getattr(function, "__module__", type(function).__module__))


def build_backbone(
    name: str, *, stem: str = "imagenet", zero_init_residual: bool = True, width: float = 1.0
) -> Backbone:
    """Build a backbone with its own initialisation, from torch's default generator, without its classifier.

    ResNet-18 to 101 and VGG-11 are torchvision's (natural stages: stem + layer1, layer2, ...; the five pooling
    groups of the VGG); ResNet-20, 32 and 110 are those of He et al. 2016, section 4.2, for 32 x 32 images. The networks
    of patch-wise rules have no normalisation (`localsim.unnormalised`): `vgg6` is that of CLAPP, whose natural stages
    are its six layers; `preact_resnet50` is that of Greedy InfoMax, the first three stages of a pre-activation
    ResNet-50 on a 5x5 convolution of stride 1. Both run on patches of 16 x 16 pixels.

    Args:
        name: one of `BACKBONES`, or one's own, see `register_backbone`; this has the options below at their defaults.
        stem: "imagenet" is the stem as published for the network. "cifar" replaces the 7x7 convolution of stride 2
            and the max-pool of ResNet-18 to 101 by one 3x3 convolution of stride 1, as is usual for 32 x 32 images;
            it is what ResNet-20, 32 and 110 have anyway.
        zero_init_residual: start the last batch norm of every residual block at zero, so that each block begins as
            its shortcut (Goyal et al. 2017, arXiv:1706.02677, section 5.1); in `preact_resnet50`, which has no
            batch norm, the last convolution. A VGG has no residual blocks, and a backbone of one's own starts as its
            own function makes it.
        width: multiplies all channels of the `SCALABLE` backbones, rounded, at least 8; 1 for the others.

    Raises:
        UserError: for an unknown name or stem, the CIFAR stem on a network whose stem is fixed, a width that is not
            positive, or one other than 1 for a backbone that cannot be scaled; for one's own that cannot be built, has
            no unit blocks, repeats a name or a weight, or has natural stages that are none.
    """
    if name not in BACKBONES and name not in REGISTERED:
        unknown = one_of("backbone", name, (*BACKBONES, *REGISTERED))
        raise UserError(f"{unknown}; one of your own is registered by a file: --rule path/to/rule.py")
    if stem not in STEMS:
        raise one_of("stem", stem, STEMS)
    if stem == "cifar" and (name in _FIXED_STEMS or name in REGISTERED):
        first = f"a {_FIXED_STEMS[name]} convolution" if name in _FIXED_STEMS else "a stem of your own"
        raise UserError(f"stem 'cifar' has no meaning for {name}, which begins with {first}; allowed: imagenet")
    if not 0 < width < math.inf:
        raise UserError(f"width {width!r} is no factor for channels; allowed: numbers above 0")
    if width != 1 and name not in SCALABLE:
        raise UserError(
            f"width {width:g} has no meaning for {name}, whose channels are fixed; allowed: 1, "
            f"or one of the backbones {', '.join(SCALABLE)}"
        )
    if name in REGISTERED:
        return make_registered(name)
    model = BACKBONES[name](zero_init_residual, width)
    if stem == "cifar" and name in _RESNETS:
        _shrink_stem(model)
    units, natural_cuts = split_vgg(model) if name in _VGGS else split_resnet(model)
    if name == "vgg6":  # published in layers, not in pooling groups
        natural_cuts = list(range(len(units)))
    return Backbone(name, tuple(units), tuple(natural_cuts))


def _shrink_stem(model: nn.Module) -> None:
    """Put the CIFAR stem in place, initialised as torchvision does for its other convolutions."""
    conv = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = conv
    del model.maxpool


def split_resnet(model: nn.Module) -> tuple[list[UnitBlock], list[int]]:
    children = dict(model.named_children())
    stem = [(name, children[name]) for name in ("conv1", "bn1", "relu", "maxpool") if name in children]
    units = [UnitBlock("stem", stem)]
    natural_cuts = []
    for layer in (name for name in children if name.startswith("layer")):
        # the stem belongs to the first natural stage
        natural_cuts.append(len(units) if natural_cuts else 0)
        for index, block in children[layer].named_children():
            units.append(UnitBlock(f"{layer}.{index}", [(f"{layer}.{index}", block)]))
    return units, natural_cuts


def split_vgg(model: nn.Module) -> tuple[list[UnitBlock], list[int]]:
    groups: list[list[tuple[str, nn.Module]]] = []
    natural_cuts = [0]
    for index, module in model.get_submodule("features").named_children():
        if isinstance(module, nn.Conv2d):
            if groups and isinstance(groups[-1][-1][1], nn.MaxPool2d):
                natural_cuts.append(len(groups))
            groups.append([])
        groups[-1].append((f"features.{index}", module))
    return [UnitBlock(group[0][0], group) for group in groups], natural_cuts


def trunk_state_dict(units: Iterable[UnitBlock]) -> dict[str, Tensor]:
    """Return parameters and buffers of unit blocks under torchvision's names, wherever the blocks are registered.

    The tensors are detached but share memory with the blocks, as in `nn.Module.state_dict`.
    """
    state: dict[str, Tensor] = {}
    for unit in units:
        for name, part in zip(unit.part_names, unit.parts, strict=True):
            part.state_dict(destination=state, prefix=f"{name}.")
    return state


def load_trunk_state_dict(units: Iterable[UnitBlock], state: Mapping[str, Tensor]) -> None:
    """Copy weights under torchvision's names into unit blocks: all of them fit, or none is copied.

    Classifier entries (`fc.` and `classifier.`) are ignored, for the trunk has none. Batch counters
    (`num_batches_tracked`), which weights saved before torch 0.4.1 lack and no output depends on, may be missing
    and are then set to zero.

    Raises:
        UserError: where entries are missing, unexpected or of another shape.
    """
    own = trunk_state_dict(units)
    given = {name: value for name, value in state.items() if not name.startswith(_CLASSIFIERS)}
    counters = {name for name in own if name.endswith(".num_batches_tracked") and name not in given}
    problems = (
        _first_of("missing", [name for name in own if name not in given and name not in counters]),
        _first_of("unexpected", [name for name in given if name not in own]),
        _first_of(
            "of another shape",
            [
                f"{name} {tuple(given[name].shape)} instead of {tuple(value.shape)}"
                for name, value in own.items()
                if name in given and given[name].shape != value.shape
            ],
        ),
    )
    if any(problems):
        raise UserError(f"these weights are of another architecture: {'; '.join(filter(None, problems))}")
    for name, value in own.items():
        if name in given:
            value.copy_(given[name])
        else:
            value.zero_()


def _first_of(what: str, entries: list[str], shown: int = 3) -> str:
    rest = f" and {len(entries) - shown} more" if len(entries) > shown else ""
    return f"{what}: {', '.join(entries[:shown])}{rest}" if entries else ""


def trace_units(backbone: Backbone, image_size: int) -> list[UnitTrace]:
    """Run a training forward of every unit block in order on the meta device, which computes and allocates nothing.

    The backbone itself is neither changed nor moved.

    Args:
        backbone: what to trace.
        image_size: side of the square input images, in pixels.

    Raises:
        UserError: for an image size that is no positive whole number or too small for the network.
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise UserError(f"image size {image_size!r} is not a number of pixels; allowed: whole numbers from 1")
    x = torch.empty(TRACE_BATCH, 3, image_size, image_size, dtype=torch.float32, device="meta")
    traces = []
    # identities are addresses, so no storage may be freed, and its address given anew, before the end
    alive = []
    for unit in backbone.units:
        twin = _meta_twin(unit)
        state = {_identity(tensor) for tensor in (*twin.parameters(), *twin.buffers())}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, state: set[int] = state, saved: dict[int, int] = saved) -> Tensor:
            if _identity(tensor) not in state:
                saved[_identity(tensor)] = tensor.untyped_storage().nbytes()
                alive.append(tensor)
            return tensor

        alive.append(twin)
        map_size = tuple(x.shape[2:])
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                x = twin(x)
        except Exception as error:
            said = f"{unit.name} cannot run on a map of {map_size[0]} x {map_size[1]}"
            if backbone.name in REGISTERED:  # of a user's own network size is not all that can be wrong
                why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                raise UserError(f"images of {image_size} px do not pass {backbone.name}: {said} ({why})") from error
            if not isinstance(error, RuntimeError):
                raise
            raise UserError(f"image size {image_size} is too small for {backbone.name}: {said}") from error
        if not isinstance(x, Tensor) or x.ndim != 4 or len(x) != TRACE_BATCH or x.shape[2] != x.shape[3]:
            gave = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise UserError(
                f"unit block {unit.name} of {backbone.name} gives {gave} for {TRACE_BATCH} images; allowed: square "
                "maps (images, channels, height, width)"
            )
        channels, height, width = x.shape[1:]
        traces.append(UnitTrace((channels, height, width), saved))
    return traces


def _meta_twin(unit: UnitBlock) -> UnitBlock:
    """Return a copy in training mode whose tensors are on the meta device; `deepcopy` takes them from its memo."""
    memo: dict[int, object] = {id(p): nn.Parameter(_meta_like(p)) for p in unit.parameters()}
    memo |= {id(b): _meta_like(b) for b in unit.buffers()}
    return copy.deepcopy(unit, memo).train()


def _meta_like(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty_like(tensor, dtype=dtype, device="meta", requires_grad=False)


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def unit_shapes(backbone: Backbone, image_size: int) -> list[tuple[int, int, int]]:
    """Return `(channels, height, width)` of every unit block's output for square images of `image_size` pixels.

    Raises:
        UserError: as `trace_units`.
    """
    return [trace.shape for trace in trace_units(backbone, image_size)]


def receptive_fields(units: Iterable[UnitBlock]) -> list[int]:
    """Return the theoretical receptive field of one position of every unit block's output: its side, in pixels.

    A layer with kernel `k` and stride `s` widens it by `(k - 1) jump` and multiplies `jump`, the pixels between
    neighbouring positions, by `s`. Shortcuts are left out: they see part of what the main path sees. Borders are
    ignored, so the field can be larger than the image. Counted are the convolutions and max-pools of localsim's own
    backbones.

    Raises:
        UserError: of a layer that takes positions together in another way (attention, dilation, other pooling).
    """
    fields, field, jump = [], 1, 1
    for unit in units:
        for name, module in unit.named_modules():
            if isinstance(module, _UNCOUNTED) or getattr(module, "dilation", 1) not in (1, (1, 1)):
                raise UserError(
                    f"the receptive field of unit block {unit.name} is not known, for it has a {type(module).__name__}"
                    "; allowed: convolutions and max-pools without dilation"
                )
            if not isinstance(module, nn.Conv2d | nn.MaxPool2d) or not _SHORTCUTS.isdisjoint(name.split(".")):
                continue
            kernel, stride = (
                value[0] if isinstance(value, tuple) else value for value in (module.kernel_size, module.stride)
            )
            field += (kernel - 1) * jump
            jump *= stride
        fields.append(field)
    return fields
