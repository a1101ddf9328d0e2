"""Held bytes, counted exactly on graphs whose saved tensors are known."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from localsim.memory import HeldBytes

NUM = 1000
BYTES = 8 * NUM


def leaf() -> torch.Tensor:
    return torch.linspace(0.1, 1, NUM, dtype=torch.float64).requires_grad_()


def test_an_output_is_held_until_its_graph_is_dropped():
    with HeldBytes() as held:
        y = leaf().exp()  # exp keeps its output
        assert (held.now, held.peak) == (BYTES, BYTES)
        del y
    assert (held.now, held.peak) == (0, BYTES)


def test_every_operation_adds_what_it_saves():
    x = leaf()
    with HeldBytes() as held:
        a = x.sin()  # keeps x
        assert held.now == BYTES
        b = a.exp()  # keeps b, and not a
        assert held.now == 2 * BYTES
        c = b.square()  # keeps b, which is held already
        assert held.now == 2 * BYTES
        d = c * a  # keeps both
        assert held.now == 4 * BYTES
        e = d + 1  # keeps nothing
        assert held.now == 4 * BYTES
    e.sum().backward()
    assert held.now == 0, "a backward pass frees its graph"
    assert held.peak == 4 * BYTES


def test_one_storage_counts_once_and_as_a_whole():
    x = leaf()
    with HeldBytes() as held:
        y = x * x
        z = x.reshape(10, -1)[:2].sin()  # keeps a view of x
        assert held.now == BYTES
        del y
        assert held.now == BYTES, "the view still holds the storage"
        del z
    assert held.now == 0


def test_excluded_tensors_are_not_counted():
    x, weight = leaf(), leaf()
    with HeldBytes([weight]) as held:
        y = x * weight
        assert held.now == BYTES
    with HeldBytes([x, weight]) as nothing:
        z = x * weight
        assert nothing.peak == 0
    del y, z
    assert held.now == 0


def test_excluded_weights_are_known_through_their_views():
    x, weight = torch.ones(5, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    with HeldBytes([weight]) as held:
        y = F.linear(x, weight)  # keeps x, and the weight transposed
        assert held.now == 4 * 15
        del y
    assert held.now == 0


def test_without_a_graph_nothing_is_held():
    with HeldBytes() as held, torch.no_grad():
        leaf().exp()
    with held:
        torch.ones(4).exp()
    assert held.peak == 0


def test_gradients_are_those_without_counting():
    x = leaf()
    (plain,) = torch.autograd.grad((x.exp() * x).sum(), x)
    with HeldBytes():
        (counted,) = torch.autograd.grad((x.exp() * x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(counted.sum(), x)
    assert torch.equal(plain, counted)
    torch.testing.assert_close(second, (x.exp() * (x + 2)).detach())  # a second derivative too


def test_freed_addresses_that_are_used_again_count_again():
    with HeldBytes() as held:
        for _ in range(5):
            y = leaf().exp()
            assert held.now == BYTES
            del y
            assert held.now == 0
    assert held.peak == BYTES
