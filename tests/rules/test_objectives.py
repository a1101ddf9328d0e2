"""Barlow Twins against numpy, finite differences and a naive loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import LargestMade

from localsim.errors import UserError
from localsim.rules.objectives import OBJECTIVES, make_objective
from localsim.rules.objectives.barlow_twins import BarlowTwins
from localsim.rules.objectives.common import column_products

NUM, DIM = 7, 5
OPTIONS = [
    {},
    {"lambda_": 0.3, "scale": 1.0},
    {"lambda_": 0.0, "scale": 2.0},
    {"lambda_": 1.0, "scale": 0.5, "eps": 0.1},
]


def embeddings(seed: int = 0, num: int = NUM, dim: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(num, dim))
    return 3 * shared + rng.normal(size=(num, dim)) + 2, 0.5 * shared + rng.normal(size=(num, dim)) - 1


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


@pytest.mark.parametrize(("num", "dim"), [(NUM, DIM), (4, 8), (5, 9), (3, 20)])
def test_gradients_equal_those_of_batch_norm_and_a_loop(num, dim):
    """The released formulation: affine-free batch norm, a matrix product over the batch, a loop over its entries."""
    ours, theirs = (tuple(torch.tensor(z, requires_grad=True) for z in embeddings(0, num, dim)) for _ in range(2))
    norm = torch.nn.BatchNorm1d(dim, affine=False).double()
    correlation = norm(theirs[0]).T @ norm(theirs[1]) / num
    reference = torch.zeros((), dtype=torch.float64)
    for i in range(dim):
        for j in range(dim):
            reference = reference + ((correlation[i, j] - 1) ** 2 if i == j else 0.0051 * correlation[i, j] ** 2)
    reference = 0.024 * reference
    loss = BarlowTwins()(ours)
    torch.testing.assert_close(loss, reference, rtol=1e-13, atol=0)
    for a, b in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(reference, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-16)


@settings(deadline=None)
@given(num=st.integers(1, 12), dim=st.integers(1, 30), seed=st.integers(0, 9), same=st.booleans())
def test_column_products_equal_a_loop_and_have_its_gradients(num, dim, seed, same):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, num, dim))
    b = a if same else b
    products = np.einsum("ri,rk->ik", a, b)
    squares = sum(products[i, k] ** 2 for i in range(dim) for k in range(dim) if i != k)
    tensors = [torch.tensor(x, requires_grad=True) for x in ([a] if same else [a, b])]
    diagonal, off_diagonal = column_products(tensors[0], tensors[-1])
    size = (products**2).sum()
    np.testing.assert_allclose(diagonal.detach().numpy(), np.diagonal(products), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(off_diagonal.item(), squares, rtol=1e-12, atol=1e-13 * size)
    factor = 2 * (products - np.diag(np.diagonal(products)))
    to_a, to_b = b @ factor.T, a @ factor
    found = torch.autograd.grad(off_diagonal, tensors)
    for ours, expected in zip(found, [to_a + to_b] if same else [to_a, to_b], strict=True):
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10, atol=1e-12 * size)


@pytest.mark.parametrize("shape", [(7, 5), (3, 8)])
def test_first_and_second_derivatives_are_those_of_finite_differences(shape):
    views = tuple(torch.tensor(z, requires_grad=True) for z in embeddings(1, *shape))
    objective = BarlowTwins(lambda_=0.3, scale=1.0, eps=0.1)
    assert torch.autograd.gradcheck(lambda *z: objective(z), views)
    assert torch.autograd.gradgradcheck(lambda *z: objective(z), views)


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "lpl"])
def test_a_wide_embedding_never_makes_a_square_matrix(name):
    """Nor does its gradient; a narrow one does, which shows that the test would see it."""

    def largest(num: int, dim: int) -> int:
        views = tuple(torch.tensor(z, requires_grad=True) for z in embeddings(0, num, dim))
        with LargestMade() as seen:
            torch.autograd.grad(make_objective(name)(views), views)
        return seen.numel

    assert largest(8, 300) == 8 * 300
    assert largest(40, 79) == 79**2


@pytest.mark.parametrize(("num", "dim"), [(16, 512), (16, 24), (64, 128)])
def test_float32_is_near_float64(num, dim):
    views = embeddings(3, num, dim)
    losses, grads = [], []
    for dtype in (torch.float64, torch.float32):
        tensors = tuple(torch.tensor(z, dtype=dtype, requires_grad=True) for z in views)
        losses.append(BarlowTwins()(tensors))
        grads.append(torch.stack(torch.autograd.grad(losses[-1], tensors)).double())
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert (grads[1] - grads[0]).norm() < 1e-5 * grads[0].norm()


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
