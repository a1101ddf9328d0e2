"""Latent predictive learning: pull views together, push images apart, decorrelate (Halvagal & Zenke 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from localsim.network import Embedding
from localsim.rules.checks import check_choice, check_number
from localsim.rules.objectives.common import (
    check_two_views,
    covariance_squares,
    derangement,
    parts,
    vectors,
)


@dataclass(frozen=True, kw_only=True)
class LPL:
    """The LPL loss of two views (Halvagal & Zenke 2023, Methods; as in the released code, which the erratum confirms).

        L = pull * sum_{b,i} (z1_bi - z2_bi)^2 / (n M)
            + push * mean_i -log(Var_i + eps) + decorrelation * sum_{i != k} C_ik^2 / (M^2 - M)

    Variances and covariances C are over the batch of one view, divided by n - 1; the push and decorrelation terms are
    averaged over the two views. Nothing needs a stop-gradient: the deviations from a batch mean add up to 0, so the
    gradient through the mean is exactly 0 in both terms, and each unit's rule is a sum over samples of
    (deviation) x (a factor of the statistics).

    Batch-free statistics: where the head gives `(z, mean, var)` (head `stale_statistics`), mean m and variance v are of
    the step before, and constants. The push term is then the tangent of -log at v,

        mean_i -log(v_i + eps) - (V_i - v_i) / (v_i + eps),    V_i = sum_b (z_bi - m_i)^2 / (n - 1)

    a surrogate whose gradient is that of -log(Var + eps) with its own factor at the stale values, a sum of terms of one
    sample each: dL/dz_bi = -2 (z_bi - m_i) / ((n - 1) (v_i + eps) M). C is centred on m as well. (The released
    stale variant has the same push gradient, but centres C on the batch mean.) If m and v are those of the batch,
    loss and gradient are those of the batch form.

    Args:
        pull: weight of the distance between views (the predictive term).
        push: weight of the variance (Hebbian) term.
        decorrelation: weight of the squared covariances between different dimensions.
        eps: added to the variance, above 0.
        positives: "augmented" (two views of an image are pulled together) or "shuffled" (a view and that of a random
            other image: the control whose predictive term has nothing to predict).

    Raises:
        UserError: an option is outside its range, not exactly two views are given, or one image is to be shuffled.
    """

    reads: ClassVar[str] = "vector or statistics"
    head: ClassVar[str] = "none"
    num_views: ClassVar[int] = 2
    needs_labels: ClassVar[bool] = False

    pull: float = 1.0
    push: float = 1.0
    decorrelation: float = 10.0
    eps: float = 1e-4
    positives: str = "augmented"

    def __post_init__(self) -> None:
        for name in ("pull", "push", "decorrelation"):
            check_number("lpl", name, getattr(self, name))
        check_number("lpl", "eps", self.eps, above_zero=True)
        check_choice("lpl", "positives", self.positives, ("augmented", "shuffled"))

    def __call__(self, embeddings: tuple[Embedding, ...], labels: Tensor | None = None) -> Tensor:
        """Return the loss of embeddings `(z1, z2)`, each `(n, M)` or `(z, mean, var)`, n >= 2; labels are not used."""
        check_two_views("lpl", embeddings)
        if isinstance(embeddings[0], Tensor):
            z1, z2 = vectors("lpl", embeddings)
            push = sum(self._push(z) for z in (z1, z2)) / 2
            centred = [z - z.mean(dim=0) for z in (z1, z2)]
        else:
            stale = parts("lpl", embeddings, 3, "vectors, or vectors with stale statistics")
            (z1, _, _), (z2, _, _) = stale
            push = sum(self._stale_push(*view) for view in stale) / 2
            centred = [z - mean for z, mean, _ in stale]
        partners = z2[derangement(len(z2), z2.device)] if self.positives == "shuffled" else z2
        num_pairs = max(z1.shape[1] ** 2 - z1.shape[1], 1)  # 1 where there is one dimension, and no covariance
        decorrelation = sum(covariance_squares(deviations) / num_pairs for deviations in centred) / 2
        return self.pull * F.mse_loss(z1, partners) + self.push * push + self.decorrelation * decorrelation

    def _push(self, z: Tensor) -> Tensor:
        return -(z.var(dim=0) + self.eps).log().mean()

    def _stale_push(self, z: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        now = (z - mean).square().sum(dim=0) / (len(z) - 1)
        return -((var + self.eps).log() + (now - var) / (var + self.eps)).mean()

    def chance_level(self, num_dimensions: int, batch_size: int) -> float | None:
        """Return the least loss to expect of two unrelated views, whatever their size; None if pull is 0.

        Unrelated views of variance v are 2 v apart: L >= min_v 2 pull v - push log(v + eps), at
        v + eps = push / (2 pull) where that is eps or more. Without pull, the larger the better: no such number.
        """
        if self.pull == 0:
            return None
        size = max(self.push / (2 * self.pull), self.eps)
        return 2 * self.pull * (size - self.eps) - self.push * math.log(size)
