"""Batch norm over all processes that share a batch: the statistics, and the gradients through them, of the whole batch.

torch's own SyncBatchNorm refuses tensors on the CPU, and takes no part in what stands in for batch norm elsewhere (the
fused `expand` readout, the pathways of `localsim.transport`).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from localsim.errors import UserError

if TYPE_CHECKING:
    from localsim.distributed.peers import Peers


def divide(net: nn.Module, peers: Peers | None) -> None:
    """Tell every module that looks across the images of a batch who has the rest of it; None: it has all of it again.

    Those are torch's batch norms, and modules with an attribute `peers` (None where they have the whole batch).

    Raises:
        UserError: there are peers, and a layer derived from batch norm of which nobody knows what it does.
    """
    for name, module in net.named_modules():
        if isinstance(module, _BatchNorm):
            whole = _WHOLE.get(type(module), type(module))
            if peers is not None and whole not in _DIVIDED:
                raise UserError(
                    f"layer {name} is a {type(module).__name__}, which cannot be divided among processes; "
                    "allowed: BatchNorm1d, BatchNorm2d, and modules with an attribute `peers`"
                )
            # as torch's parametrisations do: parameters, buffers, names and hooks stay where they are
            module.__class__ = whole if peers is None else _DIVIDED[whole]
        if hasattr(module, "peers"):
            vars(module)["peers"] = peers
        if peers is not None and isinstance(module, _DropoutNd) and module.p > 0:
            warnings.warn(
                f"layer {name} is a {type(module).__name__}: every process draws the same for its images, so "
                f"{peers.size} processes differ from one",
                stacklevel=2,
            )


class _Divided(_BatchNorm):
    """What batch norm does of a batch whose rows lie on several processes."""

    peers: Peers | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.peers is None or not (self.training or self.running_mean is None):
            return super().forward(input)
        self._check_input_dim(input)
        # the mean over all batches so far where there is no momentum
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1 / int(self.num_batches_tracked)
        tracked = (self.running_mean, self.running_var) if self.training else (None, None)
        return divided_norm(input, self.weight, self.bias, *tracked, momentum, self.eps, self.peers)


class DividedBatchNorm1d(_Divided, nn.BatchNorm1d):
    pass


class DividedBatchNorm2d(_Divided, nn.BatchNorm2d):
    pass


_DIVIDED: dict[type, type] = {nn.BatchNorm1d: DividedBatchNorm1d, nn.BatchNorm2d: DividedBatchNorm2d}
_WHOLE: dict[type, type] = {divided: whole for whole, divided in _DIVIDED.items()}


def statistics(x: Tensor, peers: Peers) -> tuple[Tensor, Tensor, int]:
    """Return mean and variance `(channels,)` of the whole batch of which `x` `(n, channels, ...)` are some rows.

    The variance is divided by the number of values, which is returned too. In float32, or float64.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    mean, var = torch.batch_norm_update_stats(wide, None, None, 0.0)
    return peers.combine(mean, var, x.numel() // x.shape[1])


def track(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor, num: int, momentum: float
) -> None:
    """Move running statistics as torch does: towards the mean, and the variance divided by `num - 1`."""
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (num / max(1, num - 1))).to(running_var.dtype), momentum)


def divided_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    peers: Peers,
) -> Tensor:
    """Return what `F.batch_norm(..., training=True)` of the whole batch gives for the rows `x` of this process.

    With xhat = (x - mean) / sqrt(var + eps) over all N values of a channel, and g the gradient that arrives,

        dL/dx = weight / sqrt(var + eps) * (g - sum(g) / N - xhat sum(g xhat) / N)

    where the sums go over all processes. The gradients of weight and bias are this process's part of them.
    """
    normalised = _DividedNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps, peers)
    assert isinstance(normalised, Tensor)
    return normalised


class _DividedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        peers: Peers,
    ) -> Tensor:
        mean, var, num = statistics(x, peers)
        if num < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")
        track(running_mean, running_var, mean, var, num, momentum)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.num, ctx.peers, ctx.biased = eps, num, peers, bias is not None
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        of_x, of_weight, of_bias = norm_backward(grad, x, weight, mean, var, ctx.eps, ctx.num, ctx.peers)
        return of_x, None if weight is None else of_weight, of_bias if ctx.biased else None, *[None] * 5


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float, num: int, peers: Peers
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `divided_norm` with respect to `x`, weight and bias, see there."""
    # with fixed statistics, whose gradients of weight and bias are the same
    _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, mean, var, None, None, False, eps, [False, True, True]
    )
    slopes, sums = peers.sum(of_weight, of_bias)
    spread = torch.rsqrt(var + eps)
    gain = spread if weight is None else spread * weight.to(spread.dtype)
    per_channel = (1, -1, *[1] * (x.dim() - 2))
    slope = gain * spread * slopes.to(gain.dtype) / num
    constant = mean * slope - gain * sums.to(gain.dtype) / num
    # two passes and one new map, for passes over maps are what batch norm costs on a CPU. Not in bfloat16, in which
    # what is taken off every value alike would be rounded alike
    whole = torch.addcmul(constant.view(per_channel), x.to(mean.dtype), slope.view(per_channel), value=-1).addcmul_(
        grad.to(mean.dtype), gain.view(per_channel)
    )
    return whole.to(x.dtype), of_weight, of_bias
