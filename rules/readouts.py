"""From a stage's map to what a tap's head reads: a vector, the map itself, or one vector per patch.

| name | what | shape per image |
|---|---|---|
| `global` | mean over positions (GSP) | `(channels,)` |
| `local2x2`, `local3x3`, ... | mean over k x k regions, flattened (LSP) | `(channels * k * k,)` |
| `expand`, `expand3x3` | 1x1 (3x3) convolution, batch norm, ReLU, mean (CbE + GSP) | `(expand_width,)` |
| `subsample`, `subsample8`, ... | in training the mean over a random one in N positions (N = 4) | `(channels,)` |
| `residual1`, `residual2`, ... | N residual blocks, then the mean over positions | `(channels,)` |
| `map` | the map itself | `(channels, height, width)` |
| `patches` | mean over every patch's map, laid out as the patches lie | `(channels, rows, columns)` |

The last two are of a kind of their own, the others give vectors; where images are cut into patches, a vector is the
mean of the vectors of an image's patches. The first three: Siddiqui et al. 2023 (arXiv 2302.01647), section 3.
"""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from localsim.cifar_resnets import CifarBasicBlock
from localsim.distributed.peers import Peers
from localsim.errors import UserError
from localsim.patches import unfold
from localsim.rng import uniform_rows
from localsim.rules.expand import Expand
from localsim.rules.initialise import kaiming_fan_out

BY_KIND = {
    "vector": "global, local2x2 (any k x k), expand (= expand1x1), expand3x3, subsample (= subsample4; one in any N), "
    "residual1 (any number of blocks)",
    "map": "map",
    "patches": "patches",
}
"""What a readout may give, and the readouts that give it."""
READOUTS = ", ".join(BY_KIND.values())


class LocalPool(nn.Module):
    """Mean over k x k regions of the map, flattened to `channels * k * k`; k = 1 is global spatial pooling."""

    kind = "vector"

    def __init__(self, num_channels: int, k: int = 1) -> None:
        super().__init__()
        self.k = k
        self.out_features = num_channels * k * k
        self.out_shape = (self.out_features,)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(batch, channels * k * k)` for a map `(batch, channels, height, width)`."""
        return x.mean((2, 3)) if self.k == 1 else F.adaptive_avg_pool2d(x, self.k).flatten(1)


class Subsample(nn.Module):
    """Mean over a random subset of positions in training, over all of them in evaluation.

    Of P positions, `max(1, P // every)` different ones are drawn for each image and call, so the subset's mean is the
    mean over all positions in expectation. The idea is that of Fournier et al., Preventing Dimensional Collapse in
    Contrastive Local Learning with Subsampling (ICML 2023 workshop); how they draw was not checked against the paper.
    """

    kind = "vector"
    peers: Peers | None = None

    def __init__(self, num_channels: int, every: int = 4) -> None:
        super().__init__()
        self.every = every
        self.out_features = num_channels
        self.out_shape = (num_channels,)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(batch, channels)` for a map `(batch, channels, height, width)`."""
        x = x.flatten(2)
        if self.training and self.every > 1:
            num, channels, positions = x.shape
            first = 0 if self.peers is None else self.peers.first(num)
            draws = uniform_rows(num, positions, first=first, device=x.device)
            drawn = draws.topk(max(1, positions // self.every)).indices
            x = x.gather(2, drawn[:, None].expand(-1, channels, -1))
        return x.mean(2)


class Residual(nn.Module):
    """Residual blocks of the map's width (two 3x3 convolutions, batch norm, ReLU), then the mean over positions.

    Stands for the deeper decoders of LoCo (Xiong et al. 2020, arXiv 2008.01342): layers between a stage and the MLP of
    its loss. Which layers the paper takes is not known to us. Initialised as the trunk's residual blocks.
    """

    kind = "vector"

    def __init__(self, num_channels: int, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(CifarBasicBlock(num_channels, num_channels, 1) for _ in range(num_blocks)))
        kaiming_fan_out(self.blocks)
        self.out_features = num_channels
        self.out_shape = (num_channels,)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(batch, channels)` for a map `(batch, channels, height, width)`."""
        return self.blocks(x).mean((2, 3))


class Map(nn.Module):
    """The map itself, for heads that have layers of their own above it."""

    kind = "map"

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.out_shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Return the map `(batch, channels, height, width)`."""
        return x


class PatchMeans(nn.Module):
    """Mean over the positions of every patch's map, laid out as the patches lie in the image.

    Löwe et al. 2019 (arXiv 1905.11786) and their released code: the patches of all images enter the trunk as one batch,
    image by image and row by row, and each is pooled to one vector.
    """

    kind = "patches"

    def __init__(self, num_channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.out_shape = (num_channels, *grid)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(n, channels, rows, columns)` for maps `(n * rows * columns, channels, height, width)`."""
        return unfold(x.mean((2, 3)), self.grid)


class OverPatches(nn.Module):
    """Mean over an image's patches of what a vector readout gives for each of them."""

    kind = "vector"

    def __init__(self, readout: LocalPool | Expand | Subsample | Residual, num_patches: int) -> None:
        super().__init__()
        self.readout = readout
        self.num_patches = num_patches
        self.out_features = readout.out_features
        self.out_shape = readout.out_shape

    def forward(self, x: Tensor) -> Tensor:
        """Return `(n, d)` for maps `(n * num_patches, channels, height, width)`."""
        return self.readout(x).unflatten(0, (-1, self.num_patches)).mean(1)


Readout = LocalPool | Expand | Subsample | Residual | Map | PatchMeans | OverPatches


def make_readout(
    name: str,
    shape: tuple[int, int, int],
    *,
    expand_width: int,
    grid: tuple[int, int] | None = None,
    impl: str = "auto",
) -> Readout:
    """Return the readout `name`: its `kind` says what it gives (see `BY_KIND`), its `out_shape` how large per image.

    Args:
        name: see this module's table.
        shape: `(channels, height, width)` of the map, that of one patch where images are cut into patches.
        expand_width: width of `expand`.
        grid: `(rows, columns)` of patches into which every image is cut; None for whole images.
        impl: how `expand` is computed, see `Expand`; the others have one way only.

    Raises:
        UserError: unknown name or `impl`, regions finer than the map, `patches` of whole images or `map` of patches.
    """
    if name == "map":
        if grid is not None:
            raise UserError("readout map reads whole images, but the images are cut into patches; allowed: patches")
        return Map(shape)
    if name == "patches":
        if grid is None:
            raise UserError("readout patches needs images cut into patches, e.g. --set patches=16:8")
        return PatchMeans(shape[0], grid)
    made = _make_vector(name, shape, expand_width, impl)
    return made if grid is None else OverPatches(made, grid[0] * grid[1])


def _make_vector(
    name: str, shape: tuple[int, int, int], expand_width: int, impl: str
) -> LocalPool | Expand | Subsample | Residual:
    channels, height, width = shape
    if name == "global":
        return LocalPool(channels)
    if name in ("expand", "expand1x1"):
        return Expand(channels, expand_width, 1, impl)
    if name == "expand3x3":
        return Expand(channels, expand_width, 3, impl)
    if name == "subsample":
        return Subsample(channels)
    if match := re.fullmatch(r"subsample([1-9]\d*)", name):
        return Subsample(channels, int(match[1]))
    if match := re.fullmatch(r"residual([1-9]\d*)", name):
        return Residual(channels, int(match[1]))
    match = re.fullmatch(r"local([1-9]\d*)x\1", name)
    if match is None:
        raise UserError(f"unknown readout {name!r}; allowed: {READOUTS}")
    k = int(match[1])
    if k > min(height, width):
        raise UserError(f"readout {name} needs maps of {k}x{k} or more, but a stage's map is {height}x{width}")
    return LocalPool(channels, k)
