"""Contrastive objectives: tell an image's other views (SimCLR), or its class (SupCon), from the rest of the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from localsim.network import Embedding
from localsim.rules.checks import check_number
from localsim.rules.objectives.common import check_two_views, needed, vectors


@dataclass(frozen=True, kw_only=True)
class SimCLR:
    """The NT-Xent loss of two views (Chen et al. 2020, eq. 1 and algorithm 1).

        L = mean over all 2n embeddings a of  -log(exp(s(a, a') / T) / sum_{b != a} exp(s(a, b) / T))

    where s is the cosine and a' the other view of the same image.

    Args:
        temperature: T, above 0.

    Raises:
        UserError: the temperature is not above 0, or not exactly two views are given.
    """

    reads: ClassVar[str] = "vector"
    head: ClassVar[str] = "projector"
    num_views: ClassVar[int] = 2
    needs_labels: ClassVar[bool] = False

    temperature: float = 0.5

    def __post_init__(self) -> None:
        check_number("simclr", "temperature", self.temperature, above_zero=True)

    def __call__(self, embeddings: tuple[Embedding, ...], labels: Tensor | None = None) -> Tensor:
        """Return the loss of embeddings `(z1, z2)`, each `(n, d)`; labels are not used."""
        check_two_views("simclr", embeddings)
        views = vectors("simclr", embeddings)
        num = len(views[0])
        log_p = _log_probabilities(views, self.temperature)
        images = torch.arange(2 * num, device=log_p.device)
        return -log_p[images, images.roll(num)].mean()

    def chance_level(self, num_dimensions: int, batch_size: int) -> float:
        """Return log(2n - 1), the least loss to expect of unrelated views.

        Reached where all cosines are equal, as in many dimensions; with m = 2n - 1 equally likely candidates the mean
        of -log softmax is never below log m.
        """
        return math.log(2 * batch_size - 1)


@dataclass(frozen=True, kw_only=True)
class SupCon:
    """The supervised contrastive loss of any number of views (Khosla et al. 2020, eq. 2: L_out).

        L = mean over a of  -1 / |P(a)| sum_{p in P(a)} log(exp(s(a, p) / T) / sum_{b != a} exp(s(a, b) / T))

    over all views of all images together, where s is the cosine and P(a) are all others of a's class. Anchors a without
    another of their class are left out of the mean; without any anchor the loss is 0. The paper's factor T / T_0 is 1.

    Args:
        temperature: T, above 0.

    Raises:
        UserError: the temperature is not above 0, or there are no labels.
    """

    reads: ClassVar[str] = "vector"
    head: ClassVar[str] = "projector"
    num_views: ClassVar[int] = 2
    needs_labels: ClassVar[bool] = True

    temperature: float = 0.07

    def __post_init__(self) -> None:
        check_number("supcon", "temperature", self.temperature, above_zero=True)

    def __call__(self, embeddings: tuple[Embedding, ...], labels: Tensor | None) -> Tensor:
        """Return the loss of one embedding `(n, d)` per view, with labels `(n,)`."""
        views = vectors("supcon", embeddings)
        classes = needed("supcon", labels).repeat(len(views))
        log_p = _log_probabilities(views, self.temperature)
        positive = classes[:, None] == classes
        positive.fill_diagonal_(False)
        num = positive.sum(dim=1)
        per_anchor = log_p.masked_fill(~positive, 0).sum(dim=1) / num.clamp(min=1)
        return -per_anchor.sum() / (num > 0).sum().clamp(min=1)

    def chance_level(self, num_dimensions: int, batch_size: int) -> None:
        """Return None: the level is log(views * n - 1), and the number of views is not known here."""


def _log_probabilities(views: list[Tensor], temperature: float) -> Tensor:
    """Return `(m, m)` log-probabilities that a row's partner is the column, for all m embeddings of all views."""
    z = F.normalize(torch.cat(views), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    return (z @ z.T / temperature).masked_fill(itself, -math.inf).log_softmax(dim=1)
