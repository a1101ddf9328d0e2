"""Probes against scipy, numpy brute force and what they must score on data made for it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from localsim.analysis.probes import (
    bootstrap_interval,
    knn_probe,
    linear_probe,
    logistic_regression,
    paired_bootstrap,
    sgd_probe,
)
from localsim.errors import UserError
from localsim.rng import keyed


def blobs(n: int, d: int = 12, classes: int = 4, apart: float = 3.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return Gaussian clusters `(n, d)` with labels `(n,)`; the cluster centres do not depend on the seed."""
    centres = np.random.default_rng(99).normal(size=(classes, d)) * apart
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return centres[y] + rng.normal(size=(n, d)), y


def problem(apart: float = 3.0, **options: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return *blobs(200, apart=apart, seed=1, **options), *blobs(100, apart=apart, seed=2, **options)


# -- linear ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_separable_data_is_named_correctly(probe):
    score = probe(*problem(), num_classes=4)
    assert score.accuracy == 1.0
    assert score.correct.dtype == bool
    assert score.correct.shape == (100,)
    assert (score.n_test, score.chance) == (100, 0.25)


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_labels_unrelated_to_features_score_chance(probe):
    x, _, x_test, _ = problem()
    rng = np.random.default_rng(5)
    score = probe(x, rng.integers(0, 4, 200), x_test, rng.integers(0, 4, 100), num_classes=4)
    assert score.low < 0.25 < score.high
    assert score.low < score.accuracy < score.high


def test_logistic_regression_equals_a_scipy_reference():
    x, y = blobs(80, d=5, classes=3, apart=0.7)
    penalty = 0.02

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[:15].reshape(3, 5), flat[15:]
        logits = x @ weight.T + bias
        share = scipy.special.softmax(logits, axis=1)
        loss = -scipy.special.log_softmax(logits, axis=1)[np.arange(80), y].mean() + penalty / 2 * (weight**2).sum()
        residual = (share - np.eye(3)[y]) / 80
        return loss, np.concatenate([(residual.T @ x + penalty * weight).ravel(), residual.sum(axis=0)])

    best = scipy.optimize.minimize(objective, np.zeros(18), jac=True, method="BFGS", options={"gtol": 1e-9})
    weight, bias = logistic_regression(torch.tensor(x), torch.tensor(y), num_classes=3, penalty=penalty)
    np.testing.assert_allclose(weight.numpy(), best.x[:15].reshape(3, 5), atol=1e-6)
    np.testing.assert_allclose((bias - bias.mean()).numpy(), best.x[15:] - best.x[15:].mean(), atol=1e-6)


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_logistic_regression_in_float32_ends_where_the_gradient_vanishes(penalty):
    x, y = (torch.tensor(a) for a in blobs(200, d=40, apart=0.3))
    weight, bias = logistic_regression(x.float(), y, num_classes=4, penalty=penalty)
    weight, bias = weight.double().requires_grad_(), bias.double().requires_grad_()
    (functional.cross_entropy(x @ weight.T + bias, y) + penalty / 2 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert max(weight.grad.abs().max().item(), bias.grad.abs().max().item()) < 1e-4


def test_linear_probe_equals_its_steps_done_one_by_one():
    x, y, x_test, y_test = (torch.tensor(a) for a in problem(apart=0.4))
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    weight, bias = logistic_regression((x - mean) / std, y, num_classes=4, penalty=0.05)
    expected = ((x_test - mean) / std @ weight.T + bias).argmax(dim=1) == y_test
    score = linear_probe(x, y, x_test, y_test, num_classes=4, penalties=(0.05,))
    assert 0.3 < score.accuracy < 0.95
    np.testing.assert_array_equal(score.correct, expected.numpy())


def test_penalty_is_chosen_without_the_test_images():
    x, y, x_test, y_test = problem(apart=0.4)
    penalties = (1e-5, 100.0, 0.1)
    score = linear_probe(x, y, x_test, y_test, num_classes=4, penalties=penalties)
    other = linear_probe(x, y, x_test[::-1].copy(), (y_test + 1) % 4, num_classes=4, penalties=penalties)
    assert score.settings["penalty"] == other.settings["penalty"]
    again = linear_probe(x, y, x_test, y_test, num_classes=4, penalties=(score.settings["penalty"],))
    np.testing.assert_array_equal(score.correct, again.correct)


def test_selection_prefers_a_penalty_that_generalises():
    # two informative features among many of noise, few images: a vanishing penalty overfits
    rng = np.random.default_rng(0)
    y, y_test = rng.integers(0, 2, 400), rng.integers(0, 2, 400)
    x, x_test = rng.normal(size=(400, 300)), rng.normal(size=(400, 300))
    for features, labels in ((x, y), (x_test, y_test)):
        features[:, :2] += 1.2 * (2 * labels - 1)[:, None]
    chosen = linear_probe(x, y, x_test, y_test, num_classes=2)
    weakest = linear_probe(x, y, x_test, y_test, num_classes=2, penalties=(1e-4,))
    assert chosen.settings["penalty"] > 1e-4
    assert chosen.accuracy > weakest.accuracy


def test_equally_good_penalties_give_the_strongest():
    assert linear_probe(*problem(), num_classes=4, penalties=(1e-3, 1e-2)).settings["penalty"] == 1e-2


def test_linear_probe_is_deterministic_and_ignores_scale_and_shift_of_features():
    x, y, x_test, y_test = problem(apart=0.4)
    scale, shift = np.geomspace(1e-3, 1e3, 12), np.linspace(-5, 5, 12)
    score = linear_probe(x, y, x_test, y_test, num_classes=4)
    assert score == linear_probe(x, y, x_test, y_test, num_classes=4)
    moved = linear_probe(x * scale + shift, y, x_test * scale + shift, y_test, num_classes=4)
    assert abs(score.accuracy - moved.accuracy) <= 0.01


@pytest.mark.parametrize("value", [0.0, 1234.567])
def test_constant_features_change_nothing(value):
    x, y, x_test, y_test = problem(apart=0.4)
    plain = linear_probe(x, y, x_test, y_test, num_classes=4)
    # on the test images the feature differs: it must have no weight
    x, x_test = np.c_[x, np.full(200, value)], np.c_[x_test, np.linspace(-1e3, 1e3, 100)]
    np.testing.assert_array_equal(linear_probe(x, y, x_test, y_test, num_classes=4).correct, plain.correct)


def test_only_constant_features_score_the_commonest_class():
    y, y_test = np.repeat([0, 1, 1, 2], 10), np.repeat([0, 1, 2, 2], 5)
    score = linear_probe(np.ones((40, 3)), y, np.ones((20, 3)), y_test, num_classes=3)
    np.testing.assert_array_equal(score.correct, y_test == 1)
    assert score.settings["largest_class"] == 0.5


def test_classes_that_never_occur_in_training_are_never_named():
    x, y, x_test, y_test = problem(apart=0.4)
    few = linear_probe(x, y, x_test, y_test, num_classes=4)
    many = linear_probe(x, y * 3, x_test, y_test * 3, num_classes=100)
    np.testing.assert_array_equal(few.correct, many.correct)
    assert many.chance == 0.01


def test_score_is_json_without_the_answers():
    score = linear_probe(*problem(), num_classes=4)
    told = json.loads(json.dumps(score.to_json(), allow_nan=False))
    assert told["accuracy"] == score.accuracy
    assert told["settings"]["penalty"] == score.settings["penalty"]
    assert "correct" not in told


# -- k-NN --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.5), (20, 1e-5)])
def test_knn_equals_brute_force(k, temperature):
    x, y, x_test, y_test = problem(apart=0.4)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    expected = []
    for row, label in zip(x_test, y_test, strict=True):
        similarity = unit @ row / np.linalg.norm(row)
        votes = np.zeros(4)
        for neighbour in np.argsort(-similarity)[:k]:
            votes[y[neighbour]] += np.exp((similarity[neighbour] - similarity.max()) / temperature)
        expected.append(votes.argmax() == label)
    score = knn_probe(x, y, x_test, y_test, num_classes=4, k=k, temperature=temperature)
    np.testing.assert_array_equal(score.correct, expected)


def test_knn_in_chunks_equals_knn_at_once(monkeypatch):
    data = problem(apart=0.4)
    whole = knn_probe(*data, num_classes=4)
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda self, rows, dim=0: split(self, min(rows, 7), dim))
    np.testing.assert_array_equal(knn_probe(*data, num_classes=4).correct, whole.correct)


# -- SGD ---------------------------------------------------------------------------------------------------------------


def batches_of(x: dict[str, torch.Tensor], y: torch.Tensor, size: int = 50):
    def epoch(number: int):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(number))
        return (({name: value[rows] for name, value in x.items()}, y[rows]) for rows in order.split(size))

    return epoch


def test_sgd_probes_of_several_stages_score_each_as_if_alone():
    x, y, x_test, y_test = (torch.tensor(a) for a in problem(apart=1.5))
    train = {"good": x.float(), "noise": torch.randn(200, 5, generator=torch.Generator().manual_seed(1))}
    test = {"good": x_test.float(), "noise": torch.randn(100, 5, generator=torch.Generator().manual_seed(2))}
    both = sgd_probe(batches_of(train, y), test, y_test, num_classes=4, epochs=10)
    alone = sgd_probe(batches_of({"good": train["good"]}, y), {"good": test["good"]}, y_test, num_classes=4, epochs=10)
    assert both["good"] == alone["good"]
    assert both["good"].accuracy > 0.9
    assert both["noise"].low < 0.25 < both["noise"].high


def test_sgd_probe_equals_a_plain_loop():
    x, y, x_test, y_test = (torch.tensor(a) for a in problem(apart=0.3))
    x, x_test = x.float(), x_test.float()
    seen: list[int] = []

    def epochs_of_features(epoch: int):
        seen.append(epoch)
        return batches_of({"a": x}, y)(epoch)

    score = sgd_probe(epochs_of_features, {"a": x_test}, y_test, num_classes=4, epochs=6, weight_decay=0.01, seed=7)
    assert seen == list(range(6))
    with keyed(7, "sgd probe", "a"):
        probe = torch.nn.Linear(12, 4)
    velocity = [torch.zeros_like(p) for p in probe.parameters()]
    for epoch in range(6):
        lr = 0.1 * (1 + np.cos(np.pi * epoch / 6)) / 2
        for features, labels in batches_of({"a": x}, y)(epoch):
            loss = functional.cross_entropy(probe(features["a"]), labels)
            slopes = torch.autograd.grad(loss, list(probe.parameters()))
            with torch.no_grad():
                for p, v, slope in zip(probe.parameters(), velocity, slopes, strict=True):
                    v.mul_(0.9).add_(slope + 0.01 * p)
                    p.sub_(lr * v)
    np.testing.assert_array_equal(score["a"].correct, (probe(x_test).argmax(dim=1) == y_test).numpy())


def test_sgd_probe_reports_the_last_epoch_or_the_best():
    x, y, x_test, y_test = (torch.tensor(a) for a in problem())
    x, x_test = x.float(), x_test.float()

    def spoiled(epoch: int):  # the last epoch teaches wrong labels
        return batches_of({"a": x}, y if epoch < 3 else (y + 1) % 4)(epoch)

    def score(report):
        return sgd_probe(spoiled, {"a": x_test}, y_test, num_classes=4, epochs=8, report=report)["a"]

    assert score("last").accuracy < 0.5 < score("best").accuracy
    assert score("last").settings["reported_epoch"] == 7
    assert score("best").settings["reported_epoch"] < 3


def test_sgd_probe_refuses_what_it_cannot_train_on():
    x, y = torch.zeros(20, 3), torch.arange(20) % 2

    def told(batches, test=None, **options) -> str:
        with pytest.raises(UserError) as error:
            sgd_probe(batches, {"a": x} if test is None else test, y, num_classes=2, epochs=1, **options)
        return str(error.value)

    assert "no batches" in told(lambda epoch: [])
    assert "differ in name" in told(lambda epoch: [({"b": x}, y)])
    assert "width 2" in told(lambda epoch: [({"a": x[:, :2]}, y)])
    assert "NaN" in told(lambda epoch: [({"a": x * np.nan}, y)])
    assert "NaN" in told(lambda epoch: [({"a": x}, y)], test={"a": x * np.nan})
    assert "allowed: last, best" in told(lambda epoch: [({"a": x}, y)], report="first")


# -- intervals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "n", "level"), [(30, 100, 0.95), (180, 200, 0.9)])
def test_bootstrap_agrees_with_scipy(hits, n, level):
    correct = np.arange(n) < hits
    reference = scipy.stats.bootstrap(
        (correct.astype(float),),
        np.mean,
        confidence_level=level,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    np.testing.assert_allclose(bootstrap_interval(correct, level=level, num=20_000), reference, atol=1.01 / n)


def test_paired_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(4)
    a = rng.random(150) < 0.8
    b = np.where(rng.random(150) < 0.85, a, ~a)
    reference = scipy.stats.bootstrap(
        (a.astype(float) - b.astype(float),),
        np.mean,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = paired_bootstrap(a, b, num=20_000)
    np.testing.assert_allclose((low, high), reference, atol=1.01 / 150)
    assert paired_bootstrap(a, a) == (0.0, 0.0)
    mirrored = paired_bootstrap(b, a, num=20_000)
    np.testing.assert_allclose(mirrored, (-high, -low), atol=1.01 / 150)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=80), st.integers(0, 5))
def test_interval_holds_the_accuracy_and_grows_with_the_level(answers, seed):
    correct = np.array(answers)
    narrow = bootstrap_interval(correct, level=0.5, seed=seed)
    wide = bootstrap_interval(correct, level=0.99, seed=seed)
    assert 0 <= wide[0] <= narrow[0] <= narrow[1] <= wide[1] <= 1
    assert wide[0] <= correct.mean() <= wide[1]


def test_intervals_refuse_bad_input():
    with pytest.raises(UserError, match="at least one image"):
        bootstrap_interval(np.zeros(0, dtype=bool))
    with pytest.raises(UserError, match=r"level 1\.5"):
        bootstrap_interval(np.ones(3, dtype=bool), level=1.5)
    with pytest.raises(UserError, match="same test images"):
        paired_bootstrap(np.ones(3, dtype=bool), np.ones(4, dtype=bool))


# -- what cannot be probed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_what_cannot_be_probed_is_said_in_a_sentence(probe):
    x, y, x_test, y_test = problem()

    def told(x=x, y=y, x_test=x_test, y_test=y_test, num_classes=4, **options) -> str:
        with pytest.raises(UserError) as error:
            probe(x, y, x_test, y_test, num_classes=num_classes, **options)
        return str(error.value)

    spoiled = x.copy()
    spoiled[3, 2] = np.nan
    assert "training features hold 1 values that are NaN" in told(x=spoiled)
    assert "test features hold 1200 values" in told(x_test=np.full_like(x_test, np.inf))
    assert "of 1" in told(y=np.zeros(200, dtype=int))
    assert "10 training images" in told(x=x[:5], y=y[:5])
    assert "10 test images, not 9" in told(x_test=x_test[:9], y_test=y_test[:9])
    assert "num_classes 1" in told(num_classes=1)
    assert "allowed: 0 to 2" in told(num_classes=3)
    assert "(n, d)" in told(y=y[:-1])
    assert "(n, d)" in told(x=x[:, :, None])
    assert "width 12" in told(x_test=x_test[:, :3])


def test_probe_options_are_checked():
    with pytest.raises(UserError, match="k 201 must lie between 1 and the number of training images, 200"):
        knn_probe(*problem(), num_classes=4, k=201)
    with pytest.raises(UserError, match="temperature 0"):
        knn_probe(*problem(), num_classes=4, temperature=0)
    with pytest.raises(UserError, match="penalties"):
        linear_probe(*problem(), num_classes=4, penalties=(0.0, 1.0))
