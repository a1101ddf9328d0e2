"""Supervised objectives: classify, match similarities, and keep what is needed to see the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from localsim.errors import UserError
from localsim.network import Embedding
from localsim.rules.checks import check_choice, check_fraction, check_number
from localsim.rules.objectives.common import needed, parts, vectors
from localsim.rules.objectives.contrastive import SupCon


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """The cross-entropy of a softmax classifier, averaged over images, then views.

    Args:
        label_smoothing: share of the target probability that is spread evenly over all classes, in [0, 1).

    Raises:
        UserError: the smoothing is outside its range, or there are no labels.
    """

    reads: ClassVar[str] = "vector"
    head: ClassVar[str] = "classifier"
    num_views: ClassVar[int] = 1
    needs_labels: ClassVar[bool] = True

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_fraction("cross_entropy", "label_smoothing", self.label_smoothing, below_one=True)

    def __call__(self, embeddings: tuple[Embedding, ...], labels: Tensor | None) -> Tensor:
        """Return the loss of one `(n, classes)` of logits per view, with labels `(n,)`."""
        views, classes = vectors("cross_entropy", embeddings), needed("cross_entropy", labels)
        losses = [F.cross_entropy(logits, classes, label_smoothing=self.label_smoothing) for logits in views]
        return torch.stack(losses).mean()

    def chance_level(self, num_dimensions: int, batch_size: int) -> float:
        """Return log(classes), the loss of equal probabilities; an embedding has one dimension per class."""
        return math.log(num_dimensions)


@dataclass(frozen=True, kw_only=True)
class SimilarityMatching:
    """Prediction and similarity matching, "predsim" (Noekland & Eidnes 2019, arXiv 1901.06656).

        L = (1 - beta) * cross-entropy(logits, labels) + beta * sum_{a,b} (S_ab(features) - S_ab(labels))^2 / n^2

    averaged over views. S is the cosine between the rows of a matrix (features; one-hot labels) after each row's own
    mean is taken off, as in the released code; so two labels have similarity 1 if equal, and -1 / (classes - 1) if not.

    Args:
        beta: weight of the similarity term, in [0, 1].

    Raises:
        UserError: beta is outside its range, or there are no labels.
    """

    reads: ClassVar[str] = "similarity"
    head: ClassVar[str] = "predsim"
    num_views: ClassVar[int] = 1
    needs_labels: ClassVar[bool] = True

    beta: float = 0.99

    def __post_init__(self) -> None:
        check_fraction("predsim", "beta", self.beta)

    def __call__(self, embeddings: tuple[Embedding, ...], labels: Tensor | None) -> Tensor:
        """Return the loss of one (logits `(n, classes)`, features `(n, d)`) per view, with labels `(n,)`."""
        classes = needed("predsim", labels)
        losses = []
        for logits, features in parts("predsim", embeddings, 2, "logits and features"):
            wanted = _similarity(F.one_hot(classes, logits.shape[1]).to(features.dtype))
            matching = F.mse_loss(_similarity(features), wanted)
            losses.append((1 - self.beta) * F.cross_entropy(logits, classes) + self.beta * matching)
        return torch.stack(losses).mean()

    def chance_level(self, num_dimensions: int, batch_size: int) -> None:
        """Return None: it depends on how many images of the batch share a class."""


@dataclass(frozen=True, kw_only=True)
class InfoPro:
    """Reconstruct the image, and tell its class (InfoPro: Wang et al. 2021, arXiv 2101.10832).

        L = reconstruction * BCE(sigmoid(image), target) + task * (cross-entropy or SupCon of the vectors)

    BCE is the binary cross-entropy averaged over pixels, channels and images, then views; the cross-entropy is averaged
    over views, SupCon takes the vectors of all views together. The paper lets both weights change linearly from the
    first tap to the last but one: give each tap its own. Defaults are the first tap's in the released command for
    ResNet-32 in two modules.

    Args:
        reconstruction: weight of the binary cross-entropy, lambda_1 in the paper.
        task: weight of the loss on the labels, lambda_2 in the paper.
        contrast: supervised contrastive loss instead of cross-entropy.
        temperature: of the contrastive loss; only with contrast.

    Raises:
        UserError: an option is outside its range, or there are no labels.
    """

    reads: ClassVar[str] = "reconstruction"
    head: ClassVar[str] = "infopro"
    num_views: ClassVar[int] = 1
    needs_labels: ClassVar[bool] = True

    reconstruction: float = 5.0
    task: float = 1.0
    contrast: bool = False
    temperature: float = 0.07

    def __post_init__(self) -> None:
        check_number("infopro", "reconstruction", self.reconstruction)
        check_number("infopro", "task", self.task)
        check_choice("infopro", "contrast", self.contrast, (False, True))
        check_number("infopro", "temperature", self.temperature, above_zero=True)
        if not self.contrast and self.temperature != 0.07:
            raise UserError("infopro: temperature is of the contrastive loss; give contrast true, or leave it out")

    def __call__(self, embeddings: tuple[Embedding, ...], labels: Tensor | None) -> Tensor:
        """Return the loss of one (vectors, logits of the image, image) per view, with labels `(n,)`.

        Vectors are `(n, d)`, logits if not `contrast`; images `(n, 3, height, width)`, the target's values in [0, 1].
        """
        classes = needed("infopro", labels)
        views = parts("infopro", embeddings, 3, "vectors and reconstructed images")
        inner = SupCon(temperature=self.temperature) if self.contrast else CrossEntropy()
        task = inner(tuple(vector for vector, _, _ in views), classes)
        errors = [F.binary_cross_entropy_with_logits(image, target) for _, image, target in views]
        return self.reconstruction * torch.stack(errors).mean() + self.task * task

    def chance_level(self, num_dimensions: int, batch_size: int) -> None:
        """Return None: it depends on the images."""


def _similarity(x: Tensor) -> Tensor:
    """Return the `(n, n)` cosines between rows of `(n, d)`, each less its own mean; 0 for rows of equal values."""
    rows = F.normalize(x - x.mean(dim=1, keepdim=True), dim=1, eps=1e-8)
    return rows @ rows.T
