"""Barlow Twins: make the cross-correlation of two views' embeddings the identity (Zbontar et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from localsim.network import Embedding
from localsim.rules.checks import check_number
from localsim.rules.objectives.common import check_two_views, column_products, vectors


@dataclass(frozen=True, kw_only=True)
class BarlowTwins:
    """The Barlow Twins loss of two views (Zbontar et al. 2021, eq. 1 and 2).

        C = N(z1)^T N(z2) / n,    L = scale * (sum_i (C_ii - 1)^2 + lambda * sum_{i != j} C_ij^2)

    where N subtracts the batch mean of every embedding dimension and divides by sqrt(variance + eps). Where the
    embedding is wide for its batch, the sum over i != j is formed without C; see `column_products`.

    Args:
        lambda_: weight of the off-diagonal (redundancy) term.
        scale: factor on the whole loss; 0.024 in the released 300-epoch recipe. Under LARS it matters only for
            parameters that LARS does not adapt (biases, batch norm).
        eps: added to the batch variance, as in batch norm.

    Raises:
        UserError: an option is negative, or not exactly two views are given.
    """

    reads: ClassVar[str] = "vector"
    head: ClassVar[str] = "projector"
    num_views: ClassVar[int] = 2
    needs_labels: ClassVar[bool] = False

    lambda_: float = 0.0051
    scale: float = 0.024
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("lambda_", "scale", "eps"):
            check_number("barlow_twins", name, getattr(self, name))

    def __call__(self, embeddings: tuple[Embedding, ...], labels: Tensor | None = None) -> Tensor:
        """Return the loss of embeddings `(z1, z2)`, each `(n, d)`; labels are not used."""
        check_two_views("barlow_twins", embeddings)
        z1, z2 = (self._normalised(z) for z in vectors("barlow_twins", embeddings))
        diagonal, off_diagonal = column_products(z1, z2)
        num = len(z1)
        return self.scale * ((diagonal / num - 1).square().sum() + self.lambda_ / num**2 * off_diagonal)

    def correlation(self, z1: Tensor, z2: Tensor) -> Tensor:
        """Return the `(d, d)` cross-correlation matrix of two views."""
        return self._normalised(z1).T @ self._normalised(z2) / len(z1)

    def _normalised(self, z: Tensor) -> Tensor:
        variance, mean = torch.var_mean(z, dim=0, correction=0)
        return (z - mean) * torch.rsqrt(variance + self.eps)

    def chance_level(self, num_dimensions: int, batch_size: int) -> float:
        """Return the expected loss of two unrelated views: where "learns nothing" lies.

        Then C_ij is the correlation coefficient of n unrelated pairs, with E[C_ij] = 0 and E[C_ij^2] = 1 / (n - 1)
        (eps neglected), so L = scale * (d (1 + 1 / (n - 1)) + lambda d (d - 1) / (n - 1)); n is 2 or more.
        """
        d, freedom = num_dimensions, batch_size - 1
        return self.scale * (d * (1 + 1 / freedom) + self.lambda_ * d * (d - 1) / freedom)
