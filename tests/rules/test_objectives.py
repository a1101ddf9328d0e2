"""Barlow Twins against numpy, finite differences and a naive loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from localsim.errors import UserError
from localsim.rules.objectives import OBJECTIVES, make_objective
from localsim.rules.objectives.barlow_twins import BarlowTwins

NUM, DIM = 7, 5
OPTIONS = [
    {},
    {"lambda_": 0.3, "scale": 1.0},
    {"lambda_": 0.0, "scale": 2.0},
    {"lambda_": 1.0, "scale": 0.5, "eps": 0.1},
]


def embeddings(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(NUM, DIM))
    return 3 * shared + rng.normal(size=(NUM, DIM)) + 2, 0.5 * shared + rng.normal(size=(NUM, DIM)) - 1


def numpy_loss(z1, z2, *, lambda_=0.0051, scale=0.024, eps=1e-5) -> float:
    """Equation 1 and 2 of Zbontar et al. 2021, one matrix entry after the other."""
    total = 0.0
    for i in range(z1.shape[1]):
        for j in range(z2.shape[1]):
            a, b = z1[:, i], z2[:, j]
            covariance = np.mean((a - a.mean()) * (b - b.mean()))
            c = covariance / np.sqrt((np.var(a) + eps) * (np.var(b) + eps))
            total += (c - 1) ** 2 if i == j else lambda_ * c**2
    return scale * total


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_values_and_gradients(options, seed):
    views = embeddings(seed)
    tensors = tuple(torch.tensor(z, requires_grad=True) for z in views)
    loss = make_objective("barlow_twins", options)(tensors)
    assert loss.shape == ()
    np.testing.assert_allclose(loss.item(), numpy_loss(*views, **options), rtol=1e-12)
    grads = torch.autograd.grad(loss, tensors)
    h = 1e-5
    for which, grad in enumerate(grads):
        for index in np.ndindex(NUM, DIM):
            above, below = ([z.copy() for z in views] for _ in range(2))
            above[which][index] += h
            below[which][index] -= h
            slope = (numpy_loss(*above, **options) - numpy_loss(*below, **options)) / (2 * h)
            assert abs(grad[index].item() - slope) < 1e-8


def test_gradients_equal_those_of_batch_norm_and_a_loop():
    """The released formulation: affine-free batch norm, a matrix product over the batch, a loop over its entries."""
    ours, theirs = (tuple(torch.tensor(z, requires_grad=True) for z in embeddings()) for _ in range(2))
    norm = torch.nn.BatchNorm1d(DIM, affine=False).double()
    correlation = norm(theirs[0]).T @ norm(theirs[1]) / NUM
    reference = torch.zeros((), dtype=torch.float64)
    for i in range(DIM):
        for j in range(DIM):
            reference = reference + ((correlation[i, j] - 1) ** 2 if i == j else 0.0051 * correlation[i, j] ** 2)
    reference = 0.024 * reference
    loss = BarlowTwins()(ours)
    torch.testing.assert_close(loss, reference, rtol=1e-13, atol=0)
    for a, b in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(reference, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-16)


def test_equal_decorrelated_views_cost_nothing():
    z = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    assert BarlowTwins(eps=0.0)((z, 5 * z + 3)).item() == pytest.approx(0, abs=1e-28)
    assert BarlowTwins(eps=0.0, scale=1.0)((z, -z)).item() == pytest.approx(2 * 2**2)


def test_labels_are_not_used():
    views = tuple(map(torch.tensor, embeddings()))
    assert torch.equal(BarlowTwins()(views), BarlowTwins()(views, torch.arange(NUM)))


@pytest.mark.parametrize(("n", "d"), [(4, 3), (16, 6)])
def test_chance_level_is_the_mean_loss_of_unrelated_embeddings(n, d):
    objective = BarlowTwins(lambda_=0.5, scale=1.0, eps=0.0)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 2, n, d, generator=generator, dtype=torch.float64)
    losses = torch.stack([objective((z1, z2)) for z1, z2 in draws])
    error = losses.std().item() / len(losses) ** 0.5
    assert abs(losses.mean().item() - objective.chance_level(d, n)) < 4 * error
    assert error < 0.01 * objective.chance_level(d, n)


@pytest.mark.parametrize("num", [0, 1, 3])
def test_exactly_two_views(num):
    with pytest.raises(UserError, match=f"barlow_twins compares exactly 2 views, not {num}"):
        BarlowTwins()(tuple(torch.zeros(NUM, DIM) for _ in range(num)))


@pytest.mark.parametrize("option", ["lambda_", "scale", "eps"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "much", True])
def test_options_outside_their_range_are_named(option, value):
    with pytest.raises(UserError, match=f"barlow_twins: {option} is {value!r}; allowed: numbers >= 0"):
        make_objective("barlow_twins", {option: value})


def test_unknown_objectives_and_options_are_named():
    with pytest.raises(UserError, match=f"unknown objective 'barlow'; allowed: {', '.join(OBJECTIVES)}"):
        make_objective("barlow")
    with pytest.raises(UserError, match="barlow_twins has no option 'lambd'; allowed: lambda_, scale, eps"):
        make_objective("barlow_twins", {"lambd": 0.1})
