"""Heads that are networks of their own: parts of the trunk above, copied, or a decoder beside a classifier."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from localsim.backbones import TRACE_BATCH, UnitBlock
from localsim.distributed.peers import Peers
from localsim.gradients import constant
from localsim.network import LocalNetwork
from localsim.rules.checks import check_choice, check_count, check_fraction
from localsim.rules.initialise import kaiming_fan_out
from localsim.rules.site import Site


class Mirrored(nn.Module):
    """A network built like the trunk above, with fewer blocks and weights of its own (AugLocal).

        d = round(D + pyramid * position * (1 - D)),    block i of d is like the trunk's block  round(m i / d)  of the
        m above the stage (i = 1..d, so the highest is always among them), then the mean over positions and `site.end`

    Ma et al. 2024 (arXiv 2402.17318), and its released code for the two formulas. At most m blocks are taken; the
    highest stage has none, only mean and end. Copies start as a new trunk would (Kaiming normal with fan-out, batch
    norm the identity), whatever the trunk's weights. Where a block follows one that the trunk does not put before it, a
    1x1 convolution with batch norm brings the map to the channels and, by its stride, about the size that the block
    has in the trunk.

    Deviations from the released code: it builds basic blocks of the trunk's widths with such a convolution as their
    shortcut instead of copying blocks; it makes the highest D + 1 blocks one module, and its position runs over the
    modules below; a head of one block has a batch norm before its classifier there.

    Args:
        site: where the tap reads; its `depth` is the position.
        depth: D, the number of blocks of the lowest stage's head; 6 for the paper's ResNet-110.
        pyramid: how far the depth goes down to 1 from the lowest to the highest stage; 0 for equal depths.
    """

    takes = "map"
    gives = "vector"

    def __init__(self, site: Site, depth: int = 3, pyramid: float = 0.5) -> None:
        super().__init__()
        check_count("mirrored", "depth", depth, at_least=1)
        check_fraction("mirrored", "pyramid", pyramid)
        shapes = _input_shapes(site.above, site.shape)
        layers: list[nn.Module] = []
        here = 0
        for index in mirrored_blocks(len(site.above), depth, pyramid, site.depth):
            if index > here and shapes[index] != shapes[here]:
                layers.append(_adapter(shapes[here], shapes[index]))
            layers.append(_fresh(copy.deepcopy(site.above[index])))
            here = index + 1
        self.blocks = nn.Sequential(*layers)
        self.end = site.end(shapes[here][0])

    def forward(self, x: Tensor) -> Tensor:
        """Return the end's output `(n, d)` for a map `(n, channels, height, width)`."""
        return self.end(self.blocks(x).mean((2, 3)))


def mirrored_blocks(num_above: int, depth: int, pyramid: float, position: float) -> list[int]:
    """Return which of the blocks above (0 for the lowest) a `mirrored` head copies; see there for the formulas."""
    num = min(round(depth + pyramid * position * (1 - depth)), num_above)
    return [round(num_above * i / num) - 1 for i in range(1, num + 1)]


class InfoPro(nn.Module):
    """Classifies, and reconstructs the image (InfoPro).

        vector = W2 relu(W1 mean_positions(relu(BN(conv3x3(h)))))
        image  = conv3x3(3)(relu(BN(conv3x3(12)(bilinear(h)))))      as logits: the image is their sigmoid

    Wang et al. 2021 (arXiv 2101.10832) and its released code, head `1c2f`: the convolution doubles the channels with
    stride 2 up to the width of the highest stage, and keeps both from there. The target is the normalised image brought
    to [0, 1] channel by channel, (x - min) / (max - min) over the batch: the pixel values wherever a batch holds
    a black and a white one; the released code restores them from mean and standard deviation of the data. There the
    highest module has a linear classifier alone; here it has this head too.

    Args:
        site: gives the size of the images and the number of classes.
        contrast: give a vector of 128 for a supervised contrastive objective instead of one logit per class.

    Raises:
        UserError: images without labels.
    """

    takes = "map"
    gives = "reconstruction"
    context = "images"
    peers: Peers | None = None

    def __init__(self, site: Site, contrast: bool = False) -> None:
        super().__init__()
        check_choice("infopro", "contrast", contrast, (False, True))
        channels = site.shape[0]
        wide = max(channels, min(2 * channels, site.top_shape[0]))
        stride = 2 if wide > channels else 1
        self.features = _fresh(
            nn.Sequential(
                nn.Conv2d(channels, wide, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()
            )
        )
        self.end = nn.Sequential(nn.Linear(wide, 128), nn.ReLU(), nn.Linear(128, 128 if contrast else site.classes()))
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 3, 3, padding=1)
        )
        kaiming_fan_out(self.decoder)

    def forward(self, x: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return vectors `(n, d)`, logits of images `(n, 3, height, width)` and targets in [0, 1] of the same shape."""
        enlarged = F.interpolate(x, size=images.shape[2:], mode="bilinear", align_corners=True)
        return self.end(self.features(x).mean((2, 3))), self.decoder(enlarged), _pixels(images, self.peers)


def _pixels(images: Tensor, peers: Peers | None) -> Tensor:
    """Return images brought to [0, 1] per channel; a channel of one value everywhere becomes 0."""
    low, high = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
    if peers is not None:
        low = peers.gather_rows(low).amin(0, keepdim=True)
        high = peers.gather_rows(high).amax(0, keepdim=True)
    spread = high - low
    return constant((images - low) / torch.where(spread > 0, spread, 1.0))


class NextStage(nn.Module):
    """Runs the next block of the trunk twice over: as a trainable copy, and as a slow average of the real one (MAN).

        y = LB(h) + EMA(h),    then the mean over positions and `site.end`

    Su et al. 2024 (Momentum Auxiliary Network, ECCV 2024; released code JunhaoSu0/MAN). LB is a copy of the unit block
    above the stage and is trained; EMA is not: after every step it becomes momentum * EMA + (1 - momentum) * block.
    The gradient passes through EMA to h and changes nothing in it: its weights are buffers, saved with the head. Its
    batch norms see the head's own batches, and keep running statistics of those. The highest stage has neither, only
    mean and end.

    Deviations from the released code: there the map goes on to an image decoder and a classifier under InfoPro's loss,
    here to the objective's own head; there both copies start from draws of their own and not from the block's values,
    and the average moves before the step instead of after it.

    Args:
        site: where the tap reads.
        momentum: of the average.
    """

    takes = "map"
    gives = "vector"

    def __init__(self, site: Site, momentum: float = 0.995) -> None:
        super().__init__()
        check_fraction("next_stage", "momentum", momentum)
        self.momentum = momentum
        self.next_unit = site.unit + 1
        self.copy = copy.deepcopy(site.above[0]) if site.above else None
        self.average = _frozen(copy.deepcopy(site.above[0])) if site.above else None
        self.end = site.end(_input_shapes(site.above[:1], site.shape)[-1][0])

    def forward(self, x: Tensor) -> Tensor:
        """Return the end's output `(n, d)` for a map `(n, channels, height, width)`."""
        if self.copy is not None and self.average is not None:
            x = self.copy(x) + self.average(x)
        return self.end(x.mean((2, 3)))

    def end_step(self, net: LocalNetwork) -> None:
        """Move the average towards the trunk's block as it is now; the trainer calls this after every step."""
        if self.average is None:
            return
        averages = dict(self.average.named_buffers())
        for name, value in net.units[self.next_unit].named_parameters():
            averages[name].lerp_(constant(value).to(averages[name]), 1 - self.momentum)


def _frozen(module: nn.Module) -> nn.Module:
    """Turn the parameters of a module into buffers of the same names and values."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, constant(value).clone())
    return module


def _fresh(module: nn.Module) -> nn.Module:
    """Initialise a module as a new trunk: convolutions Kaiming normal with fan-out, batch norms the identity."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            kaiming_fan_out(part)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d | nn.Linear):
            part.reset_parameters()
    return module


def _adapter(given: tuple[int, ...], expected: tuple[int, ...]) -> nn.Sequential:
    """Return a 1x1 convolution with batch norm to other channels and, by its stride, to a map as small or larger."""
    stride = (max(1, given[1] // expected[1]), max(1, given[2] // expected[2]))
    conv = nn.Conv2d(given[0], expected[0], 1, stride=stride, bias=False)
    return nn.Sequential(_fresh(conv), nn.BatchNorm2d(expected[0]))


def _input_shapes(units: Sequence[UnitBlock], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shape of a map of `shape` before every unit block, and after the last; nothing is computed."""
    x = torch.empty(TRACE_BATCH, *shape, device="meta")
    shapes = [tuple(shape)]
    for unit in units:
        tensors = {**dict(unit.named_parameters()), **dict(unit.named_buffers())}
        x = functional_call(unit, {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}, (x,))
        shapes.append(tuple(x.shape[1:]))
    return shapes
