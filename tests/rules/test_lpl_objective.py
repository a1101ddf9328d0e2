"""LPL: loss against numpy loops, gradient against its closed form, and the batch-free statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from localsim.errors import UserError
from localsim.rules.heads.stale import StaleStatistics
from localsim.rules.objectives import make_objective
from localsim.rules.objectives.lpl import LPL
from localsim.rules.site import Site

NUM, DIM = 7, 4
OPTIONS = [{}, {"pull": 0.3, "push": 2.0, "decorrelation": 0.5, "eps": 0.1}, {"push": 0}, {"decorrelation": 0}]


def views(seed: int = 0, num: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(NUM, DIM))
    return [shared + 0.5 * rng.normal(size=(NUM, DIM)) + v for v in range(num)]


def site() -> Site:
    return Site(
        stage=0,
        num_stages=1,
        unit=0,
        num_units=1,
        shape=(DIM,),
        top_shape=(DIM, 1, 1),
        above=(),
        image_shape=(3, 8, 8),
        widths=(),
        num_classes=None,
        end=torch.nn.Identity,
    )


def numpy_lpl(z1, z2, pull=1.0, push=1.0, decorrelation=10.0, eps=1e-4, partner=None):
    n, m = z1.shape
    partner = list(range(n)) if partner is None else partner
    total = pull * sum((z1[b, i] - z2[partner[b], i]) ** 2 for b in range(n) for i in range(m)) / (n * m)
    for z in (z1, z2):
        for i in range(m):
            total -= push * math.log(np.var(z[:, i], ddof=1) + eps) / m / 2
            for k in range(m):
                if i != k:
                    total += decorrelation * np.cov(z[:, i], z[:, k])[0, 1] ** 2 / (m * m - m) / 2
    return total


def closed_form(z1, z2, stats1, stats2, pull=1.0, push=1.0, decorrelation=10.0, eps=1e-4):
    """Gradients of both views, entry by entry, from mean and variance (n - 1) of each view."""
    n, m = z1.shape
    grads = []
    for z, other, (mean, var) in ((z1, z2, stats1), (z2, z1, stats2)):
        grad = np.zeros_like(z)

        def covariance(i, k, z=z, mean=mean):
            return sum((z[b, i] - mean[i]) * (z[b, k] - mean[k]) for b in range(n)) / (n - 1)

        for b in range(n):
            for i in range(m):
                grad[b, i] = pull * 2 * (z[b, i] - other[b, i]) / (n * m)
                grad[b, i] -= push / 2 * 2 * (z[b, i] - mean[i]) / ((n - 1) * (var[i] + eps) * m)
                for k in range(m):
                    if k != i:
                        grad[b, i] += (
                            decorrelation / 2 * 4 * covariance(i, k) * (z[b, k] - mean[k]) / ((n - 1) * (m * m - m))
                        )
        grads.append(grad)
    return grads


def statistics(z):
    return z.mean(0), z.var(0, ddof=1)


@pytest.mark.parametrize("options", OPTIONS)
def test_loss_and_gradient(options):
    z1, z2 = views()
    tensors = [torch.tensor(z, requires_grad=True) for z in (z1, z2)]
    loss = make_objective("lpl", options)(tuple(tensors), None)
    assert loss.shape == ()
    np.testing.assert_allclose(loss.item(), numpy_lpl(z1, z2, **options), rtol=1e-12)
    expected = closed_form(z1, z2, statistics(z1), statistics(z2), **options)
    for ours, theirs in zip(torch.autograd.grad(loss, tensors), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("options", OPTIONS)
def test_stale_gradient_is_a_sum_of_per_sample_terms_at_the_stale_values(options):
    z1, z2 = views()
    mean, var = np.array([0.3, -0.2, 0.0, 1.0]), np.array([0.5, 1.0, 2.0, 0.1])
    tensors = [torch.tensor(z, requires_grad=True) for z in (z1, z2)]
    stale = torch.tensor(mean), torch.tensor(var)
    loss = make_objective("lpl", options)(tuple((z, *stale) for z in tensors), None)
    expected = closed_form(z1, z2, (mean, var), (mean, var), **options)
    for ours, theirs in zip(torch.autograd.grad(loss, tensors), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("options", OPTIONS)
def test_stale_statistics_equal_to_the_batch_change_nothing(options):
    results = []
    for stale in (False, True):
        tensors = [torch.tensor(z, requires_grad=True) for z in views()]
        embeddings = [(z, z.detach().mean(0), z.detach().var(0)) if stale else z for z in tensors]
        loss = make_objective("lpl", options)(tuple(embeddings), None)
        results.append((loss, *torch.autograd.grad(loss, tensors)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_shuffled_positives_pull_another_image():
    z1, z2 = views()
    torch.manual_seed(5)
    loss = LPL(positives="shuffled")((torch.tensor(z1), torch.tensor(z2)), None).item()
    torch.manual_seed(5)
    ring = torch.randperm(NUM).tolist()
    partner = dict(zip(ring, [ring[-1], *ring[:-1]], strict=True))
    assert all(image != other for image, other in partner.items())
    np.testing.assert_allclose(loss, numpy_lpl(z1, z2, partner=partner), rtol=1e-12)


def test_chance_level_is_the_least_loss_of_unrelated_views():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4000, 3, generator=generator, dtype=torch.float64)
    z = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)
    objective = LPL()
    chance = objective.chance_level(3, 4000)
    assert chance == pytest.approx(1 + math.log(2), abs=1e-3)
    assert objective(tuple(z * 0.5**0.5), None).item() == pytest.approx(chance, rel=0.02)
    for size in (0.3, 0.5, 1.0, 2.0):
        assert objective(tuple(z * size), None).item() > chance - 0.01
    assert LPL(pull=0).chance_level(3, 100) is None
    assert LPL(push=0).chance_level(3, 100) == 0


def test_one_dimension_has_nothing_to_decorrelate():
    z1, z2 = (torch.tensor(z[:, :1]) for z in views())
    assert LPL(pull=0, push=0)((z1, z2), None).item() == 0


def test_a_head_without_variance_and_mean_for_every_view_is_refused():
    z1, z2 = map(torch.tensor, views())
    for wrong in (((z1, z1), (z2, z2)), ((z1, z1, z1), z2)):
        with pytest.raises(UserError, match="lpl reads vectors, or vectors with stale statistics"):
            LPL()(wrong, None)
    with pytest.raises(UserError, match="lpl reads one vector per image"):
        LPL()((z1, (z2, z2, z2)), None)


def test_stale_statistics_are_of_the_step_before_and_common_to_both_views():
    head = StaleStatistics(site()).double()
    steps = [views(seed) for seed in range(3)]
    for step, pair in enumerate(steps):
        seen = [head(torch.tensor(z)) for z in pair]
        for z, (out, mean, var) in zip(pair, seen, strict=True):
            before = [z] if step == 0 else steps[step - 1]
            np.testing.assert_array_equal(out.numpy(), z)
            np.testing.assert_allclose(mean.numpy(), np.mean([b.mean(0) for b in before], axis=0), rtol=1e-13)
            np.testing.assert_allclose(var.numpy(), np.mean([b.var(0, ddof=1) for b in before], axis=0), rtol=1e-13)


def test_stale_statistics_rest_in_evaluation_and_are_saved():
    head, copy = StaleStatistics(site()).double(), StaleStatistics(site()).double()
    for z in (*views(0), *views(1)[:1]):  # in the middle of a step
        head(torch.tensor(z))
    copy.load_state_dict(head.state_dict())
    before = {name: value.clone() for name, value in head.state_dict().items()}
    seen = head.eval()(torch.tensor(views(2)[0]))
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert torch.equal(seen[1], before["mean"])
    head.train()
    for z in (*views(1)[1:], *views(3)):
        for a, b in zip(head(torch.tensor(z)), copy(torch.tensor(z)), strict=True):
            assert torch.equal(a, b)


def test_the_loss_of_a_step_sees_statistics_that_later_passes_do_not_change():
    head = StaleStatistics(site()).double()
    gradients = []
    for z1, z2 in (views(0), views(1)):
        tensors = [torch.tensor(z, requires_grad=True) for z in (z1, z2)]
        loss = LPL()(tuple(head(z) for z in tensors), None)
        gradients.append(torch.autograd.grad(loss, tensors))
    first = [statistics(z) for z in views(0)]
    common = np.mean([s[0] for s in first], axis=0), np.mean([s[1] for s in first], axis=0)
    for ours, expected in zip(
        gradients, (closed_form(*views(0), *first), closed_form(*views(1), common, common)), strict=True
    ):
        for a, b in zip(ours, expected, strict=True):
            np.testing.assert_allclose(a.numpy(), b, rtol=1e-11, atol=1e-14)


def test_stale_statistics_of_half_precision_are_kept_in_full():
    out, mean, var = StaleStatistics(site())(torch.tensor(views()[0]).bfloat16())
    assert out.dtype == mean.dtype == var.dtype == torch.float32
