"""Noise at the boundary between stages: added to a stage's output before its own head and the next stage."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from localsim.distributed.peers import Peers
from localsim.errors import UserError
from localsim.rng import normal_rows

# the dimensions of (batch, channel, height, width) over which the standard deviation is taken
_SCALES: dict[str, tuple[int, ...] | None] = {
    "none": None,
    "all": (0, 1, 2, 3),
    "hw": (2, 3),
    "channel": (0, 2, 3),
    "c_released": (2,),
}
NOISES = tuple(_SCALES)


@dataclass(frozen=True)
class Noise:
    """Which noise, and how much: kind and sigma, written `kind:sigma` (`none` stands alone).

    x + sigma * std(x) * n,  n ~ N(0, 1) per element, with the standard deviation (unbiased) taken over

    - `all`: the whole tensor, one number (the published best, Siddiqui et al. 2023);
    - `hw`: every channel of every sample;
    - `channel`: every channel over the batch;
    - `c_released`: the height axis only, which is what the released code of the paper does under the name "c",
      although its comment says otherwise.

    The gradient flows through the standard deviation too, as it does in the released code.
    """

    kind: str = "none"
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in NOISES:
            raise UserError(f"unknown noise {self.kind!r}; allowed: none, or KIND:SIGMA with KIND of {_kinds()}")
        if not self.sigma >= 0 or self.sigma == float("inf"):
            raise UserError(f"noise sigma is {self.sigma}; allowed: numbers >= 0, e.g. all:0.25")
        if (self.kind == "none") != (self.sigma == 0):
            raise UserError(f"noise {self.kind!r} with sigma {self.sigma:g} means nothing; use none, or e.g. all:0.25")

    def __str__(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind}:{self.sigma}"

    @classmethod
    def parse(cls, text: str) -> Noise:
        """Return the noise that a text such as `all:0.25` or `none` names; UserError if it names none."""
        if text == "none":
            return cls()
        match = re.fullmatch(r"(\w+):([-+.\w]+)", text)
        if match is None:
            raise UserError(f"noise {text!r} is not understood; allowed: none, or KIND:SIGMA with KIND of {_kinds()}")
        try:
            sigma = float(match[2])
        except ValueError:
            raise UserError(f"noise sigma {match[2]!r} is not a number; allowed: numbers > 0, e.g. all:0.25") from None
        return cls(match[1], sigma)


class BoundaryNoise(nn.Module):
    """A module that adds `noise` in training mode and is the identity in evaluation mode.

    Every row of the batch has draws of its own, and the deviation is the whole batch's, whoever has the rest of it.
    """

    peers: Peers | None = None

    def __init__(self, noise: Noise) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        """Return the map `(batch, channels, height, width)` with noise; same shape and dtype."""
        dims = _SCALES[self.noise.kind]
        if dims is None or not self.training:
            return x
        first = 0 if self.peers is None else self.peers.first(len(x))
        # over single rows, nobody else is asked
        peers = self.peers if 0 in dims else None
        noisy = _Noisy.apply(x, _normal_like(x, first), dims, self.noise.sigma, peers)
        assert isinstance(noisy, Tensor)
        return noisy

    def extra_repr(self) -> str:
        return str(self.noise)


class _Noisy(torch.autograd.Function):
    """x + sigma * std(x) * n, with the gradient through the deviation too.

    With std over N elements of mean m, and g the gradient that arrives,

        dL/dx = g + sigma * (x - m) / ((N - 1) std) * sum(g n)

    Autograd's own way computes the same in twice as many passes over the map.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: Tensor, dims: tuple[int, ...], sigma: float, peers: Peers | None) -> Tensor:
        number = math.prod(x.shape[d] for d in dims)
        # in float32, or float64, for a sum of so many; a 1x1 map has no deviation over its positions: 0, not NaN
        wide = x if x.dtype == torch.float64 else x.float()
        # not std_mean, which is several times slower on maps with channels last
        mean = wide.mean(dims, keepdim=True)
        if peers is None:
            std = wide.std(dims, correction=min(1, number - 1), keepdim=True)
        else:
            mean, var, number = peers.combine(mean, wide.var(dims, correction=0, keepdim=True), number)
            std = (var * (number / max(1, number - 1))).sqrt()
        ctx.save_for_backward(x, n, std, mean)
        ctx.dims, ctx.sigma, ctx.number, ctx.peers = dims, sigma, number, peers
        return torch.addcmul(x, std.to(x.dtype), n, value=sigma)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, n, std, mean = ctx.saved_tensors
        heard = (grad * n).sum(ctx.dims, keepdim=True, dtype=std.dtype)
        if ctx.peers is not None:
            (heard,) = ctx.peers.sum(heard)
        slope = torch.where(std > 0, ctx.sigma * heard / (max(1, ctx.number - 1) * std), 0)
        return torch.addcmul(grad, x - mean.to(x.dtype), slope.to(x.dtype)), None, None, None, None


def _normal_like(x: Tensor, first: int) -> Tensor:
    """Return standard normal numbers in the layout of a map, drawn row by row in the order of its memory.

    On the CPU torch draws ten times faster into memory that lies in the order of its shape, and float32 faster than
    bfloat16.
    """
    layout = torch.empty_like(x)
    wide = x.new_empty(0, dtype=x.dtype if x.dtype == torch.float64 else torch.float32)
    drawn = normal_rows(len(x), x[0].numel(), first=first, like=wide).to(x.dtype)
    return drawn.as_strided(layout.shape, layout.stride())


def make_boundary(noise: Noise) -> nn.Module:
    """Return the module for a stage's boundary."""
    return nn.Identity() if noise.kind == "none" else BoundaryNoise(noise)


def _kinds() -> str:
    return ", ".join(kind for kind in NOISES if kind != "none")
