"""The `expand` readout: convolution, batch norm, ReLU, mean over positions, without ever making the expanded map.

The map would be the largest of all: 2048 x 56 x 56 numbers per view and image for the first block of ResNet-50 at
224 px, more than the whole trunk keeps. `_Fused` makes a few of its channels at a time, pools them, forgets them; its
backward makes them again. Batch norm treats every channel alone, so these slices are exact. A fourth convolution where
the plain formulation has three is the price; a map that fits a cache is the gain, so maps that fit one anyway are made
plainly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from localsim.distributed.norms import DividedBatchNorm2d, norm_backward, statistics, track
from localsim.distributed.peers import Peers
from localsim.errors import one_of
from localsim.network import has_hooks

_aten = torch.ops.aten

IMPLS = ("auto", "fused", "plain")

_LARGE = 2**22
"""Numbers in an expanded map from which on `auto` does not make it: about what a processor's last cache holds."""
_SLICE = 3 * 2**21
"""Numbers in a slice of the map: a few of them fit a processor's cache, and memory for one is at hand (the C library
gives what is larger than 32 MB back to the system at once, and gets it anew page by page)."""
_SLICE_ELSEWHERE = 2**27
"""The same on an accelerator, which needs large operations to be busy."""
_FEWEST_CHANNELS = 128  # in a slice: narrower convolutions leave the vector units idle


_whole: ContextVar[bool] = ContextVar("whole_maps", default=False)


class Expand(nn.Module):
    """Convolution to `width` channels without bias, batch norm, ReLU, then the mean over positions.

        pooled[n, k] = mean_p ReLU(BN_k(sum_c W[k, c] x[n, c, p]))

    CbE + GSP of Siddiqui et al. 2023 (arXiv 2302.01647), section 3.

    Args:
        num_channels: of the map it reads.
        width: channels to which it expands.
        kernel_size: 1 or 3.
        impl: `plain` runs the layers one after the other; `fused` makes a slice of channels at a time and saves nothing
            but the map it reads, with channels last; `auto` is fused for maps that are large when expanded. Both give
            the same numbers but for rounding. Where hooks listen to the layers inside, or another normalisation stands
            in for batch norm, they are run plainly.

    Raises:
        UserError: unknown `impl`.
    """

    kind = "vector"
    peers: Peers | None = None

    def __init__(self, num_channels: int, width: int, kernel_size: int = 1, impl: str = "auto") -> None:
        super().__init__()
        if impl not in IMPLS:
            raise one_of("readout_impl", impl, IMPLS)
        self.conv = nn.Conv2d(num_channels, width, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.impl = impl
        self.out_features = width
        self.out_shape = (width,)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(batch, width)` for a map `(batch, channels, height, width)`."""
        peers = self.peers if self.bn.training else None
        if self._is_plain(x, peers):
            return F.relu(self.bn(self.conv(x))).mean((2, 3))
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bn, momentum = self.bn, self.bn.momentum
        if bn.training:
            assert bn.num_batches_tracked is not None
            bn.num_batches_tracked.add_(1)
            if momentum is None:  # the mean over all batches so far
                momentum = 1 / int(bn.num_batches_tracked)
        how = (bn.training, momentum or 0.0, bn.eps, self.conv.kernel_size[0] // 2, peers)
        pooled = _Fused.apply(x, self.conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var, how)
        assert isinstance(pooled, Tensor)
        return pooled

    def _is_plain(self, x: Tensor, peers: Peers | None) -> bool:
        if self.impl == "plain" or has_hooks(self.conv) or has_hooks(self.bn):
            return True
        # what the slices do not do: other normalisations that were put in its place, and maps that torch refuses
        known = type(self.bn) in (nn.BatchNorm2d, DividedBatchNorm2d)
        usual = known and self.bn.affine and self.bn.track_running_stats
        numbers = _rows(x, peers) * math.prod(x.shape[2:])
        return not usual or numbers < 2 or (self.impl == "auto" and numbers * self.out_features < _LARGE)

    def extra_repr(self) -> str:
        return f"impl={self.impl}"


class _Fused(torch.autograd.Function):
    """The pooled map, slice by slice of its channels.

    Saved are the input map and each channel's mean and deviation. The backward of a slice runs the operations of the
    plain formulation on the slice made anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gain: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        how: tuple[bool, float, float, int, Peers | None],
    ) -> Tensor:
        training, momentum, eps, padding, peers = how
        # the layout in which oneDNN's convolutions and torch's batch norm are fastest on processors
        x = x.contiguous(memory_format=torch.channels_last)
        pooled, means, deviations = [], [], []
        ctx.num = 0  # of values that each mean is taken over, where the batch is divided
        for part in _slices(x, weight, peers):
            y = F.conv2d(x, weight[part].to(x.dtype), padding=padding)
            of_part = gain[part], bias[part], running_mean[part], running_var[part]
            if peers is None:
                z, mean, inverse_deviation = torch.native_batch_norm(y, *of_part, training, momentum, eps)
            else:
                mean, var, ctx.num = statistics(y, peers)
                track(*of_part[2:], mean, var, ctx.num, momentum)
                z = F.batch_norm(y, mean, var, *of_part[:2], False, 0.0, eps)
                inverse_deviation = torch.rsqrt(var + eps)
            del y
            pooled.append(z.relu_().mean((2, 3)))
            if not training:
                mean, inverse_deviation = running_mean[part], torch.rsqrt(running_var[part] + eps)
            means.append(mean)
            deviations.append(inverse_deviation)
        ctx.save_for_backward(x, weight, gain, bias, torch.cat(means), torch.cat(deviations))
        ctx.how = how
        return torch.cat(pooled, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gain, bias, mean, inverse_deviation = ctx.saved_tensors
        training, _, eps, padding, peers = ctx.how
        wants = ctx.needs_input_grad
        of_x = torch.zeros_like(x) if wants[0] else None
        of_weight, of_gain, of_bias = torch.zeros_like(weight), torch.zeros_like(gain), torch.zeros_like(bias)
        share = (grad / x[0, 0].numel())[..., None, None]
        for part in _slices(x, weight, peers):
            kernel = weight[part].to(x.dtype)
            spread = inverse_deviation[part]
            fixed = mean[part], spread.pow(-2) - eps
            y = F.conv2d(x, kernel, padding=padding)
            z, _, _ = torch.native_batch_norm(y, gain[part], bias[part], *fixed, False, 0.0, eps)
            of_z = _aten.threshold_backward(share[:, part].expand_as(z), z, 0)
            del z
            if peers is None:
                of_y, of_gain[part], of_bias[part] = _aten.native_batch_norm_backward(
                    of_z, y, gain[part], *fixed, mean[part], spread, training, eps, [True, True, True]
                )
            else:
                of_y, of_gain[part], of_bias[part] = norm_backward(of_z, y, gain[part], *fixed, eps, ctx.num, peers)
            del y, of_z
            for images in _groups(x):
                more, slopes, _ = _aten.convolution_backward(
                    of_y[images], x[images], kernel, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1,
                    [wants[0], wants[1], False],
                )  # fmt: skip
                if of_x is not None:
                    of_x[images] += more
                if wants[1]:
                    of_weight[part] += slopes
        return of_x, of_weight, of_gain, of_bias, None, None, None


def _slices(x: Tensor, weight: Tensor, peers: Peers | None) -> Iterator[slice]:
    """Yield slices of the output channels, each of which makes a map of a size that is dealt with fast."""
    width = max(_FEWEST_CHANNELS, _at_once(x) // (_rows(x, peers) * x[0, 0].numel()) // 16 * 16)
    return (slice(start, start + width) for start in range(0, len(weight), width))


def _rows(x: Tensor, peers: Peers | None) -> int:
    """Return by how many rows to choose slices: all processes that share a batch must choose the same."""
    return len(x) if peers is None else peers.most(len(x))


def _groups(x: Tensor) -> Iterator[slice]:
    """Yield slices of the images, for what has the size of the map that is read."""
    images = max(1, _at_once(x) // x[0].numel())
    return (slice(start, start + images) for start in range(0, len(x), images))


def _at_once(x: Tensor) -> int:
    if _whole.get():
        return x.numel() * 2**31
    return _SLICE if x.device.type == "cpu" else _SLICE_ELSEWHERE


@contextmanager
def whole_maps() -> Iterator[None]:
    """Make no slices inside the block: for tensors without memory, of which the same is counted in less time."""
    before = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(before)
