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


@pytest.mark.parametrize(("decay", "momentum", "eta"), [(0.0, 0.9, 0.001), (0.1, 0.5, 0.02), (0.3, 0.0, 1.0)])
def test_lars_equals_its_formula(decay, momentum, eta):
    params = parameters()
    expected = lars_in_numpy([p.detach().numpy().copy() for p in params], 5, 0.3, momentum, decay, eta)
    advance(LARS(params, lr=0.3, momentum=momentum, weight_decay=decay, eta=eta), params, range(5))
    for parameter, value in zip(params, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-12, atol=1e-15)


def test_lars_leaves_gradients_as_they_were():
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
def test_stepping_one_parameter_at_a_time_equals_stepping_all(name):
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
