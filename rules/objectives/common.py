"""What several objectives share: checks of embeddings, and a shuffle that leaves nothing in its place."""

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


def off_diagonal_squares(matrix: Tensor) -> Tensor:
    """Return the sum of the squares of a square matrix without its diagonal."""
    squares = matrix.square()
    return squares.sum() - squares.diagonal().sum()


def covariance_squares(centred: Tensor) -> Tensor:
    """Return the sum of squared covariances between different dimensions, of deviations `(n, d)` from a mean.

    sum_{i != k} C_ik^2,    C = centred^T centred / (n - 1)
    """
    return off_diagonal_squares(centred.T @ centred / (len(centred) - 1))


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
