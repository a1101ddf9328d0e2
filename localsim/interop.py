"""Trunk weights to and from other libraries: a run as torchvision's or timm's model, published weights as a trunk.

Files are read without executing code: `.safetensors`, or what `torch.save` wrote, read as tensors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from localsim.assembly import build_trunk
from localsim.backbones import BACKBONES, trunk_state_dict
from localsim.config import Config
from localsim.errors import UserError, one_of
from localsim.network import LocalNetwork
from localsim.runs import Run, load_plain, load_run, load_tensors, opened_run

LIBRARIES = ("torchvision", "timm")
CLASSIFIERS = ("fc.", "classifier.", "pre_logits.", "head.")
"""What entries of classifiers begin with, in the two libraries: a trunk has none."""


def load_trunk(
    run: Run | str | Path, which: str | int = "trained", *, library: str = "torchvision", num_classes: int | None = None
) -> nn.Module:
    """Return a run's trunk as the plain model of another library, in evaluation mode on the CPU.

    Images `(n, 3, H, W)`, normalised as in the run, give the last stage's map averaged over positions, `(n, channels)`;
    in a VGG too, whose pooling to 7 x 7 makes way for the mean. Names of weights and modules are the library's. A CIFAR
    stem is put in place. Backbones that no library has are localsim's own module: `resnet20`, `resnet32` and
    `resnet110` give the same mean, `vgg6` and `preact_resnet50`, which have no pooling, the last map, of images or of
    patches.

    Args:
        run: the run, or its folder.
        which: `trained` (the newest checkpoint), `untrained` (its initialisation), or the step of a snapshot.
        library: `torchvision` or `timm`.
        num_classes: a new linear classifier of this width, drawn from torch's default generator, for fine-tuning
            (call `.train()` before); by default `nn.Identity` in its place.

    Raises:
        UserError: there is no such run, snapshot or library, timm is not installed or lacks the backbone, or the
            backbone takes no classifier.
    """
    if library not in LIBRARIES:
        raise one_of("library", library, LIBRARIES)
    if num_classes is not None and (type(num_classes) is not int or num_classes < 1):
        raise UserError(f"num_classes is {num_classes!r}; allowed: whole numbers from 1, or None for no classifier")
    run = opened_run(run)
    config, weights = run.config, trunk_weights(run, which)
    with torch.device("meta"):  # nothing is drawn and nothing allocated: the run's weights are put in place
        model = _plain_model(config, library, num_classes)
    _replace_end(model, config.backbone, library, num_classes)
    try:
        _, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise UserError(f"the trunk does not fit {config.backbone}: {str(error).splitlines()[-1].strip()}") from None
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing or unexpected:
        raise UserError(f"the trunk does not fit {config.backbone}: {(missing or unexpected)[0]}")
    return model.eval()


def load_into(net: LocalNetwork, weights: nn.Module | Run | Mapping[str, Tensor] | str | Path) -> LocalNetwork:
    """Copy trunk weights into a network, e.g. of `localsim.build`, and return it; its taps stay as they are.

    Args:
        net: of the same backbone and stem as the weights.
        weights: a model of torchvision or timm, a state dictionary, a file of one, a run or its folder. Classifiers
            are left out, all else must fit.

    Raises:
        UserError: weights cannot be read, or an entry is missing, unexpected or of another shape; `net` is then as
            before.
    """
    net.load_trunk_state_dict(trunk_weights(weights))
    return net


def trunk_weights(
    source: Run | nn.Module | Mapping[str, Tensor] | str | Path, which: str | int = "trained"
) -> dict[str, Tensor]:
    """Return the weights of a trunk under torchvision's names, which are timm's too, without those of a classifier.

    Args:
        source: a run or its folder, whose heads are neither built nor read; a model, whose tensors are shared; a state
            dictionary; a file of one.
        which: of a run, see `load_trunk`.

    Raises:
        UserError: the source cannot be read, or `which` has no meaning for it.
    """
    if isinstance(source, str | Path) and Path(source).is_dir():
        source = load_run(source)
    if isinstance(source, Run):
        return _weights_of_run(source, which)
    if which != "trained":
        raise UserError(f"which {which!r} has a meaning for runs only")
    if isinstance(source, LocalNetwork):
        return source.trunk_state_dict()
    if isinstance(source, nn.Module):
        state: Any = source.state_dict()
    else:
        state = read_weights(source) if isinstance(source, str | Path) else _checked(source, "what was given")
    return {name: tensor for name, tensor in state.items() if not name.startswith(CLASSIFIERS)}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the entries of a `.safetensors` file, or of one by `torch.save`, which is read without executing code.

    Raises:
        UserError: the file cannot be read, or holds something other than names and tensors.
    """
    path = Path(path)
    return _checked(load_tensors(path) if path.suffix == ".safetensors" else load_plain(path), str(path))


def _checked(state: Any, what: str) -> dict[str, Tensor]:
    if not (isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values())):
        raise UserError(f"{what} holds no weights: a dictionary of names and tensors is expected")
    return dict(state)


def _weights_of_run(run: Run, which: str | int) -> dict[str, Tensor]:
    folder = run.weights(which)
    if folder is not None:
        return load_tensors(folder / "trunk.safetensors")
    if which == "trained":  # the network says so if it should have been
        return run.network().trunk_state_dict()
    backbone, _ = build_trunk(run.config)
    return trunk_state_dict(backbone.units)


def _plain_model(config: Config, library: str, num_classes: int | None) -> nn.Module:
    if library == "timm":
        model = _timm_model(config.backbone, num_classes or 0)
    elif config.backbone not in BACKBONES:
        raise UserError(
            f"backbone {config.backbone} is your own: make its model, and load into it what "
            "localsim.interop.trunk_weights(run) gives"
        )
    else:
        model = BACKBONES[config.backbone](config.zero_init_residual, config.backbone_width)
    if config.stem == "cifar" and hasattr(model, "maxpool"):
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


def _timm_model(name: str, num_classes: int) -> nn.Module:
    try:
        import timm  # type: ignore[import-not-found]
        from torchvision import models
    except ImportError:
        raise UserError("library timm is not installed; install it with `pip install timm`") from None
    if name not in models.list_models() or not timm.is_model(name):
        raise UserError(f"timm has no {name}; with library torchvision you get localsim's own module")
    return timm.create_model(name, num_classes=num_classes)


def _replace_end(model: nn.Module, backbone: str, library: str, num_classes: int | None) -> None:
    """Put what turns the trunk's map into `(n, channels)`, or classes, in place of the model's own end."""
    if hasattr(model, "fc"):
        width = model.num_features if library == "timm" else cast(nn.Linear, model.fc).in_features
        model.fc = _classifier(cast(int, width), num_classes)
    elif library == "timm":
        from timm.layers import ClassifierHead  # type: ignore[import-not-found]

        model.pre_logits = nn.Identity()  # convolutions, of the classifier
        model.head = ClassifierHead(cast(int, model.num_features), num_classes or 0, pool_type="avg")
    elif hasattr(model, "classifier"):
        width = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)][-1]
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = _classifier(width, num_classes)
    elif num_classes is not None:
        raise UserError(f"{backbone} ends in a map and takes no classifier; allowed: num_classes None")


def _classifier(width: int, num_classes: int | None) -> nn.Module:
    return nn.Identity() if num_classes is None else nn.Linear(width, num_classes)
