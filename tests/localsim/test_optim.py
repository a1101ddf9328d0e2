"""LARS against its formula written in numpy, optimiser groups, and the schedule against closed forms."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from localsim import optim
from localsim.errors import UserError
from localsim.optim import LARS, OPTIMIZERS, learning_rate, make_optimizer, scaled_lr

SHAPES = [(4, 3), (4,), (2, 3, 3, 3), (1, 5), (2, 2)]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    made = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]
    made[-1].data.zero_()  # |w| = 0: the unscaled branch
    return made


def gradients(step: int) -> list[np.ndarray]:
    rng = np.random.default_rng(step)
    made = [rng.normal(size=shape) for shape in SHAPES]
    if step == 1:
        made[3][:] = 0  # without weight decay |g| = 0
    return made


def lars_in_numpy(
    weights: list[np.ndarray], steps: int, lr: float, momentum: float, decay: float, eta: float
) -> list[np.ndarray]:
    velocity = [np.zeros_like(w) for w in weights]
    for step in range(steps):
        for i, g in enumerate(gradients(step)):
            w = weights[i]
            if w.ndim != 1:
                g = g + decay * w
                norms = math.sqrt((w**2).sum()), math.sqrt((g**2).sum())
                g = g * (eta * norms[0] / norms[1] if min(norms) > 0 else 1.0)
            velocity[i] = momentum * velocity[i] + g
            weights[i] = w - lr * velocity[i]
    return weights


def advance(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(params, gradients(step), strict=True):
            parameter.grad = torch.from_numpy(gradient)
        optimizer.step()


@pytest.fixture(params=["together", "one by one", "large"])
def way(request, monkeypatch):
    """The ways in which LARS steps weights: small ones in lists, at most a few entries at a time; large ones."""
    if request.param == "one by one":
        monkeypatch.setattr(optim, "_norms", lambda *_: None)
    if request.param != "together":
        monkeypatch.setattr(optim, "LARGE", 1)
    return request.param


@pytest.mark.parametrize(("decay", "momentum", "eta"), [(0.0, 0.9, 0.001), (0.1, 0.5, 0.02), (0.3, 0.0, 1.0)])
def test_lars_equals_its_formula(decay, momentum, eta, way):
    params = parameters()
    expected = lars_in_numpy([p.detach().numpy().copy() for p in params], 5, 0.3, momentum, decay, eta)
    advance(LARS(params, lr=0.3, momentum=momentum, weight_decay=decay, eta=eta), params, range(5))
    for parameter, value in zip(params, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-12, atol=1e-15)


def test_lars_takes_large_weights_on_the_cpu_without_a_copy(monkeypatch):
    """The largest tensor that a step makes has an entry per row; small weights are stepped with copies of gradients."""

    class Made(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            before = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            for made in tree_leaves(out):
                if isinstance(made, torch.Tensor) and all(made.data_ptr() != x.data_ptr() for x in before):
                    self.largest = max(self.largest, made.numel())
            return out

    largest = []
    for large in (1, 2**22):
        monkeypatch.setattr(optim, "LARGE", large)
        weight = nn.Parameter(torch.randn(30, 40, generator=torch.Generator().manual_seed(0)))
        weight.grad = torch.ones_like(weight)
        optimizer = LARS([weight], lr=0.1, weight_decay=0.1)
        optimizer.step()  # makes the momentum
        with Made() as made:
            optimizer.step()
        largest.append(made.largest)
    assert largest == [30, 1200]


@pytest.mark.parametrize("decay", [0.5, 2.0**20])
def test_lars_sees_what_is_left_where_decay_cancels_the_gradient(decay, monkeypatch):
    monkeypatch.setattr(optim, "LARGE", 1)
    random = np.random.default_rng(0)
    w, rest = random.normal(size=(2, 6, 5))
    g = -decay * w + 2.0**-30 * decay * rest
    weight = nn.Parameter(torch.from_numpy(w.copy()))
    weight.grad = torch.from_numpy(g.copy())
    LARS([weight], lr=1.0, weight_decay=decay, eta=0.01).step()
    change = g + decay * w
    expected = w - change * 0.01 * np.linalg.norm(w) / np.linalg.norm(change)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("last", ["weight", "grad", "mu"])
def test_lars_steps_tensors_of_different_memory_layouts(last, way):
    shape, channels_last = (4, 3, 5, 5), torch.channels_last
    generator = torch.Generator().manual_seed(1)
    weight, grad, momentum = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    results = []
    for other in (False, True):
        parts = {"weight": weight.clone(), "grad": grad.clone(), "mu": momentum.clone()}
        if other:
            parts[last] = parts[last].contiguous(memory_format=channels_last)
        parameter = nn.Parameter(parts["weight"])
        optimizer = LARS([parameter], lr=0.1, weight_decay=0.01)
        optimizer.state[parameter]["mu"] = parts["mu"]
        parameter.grad = parts["grad"]
        optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("decay", [0.0, 1e-6, 1e-2])
def test_lars_in_float32_is_as_near_to_the_formula_as_float32_allows(decay):
    """Two weights above `LARGE` entries, and one below."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(2100, 2000), (64, 65537), (50, 60)]
    assert [math.prod(shape) >= optim.LARGE for shape in shapes] == [True, True, False]
    weights = [0.02 * torch.randn(shape, generator=generator) for shape in shapes]
    grads = [1e-3 * torch.randn(shape, generator=generator) for shape in shapes]
    params = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = LARS(params, lr=1.0, weight_decay=decay, eta=1.0)
    for parameter, grad in zip(params, grads, strict=True):
        parameter.grad = grad.clone()
    optimizer.step()
    for parameter, w, g in zip(params, weights, grads, strict=True):
        change = g.double() + decay * w.double()
        step = change * w.double().norm() / change.norm()
        torch.testing.assert_close(parameter.detach().double(), w.double() - step, rtol=0, atol=1e-6 * step.abs().max())
        torch.testing.assert_close(optimizer.state[parameter]["mu"].double(), step, rtol=2e-6, atol=1e-9)


def test_the_state_of_lars_is_one_momentum_per_parameter(way):
    params = parameters()
    optimizer = LARS(params, lr=0.1)
    advance(optimizer, params, range(1))
    state = optimizer.state_dict()["state"]
    assert {index: list(entry) for index, entry in state.items()} == {index: ["mu"] for index in range(len(SHAPES))}
    assert all(entry["mu"].shape == SHAPES[index] for index, entry in state.items())


def test_lars_leaves_gradients_as_they_were(way):
    params = parameters()
    optimizer = LARS(params, lr=0.1, weight_decay=0.1)
    advance(optimizer, params, range(1))
    for parameter, gradient in zip(params, gradients(0), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.from_numpy(gradient))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_survives_a_round_trip(name):
    params = parameters()
    optimizer = make_optimizer(name, params, lr=0.1, weight_decay=0.01)
    advance(optimizer, params, range(3))
    others = copy.deepcopy(params)
    resumed = make_optimizer(name, others, lr=9.0, weight_decay=9.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(optimizer, params, range(3, 6))
    advance(resumed, others, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stepping_one_parameter_at_a_time_equals_stepping_all(name, way):
    together, apart = parameters(), parameters()
    advance(make_optimizer(name, together, lr=0.1, weight_decay=0.01), together, range(3))
    optimizer = make_optimizer(name, apart, lr=0.1, weight_decay=0.01)
    for step in range(3):
        for parameter, gradient in zip(apart, gradients(step), strict=True):
            optimizer.zero_grad(set_to_none=True)
            parameter.grad = torch.from_numpy(gradient)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_lars_returns_the_loss_of_its_closure():
    weight = nn.Parameter(torch.ones(2, 2))

    def closure() -> torch.Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert LARS([weight], lr=0.1).step(closure).item() == 4.0
    assert weight.max().item() < 1.0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_moves_matrices_only(name):
    params = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor(1.0))]
    optimizer = make_optimizer(name, params, lr=0.1, weight_decay=0.5)
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert params[0].max().item() < 1.0
    assert params[1].eq(1).all()
    assert params[2].eq(1).all()


def test_adamw_takes_momentum_as_beta1():
    optimizer = make_optimizer("adamw", parameters(), lr=0.1, weight_decay=0.0, momentum=0.7)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.7, 0.999)] * 2


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"momentum": -0.1}, {"weight_decay": -1e-6}, {"eta": math.nan}])
def test_lars_refuses_negative_numbers(options):
    with pytest.raises(UserError, match=next(iter(options))):
        LARS(parameters(), **{"lr": 0.1} | options)


def test_make_optimizer_refuses_what_it_cannot_make():
    with pytest.raises(UserError, match=r"unknown optimizer 'adam'; allowed: lars, sgd, adamw"):
        make_optimizer("adam", parameters(), lr=0.1, weight_decay=0.0)
    with pytest.raises(UserError, match="lr -1"):
        make_optimizer("sgd", parameters(), lr=-1, weight_decay=0.0)
    with pytest.raises(UserError, match="momentum 1"):
        make_optimizer("adamw", parameters(), lr=0.1, weight_decay=0.0, momentum=1.0)
    with pytest.raises(UserError, match="no parameters"):
        make_optimizer("lars", [], lr=0.1, weight_decay=0.0)


def test_learning_rate_at_points_known_in_closed_form():
    def at(step: int) -> float:
        return learning_rate(step, base=2.0, total_steps=110, warmup_steps=10, final_factor=0.1)

    assert [at(0), at(5), at(10)] == [0.0, 1.0, 2.0]
    assert at(60) == pytest.approx(2.0 * 1.1 / 2, rel=1e-14)
    assert at(110) == pytest.approx(0.2, rel=1e-14)
    third = 10 + 100 // 4
    assert at(third) == pytest.approx(0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2, rel=1e-14)
    assert learning_rate(0, base=2.0, total_steps=1, warmup_steps=0, final_factor=0.0) == 2.0


@settings(deadline=None)
@given(
    total=st.integers(2, 300),
    share=st.floats(0, 0.99),
    base=st.floats(1e-6, 1e3),
    final=st.floats(0, 1),
)
def test_learning_rate_rises_then_falls_within_its_bounds(total, share, base, final):
    warmup = int(share * total)
    rates = [
        learning_rate(step, base=base, total_steps=total, warmup_steps=warmup, final_factor=final)
        for step in range(total + 1)
    ]
    slack = 1e-12 * base
    assert np.all(np.diff(rates[: warmup + 1]) > 0)
    assert np.all(np.diff(rates[warmup:]) <= slack)
    assert rates[warmup] == pytest.approx(base)
    assert max(rates) <= base + slack
    assert min(rates[warmup:]) >= base * final - slack
    assert rates[-1] == pytest.approx(base * final, abs=slack)


@pytest.mark.parametrize(("step", "warmup"), [(0, 10), (0, -1), (11, 2), (-1, 2)])
def test_learning_rate_refuses_impossible_schedules(step, warmup):
    with pytest.raises(UserError, match=r"warm-up|outside"):
        learning_rate(step, base=1.0, total_steps=10, warmup_steps=warmup, final_factor=0.0)


def test_scaled_lr():
    assert scaled_lr(0.2, 2048) == 1.6
