"""VICReg: equal embeddings of two views, kept apart by their variance and covariance (Bardes et al. 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from localsim.network import Embedding
from localsim.rules.checks import check_number
from localsim.rules.objectives.common import check_two_views, covariance_squares, vectors


@dataclass(frozen=True, kw_only=True)
class VICReg:
    """The VICReg loss of two views (Bardes, Ponce & LeCun 2022, eq. 1 to 6, weighted as in the released code).

        L = sim * sum_{b,i} (z1_bi - z2_bi)^2 / (n d)
            + std * mean over views of sum_i relu(1 - sqrt(Var_i + eps)) / d
            + cov * sum over views of sum_{i != k} C_ik^2 / d

    with variances and covariances C over the batch of one view, divided by n - 1. Where the paper's eq. 6 adds up the
    variance terms of the views and divides the distance by n only, this follows the code, for which 25, 25, 1 were
    chosen: distance averaged over dimensions too, variance averaged over the views, covariance added up over them.

    Args:
        sim_weight: weight of the distance between the views.
        std_weight: weight of the hinge that keeps every dimension's standard deviation at 1 or more.
        cov_weight: weight of the squared covariances between dimensions.
        eps: added to the variance under the root.

    Raises:
        UserError: an option is negative, or not exactly two views are given.
    """

    reads: ClassVar[str] = "vector"
    head: ClassVar[str] = "projector"
    num_views: ClassVar[int] = 2
    needs_labels: ClassVar[bool] = False

    sim_weight: float = 25.0
    std_weight: float = 25.0
    cov_weight: float = 1.0
    eps: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("sim_weight", "std_weight", "cov_weight", "eps"):
            check_number("vicreg", name, getattr(self, name))

    def __call__(self, embeddings: tuple[Embedding, ...], labels: Tensor | None = None) -> Tensor:
        """Return the loss of embeddings `(z1, z2)`, each `(n, d)` with n >= 2; labels are not used."""
        check_two_views("vicreg", embeddings)
        views = z1, z2 = vectors("vicreg", embeddings)
        distance = F.mse_loss(z1, z2)
        spread = torch.stack([self._hinge(z) for z in views]).mean()
        redundancy = torch.stack([covariance_squares(z - z.mean(dim=0)) / z.shape[1] for z in views]).sum()
        return self.sim_weight * distance + self.std_weight * spread + self.cov_weight * redundancy

    def _hinge(self, z: Tensor) -> Tensor:
        return (1 - (z.var(dim=0) + self.eps).sqrt()).relu().mean()

    def chance_level(self, num_dimensions: int, batch_size: int) -> float:
        """Return the least loss to expect of two unrelated views, whatever their size.

        Unrelated views of standard deviation s are 2 s^2 apart, so a small s spares distance and costs variance:
        L >= min_s 2 sim s^2 + std relu(1 - sqrt(s^2 + eps)), at sqrt(s^2 + eps) = std / (4 sim) where that lies
        between sqrt(eps) and 1.
        """
        best = self.std_weight / (4 * self.sim_weight) if self.sim_weight else math.inf
        size = max(min(best, 1.0), math.sqrt(self.eps))
        return 2 * self.sim_weight * (size**2 - self.eps) + self.std_weight * max(1 - size, 0.0)
