"""Predictive objectives: tell what is really there from samples of elsewhere, given a prediction of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from localsim.errors import UserError
from localsim.gradients import constant
from localsim.network import Embedding
from localsim.rules.checks import check_choice, check_count
from localsim.rules.objectives.common import check_two_views, derangement


@dataclass(frozen=True, kw_only=True)
class InfoNCE:
    """InfoNCE at several distances (van den Oord et al. 2018, eq. 4), as in Greedy InfoMax (Loewe et al. 2019).

        L = mean over places of  -log(exp(z . p) / (exp(z . p) + sum_j exp(z_j . p)))

    then over steps k and views: p is a prediction, z its target, and the z_j are `num_negatives` targets drawn
    uniformly with replacement, independently for every pair, from the targets of all places of all images that the
    step k has (as in the released code, the own target z may be among them).

    Args:
        num_negatives: negatives per pair.
        skip: rows left out: prediction p_k at row r is of row r + k + skip. For pair "below" only.
        pair: "below" (targets from lower rows of the same view) or "views" (one step, k = 1: the same place in the
            other one of two views).
        asymmetric: the embedding is (z, p_1..p_K, q_1..q_K) and L(z, p) + L(constant z, q) is minimised, with the
            same negatives in both: no gradient needs a weight of the predictor's transpose.

    Raises:
        UserError: an option is outside its range, or the embeddings do not fit to the options (wrong number of
            predictions or views; a step k with k + skip rows or less in the grid).
    """

    reads: ClassVar[str] = "predictions"
    head: ClassVar[str] = "predictor"
    needs_labels: ClassVar[bool] = False

    num_negatives: int = 16
    skip: int = 1
    pair: str = "below"
    asymmetric: bool = False

    def __post_init__(self) -> None:
        check_count("infonce", "num_negatives", self.num_negatives, at_least=1)
        _check_pairing("infonce", self.skip, self.pair, self.asymmetric)

    @property
    def num_views(self) -> int:
        """Views that a run makes of every image unless told otherwise: 1, or 2 where they predict each other."""
        return 2 if self.pair == "views" else 1

    def __call__(self, embeddings: tuple[Embedding, ...], labels: Tensor | None = None) -> Tensor:
        """Return the loss of one `(z, p_1, ..., p_K)` per view, each `(n, d, rows, columns)`; labels are not used."""
        losses = []
        for steps in _views("infonce", embeddings, self.skip, self.pair, self.asymmetric):
            for comparisons in steps:
                num = comparisons[0][0].numel() // comparisons[0][0].shape[1]
                drawn = torch.randint(num, (num, self.num_negatives), device=comparisons[0][0].device)
                losses.append(sum(_nce(_flat(z), _flat(p), drawn) for z, p in comparisons))
        return torch.stack(losses).mean()

    def chance_level(self, num_dimensions: int, batch_size: int) -> float:
        """Return log(1 + num_negatives), the least loss to expect of predictions unrelated to their targets.

        Reached where all scores are equal. Twice that if asymmetric.
        """
        return (1 + self.asymmetric) * math.log(1 + self.num_negatives)


@dataclass(frozen=True, kw_only=True)
class Hinge:
    """The hinge loss of CLAPP, contrasting with one other image (Illing et al. 2021, arXiv 2010.08262).

        L = mean relu(1 - z . p) + mean relu(1 + z' . p)

    over places and images, then over steps k and views: p is a prediction, z its target, and z' the target at the same
    place in another image, one random other image per image and view, the same for all places and steps.

    Sampling "either" tosses a fair coin per image and view: the image then counts for the positive term only or for the
    negative term only. Each mean is over the images that count for it (0 if there is none), as in the released code;
    so the expected loss, and not half of it, is that of "both" but for batches without an image on one side.

    Args:
        skip: rows left out: prediction p_k at row r is of row r + k + skip. For pair "below" only.
        pair: "below" (targets from lower rows of the same view) or "views" (one step, k = 1: the same place in the
            other one of two views).
        sampling: "both" (CLAPP-s: every image has a positive and a negative) or "either" (CLAPP).
        asymmetric: the embedding is (z, p_1..p_K, q_1..q_K) and L(z, p) + L(constant z, q) is minimised, with the
            same other image and coin in both: no gradient needs a weight of the predictor's transpose.

    Raises:
        UserError: an option is outside its range, the embeddings do not fit to the options (wrong number of
            predictions or views; a step k with k + skip rows or less in the grid), or a batch has one image only.
    """

    reads: ClassVar[str] = "predictions"
    head: ClassVar[str] = "predictor"
    needs_labels: ClassVar[bool] = False

    skip: int = 1
    pair: str = "below"
    sampling: str = "both"
    asymmetric: bool = False

    def __post_init__(self) -> None:
        _check_pairing("hinge", self.skip, self.pair, self.asymmetric)
        check_choice("hinge", "sampling", self.sampling, ("both", "either"))

    @property
    def num_views(self) -> int:
        """Views that a run makes of every image unless told otherwise: 1, or 2 where they predict each other."""
        return 2 if self.pair == "views" else 1

    def __call__(self, embeddings: tuple[Embedding, ...], labels: Tensor | None = None) -> Tensor:
        """Return the loss of one `(z, p_1, ..., p_K)` per view, each `(n, d, rows, columns)`; labels are not used."""
        losses = []
        for steps in _views("hinge", embeddings, self.skip, self.pair, self.asymmetric):
            z = steps[0][0][0]
            other = derangement(len(z), z.device)
            if self.sampling == "either":
                positive = (torch.rand(len(z), device=z.device) < 0.5).to(z.dtype)
                weights = positive / positive.sum().clamp(min=1), (1 - positive) / (1 - positive).sum().clamp(min=1)
            else:
                weights = (z.new_ones(len(z)) / len(z),) * 2
            losses += [sum(_hinge(z, p, other, *weights) for z, p in comparisons) for comparisons in steps]
        return torch.stack(losses).mean()

    def chance_level(self, num_dimensions: int, batch_size: int) -> float:
        """Return 2, the least loss to expect of predictions unrelated to their targets.

        relu(1 - u) + relu(1 + u) is 2 for scores u between -1 and 1 and more beyond. With "either", each term is
        missing in 2^-n of the batches of n images; twice the level if asymmetric.
        """
        present = 1 - 2.0**-batch_size if self.sampling == "either" else 1.0
        return (1 + self.asymmetric) * 2 * present


Comparison = tuple[Tensor, Tensor]
"""A target and what was predicted of it, both `(n, d, rows, columns)`."""


def _check_pairing(objective: str, skip: object, pair: object, asymmetric: object) -> None:
    check_count(objective, "skip", skip, at_least=-1 if pair == "views" else 0)
    check_choice(objective, "pair", pair, ("below", "views"))
    check_choice(objective, "asymmetric", asymmetric, (False, True))
    if pair == "views" and skip not in (1, -1):  # the default, and what a predictor of the same place is told
        raise UserError(f"{objective}: skip counts rows below and means nothing for pair 'views'; leave it out")


def _views(
    objective: str, embeddings: tuple[Embedding, ...], skip: int, pair: str, asymmetric: bool
) -> list[list[list[Comparison]]]:
    """Return for every view and step what to compare: [(z, p)], or [(z, p), (constant z, q)] if asymmetric."""
    if pair == "views":
        check_two_views(f"{objective} with pair 'views'", embeddings)
    views = []
    for view, embedding in enumerate(embeddings):
        if isinstance(embedding, Tensor) or len(embedding) < 2 or (asymmetric and len(embedding) % 2 == 0):
            wanted = "predictions in pairs (an asymmetric predictor)" if asymmetric else "targets and predictions"
            raise UserError(f"{objective} reads {wanted}, but its head does not give them; use another head")
        targets = embeddings[1 - view][0] if pair == "views" else embedding[0]
        predictions = embedding[1:]
        num_steps = len(predictions) // (1 + asymmetric)
        if pair == "views" and num_steps != 1:
            raise UserError(f"{objective}: pair 'views' has 1 step, not {num_steps}; give the predictor steps 1")
        steps = []
        for k in range(1, num_steps + 1):
            down, rows = (0 if pair == "views" else k + skip), targets.shape[2]
            if rows <= down:
                raise UserError(
                    f"{objective}: step {k} with skip {skip} looks {down} rows down, but there are {rows} rows; "
                    "use fewer steps, a smaller skip or more patches"
                )
            z = targets[:, :, down:]
            # of several predictors of one step, the first moves the targets, the second the context
            sides = predictions[k - 1 :: num_steps]
            comparisons = zip((z, constant(z)), sides, strict=False)
            steps.append([(target, side[:, :, : rows - down]) for target, side in comparisons])
        views.append(steps)
    return views


def _flat(x: Tensor) -> Tensor:
    """Return `(n * rows * columns, d)` of `(n, d, rows, columns)`."""
    return x.movedim(1, 3).flatten(0, 2)


def _nce(z: Tensor, p: Tensor, drawn: Tensor) -> Tensor:
    """Return InfoNCE of flat targets and predictions `(m, d)`, with negatives `z[drawn]`, drawn `(m, negatives)`."""
    scores = torch.cat([(z * p).sum(1, keepdim=True), torch.einsum("mjd,md->mj", z[drawn], p)], dim=1)
    return (scores.logsumexp(dim=1) - scores[:, 0]).mean()


def _hinge(z: Tensor, p: Tensor, other: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Return the hinge loss of `(n, d, rows, columns)`, with the weight `(n,)` of every image in both terms."""
    attract = (1 - (z * p).sum(1)).relu().mean((1, 2))
    repel = (1 + (z[other] * p).sum(1)).relu().mean((1, 2))
    return (positive * attract + negative * repel).sum()
