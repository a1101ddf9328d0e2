"""Statistics of the previous step, so that a rule needs no statistics of the batch at hand (LPL's stale estimates)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from localsim.distributed.peers import Peers
from localsim.gradients import constant
from localsim.rules.site import Site


class StaleStatistics(nn.Module):
    """Give every embedding `(n, d)` together with mean and variance `(d,)` of the step before.

    Halvagal & Zenke 2023, released code, `stale_estimates`. A training step is two forward passes, one per view, both
    of which see the same statistics: the mean over the two views of the previous step's batch means, and likewise of
    its variances (divided by n - 1). Every second training pass puts those of the step just ended in place. In the very
    first step, each view sees its own. In evaluation the statistics are read and never changed.

    Args:
        site: where the tap reads: vectors.
    """

    gives: ClassVar[str] = "statistics"
    takes: ClassVar[str] = "vector"
    peers: Peers | None = None

    mean: Tensor
    var: Tensor
    first_mean: Tensor
    first_var: Tensor
    num_passes: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        (width,) = site.shape
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.register_buffer("first_mean", torch.zeros(width))
        self.register_buffer("first_var", torch.zeros(width))
        self.register_buffer("num_passes", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `(z, mean, var)`; mean and variance are constants of the loss."""
        z = z.to(torch.promote_types(z.dtype, self.mean.dtype))
        if self.peers is None:
            var, mean = torch.var_mean(constant(z), dim=0)
        else:
            var, mean = torch.var_mean(constant(z), dim=0, correction=0)
            mean, var, num = self.peers.combine(mean, var, len(z))
            var = var * (num / (num - 1))
        known = self.num_passes >= 2
        seen = z, torch.where(known, self.mean, mean), torch.where(known, self.var, var)
        if self.training:
            second = self.num_passes % 2 == 1
            self.mean = torch.where(second, (self.first_mean + mean) / 2, self.mean)
            self.var = torch.where(second, (self.first_var + var) / 2, self.var)
            self.first_mean, self.first_var = mean, var
            self.num_passes = self.num_passes + 1
        return seen
