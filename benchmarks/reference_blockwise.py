"""What localsim is measured against, in plain torch: blockwise and end-to-end Barlow Twins, written from the papers.

Nothing here uses localsim. Blockwise: Siddiqui et al., Blockwise Self-Supervised Learning at Scale, TMLR 2024 (arXiv
2302.01647), section 3; Barlow Twins: Zbontar et al. 2021 (arXiv 2103.03230), section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import get_model

SIGMA = 0.25  # of the noise, in standard deviations of the whole map
LAMBDA = 0.0051
SCALE = 0.024

Draw = Callable[[int, Tensor], Tensor]
"""From a block's index and its map to standard normal noise of the map's shape."""


def fresh_noise(block: int, x: Tensor) -> Tensor:
    return torch.randn_like(x)


def trunk_blocks(name: str) -> nn.ModuleList:
    """Return the four blocks of a torchvision ResNet, untrained: stem and layer1, layer2, layer3, layer4."""
    net: Any = get_model(name, weights=None, zero_init_residual=True)
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    return nn.ModuleList([nn.Sequential(*stem, *net.layer1), net.layer2, net.layer3, net.layer4])


def widths_of(blocks: nn.ModuleList) -> list[int]:
    """Return the channels of every block's map."""
    x, widths = torch.zeros(1, 3, 32, 32), []
    blocks.eval()  # batch norms must not see it
    with torch.no_grad():
        for block in blocks:
            x = block(x)
            widths.append(x.shape[1])
    blocks.train()
    return widths


def readout(channels: int, width: int) -> nn.Sequential:
    """Return the 1x1 expansion and global pooling of section 3: `(n, channels, h, w)` to `(n, width)`."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def projector(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """Return linear layers of these widths, with batch norm and ReLU between them."""
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(channels, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers, nn.Linear(channels, widths[-1], bias=False))


class Blockwise(nn.Module):
    """Four blocks that no gradient leaves, noise after each of them, and a readout and projector on each.

    Args:
        backbone: a torchvision ResNet.
        expand: channels of the readouts.
        widths: of the projectors' layers.
    """

    def __init__(self, backbone: str, expand: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.blocks = trunk_blocks(backbone)
        self.readouts = nn.ModuleList(readout(channels, expand) for channels in widths_of(self.blocks))
        self.projectors = nn.ModuleList(projector(expand, widths) for _ in self.blocks)

    def forward(self, x: Tensor, draw: Draw = fresh_noise) -> list[Tensor]:
        """Return the embedding `(n, d)` of every block for images `(n, 3, h, w)`."""
        embeddings = []
        for number, (block, read, project) in enumerate(zip(self.blocks, self.readouts, self.projectors, strict=True)):
            x = block(x.detach())
            x = x + SIGMA * (draw(number, x) * x.std())
            embeddings.append(project(read(x)))
        return embeddings


class EndToEnd(nn.Module):
    """The same trunk with the mean over positions and one projector.

    Args:
        backbone: a torchvision ResNet.
        widths: of the projector's layers.
        recompute: keep only the inputs of residual blocks, and run these once more in the backward pass.
    """

    def __init__(self, backbone: str, widths: Sequence[int], *, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = trunk_blocks(backbone)
        self.projector = projector(widths_of(self.blocks)[-1], widths)
        self.recompute = recompute

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return one embedding `(n, d)` for images `(n, 3, h, w)`."""
        for part in (part for block in self.blocks for part in block):  # type: ignore[attr-defined]
            x = self.run(part, x) if self.recompute and any(part.children()) else part(x)
        return [self.projector(x.mean((2, 3)))]

    def run(self, part: nn.Module, x: Tensor) -> Tensor:
        # there is nothing random in a residual block, so no state of generators is kept
        return checkpoint(
            part,
            x,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), statistics_untouched(part)),
        )


@contextmanager
def statistics_untouched(module: nn.Module) -> Iterator[None]:
    """Let batch norms leave their running statistics as they are: a second run must not move them again."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def barlow_twins(z1: Tensor, z2: Tensor) -> Tensor:
    """Return the loss of two views' embeddings, each `(n, d)` (Zbontar et al. 2021, equation 1)."""
    z1, z2 = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z1, z2))
    correlation = z1.T @ z2 / len(z1)
    d = len(correlation)
    # all but the last entry, in rows of d + 1, begin with the diagonal
    off_diagonal = correlation.flatten()[:-1].view(d - 1, d + 1)[:, 1:]
    return SCALE * ((correlation.diagonal() - 1).square().sum() + LAMBDA * off_diagonal.square().sum())


def total_loss(views: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the sum of the losses of two views' embeddings, which are one per block; in float32 at least."""
    pairs = ([z.float() if z.dtype == torch.bfloat16 else z for z in pair] for pair in zip(*views, strict=True))
    return torch.stack([barlow_twins(*pair) for pair in pairs]).sum()
