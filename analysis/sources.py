"""Networks to take features of: a run, a network of one's own, torchvision's or timm's, and how they see images."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from localsim.analysis.points import Points
from localsim.config import Config
from localsim.data import AUGMENTATIONS, ImageSet
from localsim.data.datasets import Triple
from localsim.errors import UserError
from localsim.network import LocalNetwork
from localsim.opening import open_data, open_device
from localsim.runs import Run, load_run


@dataclass(frozen=True, eq=False)
class Source:
    """A network and how it sees images.

    Attributes:
        name: for people; nothing is looked up by it.
        network: any module that takes images `(n, 3, H, W)`. Features are taken in evaluation mode.
        size: pixels to which images are resized and cropped, or None: as they come.
        mean, std: per channel; images between 0 and 1 become `(x - mean) / std`. None: they are shown as they come.
        grey: show images without colour.
        crop: show the central square of this part of the shorter side, or None: all.
        images: its own test images, where it has some.
    """

    name: str
    network: nn.Module
    size: int | None = None
    mean: Triple | None = None
    std: Triple | None = None
    grey: bool = False
    crop: float | None = None
    images: ImageSet | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise UserError(f"source {self.name} has only one of mean and std; give both or none")

    @classmethod
    def of(
        cls,
        source: Source | Run | str | Path | nn.Module,
        *,
        which: str | int = "trained",
        name: str | None = None,
        seed: int = 0,
    ) -> Source:
        """Return what `features` makes of a source.

        | source | network | images are shown |
        |---|---|---|
        | a `Run`, or its folder | its newest checkpoint, or `which`, on the run's device | as in the run's probe |
        | `torchvision:resnet50` | untrained, drawn by `seed` | as to the model's default weights |
        | `torchvision:resnet50:DEFAULT` | with these weights, downloaded unless they are there | as to these |
        | `torchvision:resnet50:FILE` | with the weights of a `.safetensors` or `.pt` file | as the first |
        | `timm:NAME`, `timm:NAME:pretrained` | untrained, or with its weights | as timm's configuration says |
        | a `LocalNetwork` or any module | as it is, where it is | as they come (uint8 divided by 255) |

        Weights without a classifier (a trunk's) leave an identity in its place. `dataclasses.replace` changes any
        field, e.g. `replace(Source.of("torchvision:resnet18:trunk.safetensors"), size=32)`.

        Args:
            source: see above.
            which: of a run: `trained`, `untrained`, or the step of a snapshot.
            name: for people.
            seed: of untrained networks by name.

        Raises:
            UserError: there is no such network or file, weights do not fit, or `which` has no meaning.
        """
        from localsim.analysis.catalogue import NAMED, open_named

        if isinstance(source, str) and source.startswith(NAMED):
            source = cls(source, **open_named(source, seed))
        elif isinstance(source, str | Path):
            source = load_run(source)
        if isinstance(source, Run):
            return cls._of_run(source, which, name)
        if which != "trained":
            raise UserError(f"which {which!r} has a meaning for runs only, not for {_kind(source)}")
        if isinstance(source, nn.Module):
            source = cls(type(source).__name__, source)
        if not isinstance(source, Source):
            raise UserError(f"features cannot be taken of {_kind(source)}; allowed: a Run or its folder, a module, "
                            "torchvision:NAME, timm:NAME, a Source")  # fmt: skip
        return source if name is None else replace(source, name=name)

    @classmethod
    def _of_run(cls, run: Run, which: str | int, name: str | None) -> Source:
        network = run.network(which)
        for tap in network.taps:
            tap.head = nn.Identity()  # no feature is read from heads, and those of ImageNet's preset take 2.4 GB
        mean, std, test = _images_of(run.config)
        label = run.path.name + {"trained": "", "untrained": " untrained"}.get(str(which), f" step {which}")
        network.to(open_device(run.config.device))
        grey, crop = colour_and_crop(run.config)
        return cls(name or label, network, run.config.image_size, mean, std, grey, crop, test)

    def whole(self, size: int | None = None) -> Source:
        """Return the network, to be shown images with nothing cut off at their sides, as animals saw them.

        A run's probe cuts off an eighth of the side, as is usual for objects in the middle of photographs.

        Args:
            size: pixels; by default its own.
        """
        return replace(self, size=self.size if size is None else size, crop=1.0)

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next((tensor.device for tensor in _tensors(self.network)), torch.device("cpu"))

    @cached_property
    def points(self) -> Points:
        """Where features can be read: its `stages`, `units`, `readouts` and `modules`."""
        return Points(self.network)

    def weights_hash(self) -> str:
        """Return the SHA-256 of names, types, shapes and bytes of all weights and buffers, and their settings.

        Heads of a LocalNetwork are left out, for no feature is read from them.
        """
        net = self.network
        parts: Mapping[str, nn.Module] = {"": net}
        if isinstance(net, LocalNetwork):
            readouts = {f"taps.{i} on {tap.stage}": tap.readout for i, tap in enumerate(net.taps)}
            parts = {f"stages {net.patches}": net.stages, **readouts}
        digest = hashlib.sha256()
        for prefix, part in parts.items():
            digest.update(f"{prefix} {type(part).__module__} {part!r}".encode())
            digest.update("\n".join(_plain_attributes(part)).encode())
            state = {**dict(part.named_buffers()), **part.state_dict()}  # some buffers are left out of the state
            for name, value in state.items():
                if isinstance(value, Tensor):
                    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                    digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                else:
                    digest.update(f"{name} {value!r}".encode())
        return digest.hexdigest()

    @contextmanager
    def evaluating(self, device: torch.device) -> Iterator[None]:
        """Put the network in evaluation mode on `device` inside the block, and every module as it was afterwards."""
        before = {module: module.training for module in self.network.modules()}
        home = self.device
        try:
            self.network.eval()
            if device != home:  # a network spread over several devices stays so
                self.network.to(device)
            yield
        finally:
            for module, training in before.items():
                module.training = training
            if device != home:
                self.network.to(home)


def colour_and_crop(config: Config) -> tuple[bool, float | None]:
    """Return whether a network was trained without colour, and at which single scale of crops, if at one."""
    augmentation = AUGMENTATIONS[config.augmentation]
    smallest, largest = augmentation.crop_scale
    return augmentation.gray == 1, math.sqrt(smallest) if smallest == largest < 1 else None


_OPENED: dict[tuple[Any, ...], tuple[Triple, Triple, ImageSet | None]] = {}


def _images_of(config: Config) -> tuple[Triple, Triple, ImageSet | None]:
    """Return mean, std and test images of a run's data; those last asked for are kept, for a run's many snapshots."""
    asked = (config.data, config.data_root, config.image_size, config.train_images, config.test_images)
    if asked not in _OPENED:
        data = open_data(config)
        _OPENED.clear()
        if Path(config.data).is_dir():  # whose images may change
            return data.mean, data.std, data.test
        _OPENED[asked] = data.mean, data.std, data.test
    return _OPENED[asked]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _plain_attributes(module: nn.Module) -> Iterator[str]:
    """Yield what a module computes with besides its weights, such as the regions of a pooling, which no text shows."""
    for place, part in module.named_modules():
        for name, value in sorted(vars(part).items()):
            if name == "training" or name.startswith("_"):
                continue
            if isinstance(value, bool | int | float | str | tuple | list | dict):
                yield f"{place}.{name} {value!r}"
            elif hasattr(value, "__qualname__"):  # whose text would hold an address
                yield f"{place}.{name} {value.__module__}.{value.__qualname__}"


def _kind(source: object) -> str:
    return f"an object of type {type(source).__name__}"
