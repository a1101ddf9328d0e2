"""From a stage's map to a vector: what a tap reads.

| name | what | width |
|---|---|---|
| `global` | mean over positions (GSP) | channels |
| `local2x2`, `local3x3`, ... | mean over k x k regions, flattened (LSP) | channels * k * k |
| `expand`, `expand3x3` | 1x1 (3x3) convolution to a fixed width, batch norm, ReLU, mean (CbE + GSP) | `expand_width` |

Siddiqui et al. 2023 (arXiv 2302.01647), section 3.
"""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from localsim.errors import UserError

READOUTS = "global, local2x2 (any k x k), expand (= expand1x1), expand3x3"


class LocalPool(nn.Module):
    """Mean over k x k regions of the map, flattened to `channels * k * k`; k = 1 is global spatial pooling."""

    def __init__(self, num_channels: int, k: int = 1) -> None:
        super().__init__()
        self.k = k
        self.out_features = num_channels * k * k

    def forward(self, x: Tensor) -> Tensor:
        """Return `(batch, channels * k * k)` for a map `(batch, channels, height, width)`."""
        return x.mean((2, 3)) if self.k == 1 else F.adaptive_avg_pool2d(x, self.k).flatten(1)


class Expand(nn.Module):
    """Convolution to `width` channels without bias, batch norm, ReLU, then the mean over positions."""

    def __init__(self, num_channels: int, width: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_channels, width, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.out_features = width

    def forward(self, x: Tensor) -> Tensor:
        """Return `(batch, width)` for a map `(batch, channels, height, width)`."""
        return F.relu(self.bn(self.conv(x))).mean((2, 3))


def make_readout(name: str, shape: tuple[int, int, int], *, expand_width: int) -> LocalPool | Expand:
    """Return the readout `name` for maps of `shape` (channels, height, width).

    Raises:
        UserError: unknown name, or regions finer than the map.
    """
    channels, height, width = shape
    if name == "global":
        return LocalPool(channels)
    if name in ("expand", "expand1x1"):
        return Expand(channels, expand_width)
    if name == "expand3x3":
        return Expand(channels, expand_width, 3)
    match = re.fullmatch(r"local([1-9]\d*)x\1", name)
    if match is None:
        raise UserError(f"unknown readout {name!r}; allowed: {READOUTS}")
    k = int(match[1])
    if k > min(height, width):
        raise UserError(f"readout {name} needs maps of {k}x{k} or more, but a stage's map is {height}x{width}")
    return LocalPool(channels, k)
