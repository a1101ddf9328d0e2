"""Where features can be read in a network: its stages, unit blocks, readouts and modules, by index or name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from localsim.backbones import UnitBlock, split_resnet, split_vgg
from localsim.errors import UserError
from localsim.network import LocalNetwork

Indices = Literal["all"] | Sequence[int] | None
Names = Literal["all"] | Sequence[str] | None


class Point(NamedTuple):
    """A place in a network: what `module` gives, or `readout` of it; `where` tells it from all others."""

    key: str
    where: str
    module: nn.Module
    readout: nn.Module | None = None


class Points:
    """All places of a network at which features can be read.

    Attributes:
        stages: of a LocalNetwork, from `stage1` up.
        units: unit blocks by name; of a LocalNetwork, torchvision's ResNets and VGGs.
        readouts: of a LocalNetwork, by the index of the stage that the tap reads; of several taps the first.
        modules: by dotted name, in a LocalNetwork also by torchvision's names.
        natural: what is read where nothing is chosen: all stages, of a ResNet `layer1` to `layer4`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.stages: list[Point] = []
        self.readouts: dict[int, Point] = {}
        self.modules = {name: Point(name, name, module) for name, module in network.named_modules() if name}
        if isinstance(network, LocalNetwork):
            self.units = {unit.name: Point(unit.name, f"unit {unit.name}", unit) for unit in network.units}
            self.stages = [Point(f"stage{i + 1}", f"stages.{i}", stage) for i, stage in enumerate(network.stages)]
            for number, tap in enumerate(network.taps):
                where = f"taps.{number}.readout of stages.{tap.stage}"
                point = Point(f"readout{tap.stage + 1}", where, network.stages[tap.stage], tap.readout)
                self.readouts.setdefault(tap.stage, point)
            self._add_torchvision_names(network.units)
            self.natural = self.stages
        else:
            units, cuts = _cut(network)
            self.units = {unit.name: Point(unit.name, f"unit {unit.name}", unit.parts[-1]) for unit in units}
            last = [units[cut - 1].part_names[-1] for cut in [*cuts[1:], len(units)]] if units else []
            # layer1.2 ends layer1; the pooling groups of a VGG have no name but their last module's
            ends = [name.partition(".")[0] if name.startswith("layer") else name for name in last]
            self.natural = [self.modules[name] for name in ends]

    def _add_torchvision_names(self, units: list[UnitBlock]) -> None:
        for unit in units:
            for name, part in zip(unit.part_names, unit.parts, strict=True):
                for inner, module in part.named_modules(prefix=name):
                    self.modules.setdefault(inner, Point(inner, inner, module))
                if above := name.rpartition(".")[0]:  # layer2 gives what its last block gives
                    self.modules[above] = Point(above, above, unit)

    def choose(self, stages: Indices, units: Names, readouts: Indices, modules: Sequence[str] | None) -> list[Point]:
        """Return the places asked for, see `localsim.analysis.features`; the natural stages if nothing is.

        Raises:
            UserError: something is not there, or nothing is asked for and there are no natural stages.
        """
        if stages is units is readouts is modules is None:
            if not self.natural:
                top = [name for name in self.modules if "." not in name]
                raise UserError(
                    "the network has no stages of its own; name layers of it with modules=[...], "
                    + (f"for instance {', '.join(top[:8])}" if top else "but it has none")
                )
            return self.natural
        found = [
            *_chosen("stage", stages, dict(enumerate(self.stages))),
            *_chosen("unit block", units, self.units),
            *_chosen("readout", readouts, self.readouts),
            *_chosen("module", modules, self.modules),
        ]
        if not found:
            raise UserError("no layer is asked for: every list of layers is empty")
        return list({point.key: point for point in found}.values())


def whole(h: Tensor, network: nn.Module, num_images: int, image_size: int, layer: str) -> Tensor:
    """Return what a layer gave with one entry per image: maps of patches are put in their places.

    Of images cut into patches, `(n * rows * cols, c, h, w)` becomes `(n, c, rows * h, cols * w)`.

    Raises:
        UserError: `h` is neither; `layer` is what it says gave it.
    """
    if h.ndim and len(h) == num_images:
        return h
    patches = network.patches if isinstance(network, LocalNetwork) else None
    rows, columns = (1, 1) if patches is None else patches.grid(image_size)
    if h.ndim != 4 or len(h) != num_images * rows * columns:
        raise UserError(f"{layer} gives an array {tuple(h.shape)} for {num_images} images; allowed: one row per image")
    tiles = h.unflatten(0, (num_images, rows, columns)).permute(0, 3, 1, 4, 2, 5)
    return tiles.flatten(4, 5).flatten(2, 3)


def _cut(network: nn.Module) -> tuple[list[UnitBlock], list[int]]:
    """Return the unit blocks of torchvision's ResNets and VGGs and where natural stages begin; none of any other."""
    from torchvision.models import VGG, ResNet

    if isinstance(network, ResNet):
        return split_resnet(network)
    return split_vgg(network) if isinstance(network, VGG) else ([], [])


def _chosen(what: str, chosen: Any, there: dict[Any, Point]) -> Iterable[Point]:
    if chosen is None:
        return []
    if not there:
        raise UserError(f"the network has no {what}s to choose; name layers of it with modules=[...]")
    if chosen == "all" and what != "module":
        return there.values()
    listed = [chosen] if isinstance(chosen, str) or not isinstance(chosen, Iterable) else list(chosen)
    for name in listed:
        if isinstance(name, bool) or name not in there:
            names = [str(key) for key in there]
            if isinstance(next(iter(there)), int):
                raise UserError(f"the network has no {what} {name!r}; allowed, from 0: {', '.join(names)}")
            close = difflib.get_close_matches(str(name), names, n=5, cutoff=0.5) or names[:5]
            raise UserError(f"the network has no {what} {name!r}; close: {', '.join(close)}")
    return [there[name] for name in listed]
