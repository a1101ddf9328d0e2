"""What several objectives share: checks of embeddings, products of dimensions, a shuffle that leaves none in place."""

from __future__ import annotations

import torch
from torch import Tensor

from localsim.errors import UserError
from localsim.network import Embedding


def check_two_views(objective: str, embeddings: tuple[Embedding, ...]) -> None:
    """Raise UserError unless there are exactly two views."""
    if len(embeddings) != 2:
        raise UserError(f"{objective} compares exactly 2 views, not {len(embeddings)}")


def vectors(objective: str, embeddings: tuple[Embedding, ...]) -> list[Tensor]:
    """Return the embeddings of all views, each a Tensor `(n, d)`; UserError if the head gives something else."""
    read = [z for z in embeddings if isinstance(z, Tensor)]
    if len(read) < len(embeddings):
        raise UserError(f"{objective} reads one vector per image, but its head gives several tensors; use another head")
    return read


def parts(objective: str, embeddings: tuple[Embedding, ...], num: int, what: str) -> list[tuple[Tensor, ...]]:
    """Return the embeddings of all views, each a tuple of `num` tensors; UserError if the head gives something else."""
    read = [z for z in embeddings if not isinstance(z, Tensor) and len(z) == num]
    if len(read) < len(embeddings):
        raise UserError(f"{objective} reads {what}, but its head does not give them; use another head")
    return read


def needed(objective: str, labels: Tensor | None) -> Tensor:
    """Return the labels; UserError if there are none."""
    if labels is None:
        raise UserError(f"{objective} needs labels, but the images have none")
    return labels


def column_products(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the diagonal `(d,)` of P = a^T b, for a and b `(n, d)`, and the sum of the squares of its other entries.

    sum_{i != k} P_ik^2 = sum_{r, s} (a a^T)_rs (b b^T)_rs - sum_i P_ii^2

    is exact: both sums are tr(a a^T b b^T). It needs two n x n matrices where the left side needs a d x d one, and is
    taken where its matrix products, gradients included, cost no more: 6 n^2 d multiplications for 3 n d^2, 2 n <= d.
    """
    num, width = a.shape
    if 2 * num <= width:
        diagonal = (a * b).sum(0)
        gram = a @ a.T
        return diagonal, (gram * (gram if a is b else b @ b.T)).sum() - diagonal.square().sum()
    products = a.T @ b
    squares = products.square()
    return products.diagonal(), squares.sum() - squares.diagonal().sum()


def covariance_squares(centred: Tensor) -> Tensor:
    """Return the sum of squared covariances between different dimensions, of deviations `(n, d)` from a mean.

    sum_{i != k} C_ik^2,    C = centred^T centred / (n - 1)
    """
    _, off_diagonal = column_products(centred, centred)
    return off_diagonal / (len(centred) - 1) ** 2


def derangement(num: int, device: torch.device) -> Tensor:
    """Return a random permutation `(num,)` of the batch that is one single cycle: no image keeps its own place.

    Uniform over cycles, so every other image is equally likely. Drawn from torch's default generator.

    Raises:
        UserError: a single image has no other.
    """
    if num < 2:
        raise UserError("a batch of 1 has no other image to compare with; use a batch of 2 or more")
    order = torch.randperm(num, device=device)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other
