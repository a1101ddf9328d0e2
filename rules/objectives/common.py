"""What several objectives share: checks of options and embeddings, and a shuffle that leaves nothing in its place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from localsim.errors import UserError
from localsim.network import Embedding


def check_number(objective: str, option: str, value: object, *, above_zero: bool = False) -> None:
    """Raise UserError unless an option is a finite number >= 0 (or, if `above_zero`, > 0)."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
    if not is_number or (above_zero and value == 0):
        raise UserError(f"{objective}: {option} is {value!r}; allowed: numbers {'>' if above_zero else '>='} 0")


def check_count(objective: str, option: str, value: object, *, at_least: int) -> None:
    """Raise UserError unless an option is an integer of `at_least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise UserError(f"{objective}: {option} is {value!r}; allowed: integers >= {at_least}")


def check_choice(objective: str, option: str, value: object, allowed: Sequence[object]) -> None:
    """Raise UserError unless an option is one of the allowed values; 1 does not pass for True."""
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise UserError(f"{objective}: {option} is {value!r}; allowed: {', '.join(map(str, allowed))}")


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
