"""Linear and k-NN probes on frozen features, with intervals over test images.

Features come as arrays `(n, d)` with integer labels `(n,)`; how they are read from a network is elsewhere. A score is
never NaN: what cannot be probed is a `UserError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from localsim import rng
from localsim.errors import UserError, one_of

Array = np.ndarray | Tensor
MIN_TEST_IMAGES = 10
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True)
class ProbeScore:
    """Accuracy of a probe on a test set.

    Attributes:
        accuracy: share of test images named correctly, 0 to 1.
        low: lower end of the 95 % bootstrap interval over test images.
        high: upper end of it.
        n_test: number of test images.
        chance: accuracy of guessing evenly among the classes, 1 / classes.
        settings: how the probe was made, JSON-serialisable; `largest_class` is the test accuracy of always naming the
            commonest test class, which exceeds `chance` where classes are unbalanced.
        correct: `(n_test,)` bool, which images were named correctly, in the order given.
    """

    accuracy: float
    low: float
    high: float
    n_test: int
    chance: float
    settings: dict[str, Any]
    correct: np.ndarray = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return everything except `correct` as a JSON-serialisable dictionary."""
        return {name: value for name, value in vars(self).items() if name != "correct"}


def linear_probe(
    x_train: Array, y_train: Array, x_test: Array, y_test: Array, *, num_classes: int, seed: int = 0,
    penalties: Sequence[float] = PENALTIES,
) -> ProbeScore:  # fmt: skip
    """Score multinomial logistic regression with an L2 penalty, chosen within the training images.

    Features are standardised by the training mean and standard deviation (constant ones become 0). Each penalty is
    fitted on four fifths of the training images; the one that names most of the other fifth correctly (of equals, the
    strongest) is fitted again on all of them. The test images take no part in any choice. Deterministic given `seed`,
    which draws the fifth.

    Args:
        x_train: `(n, d)` features; arithmetic is float32, on the tensor's device.
        y_train: `(n,)` labels in 0..num_classes-1, of at least two classes.
        x_test: `(m, d)` features, m >= 10.
        y_test: `(m,)` labels.
        num_classes: number of classes the labels could take.
        seed: key of the held-out fifth and of the bootstrap.
        penalties: candidate values of `penalty` in `logistic_regression`; with only one, nothing is held out.

    Raises:
        UserError: shapes or labels do not fit, a feature is not finite, there are too few images or classes, or a
            penalty is not positive.
    """
    x_train, y_train, x_test, y_test = _checked(x_train, y_train, x_test, y_test, num_classes)
    fitted = fit_linear_probe(x_train, y_train, num_classes=num_classes, seed=seed, penalties=penalties)
    ordered = sorted(map(float, penalties), reverse=True)
    settings = {"probe": "linear", "penalty": fitted.penalty, "penalties": ordered, "n_train": len(y_train)}
    return _score(fitted.answers(x_test) == y_test, y_test, num_classes, settings | {"seed": seed})


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A fitted probe: features are standardised to (x - mean) * scale; `classes` are the labels seen in training."""

    classes: Tensor
    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    penalty: float

    def answers(self, x: Tensor) -> Tensor:
        """Return the `(m,)` labels given to features `(m, d)`, on the probe's device."""
        return self.classes[(((x - self.mean) * self.scale) @ self.weight.T + self.bias).argmax(dim=1)]


def fit_linear_probe(
    x_train: Array, y_train: Array, *, num_classes: int, seed: int = 0, penalties: Sequence[float] = PENALTIES
) -> LinearProbe:
    """Return the probe that `linear_probe` scores, for use on several sets of images; arguments and errors as there."""
    x_train, y_train = _checked_training(x_train, y_train, num_classes)
    if not penalties or min(penalties) <= 0:
        raise UserError(f"penalties {tuple(penalties)} must be one or more positive numbers")
    ordered = sorted(map(float, penalties), reverse=True)
    chosen = ordered[0]
    if len(ordered) > 1:
        order = torch.randperm(len(y_train), generator=rng.generator(seed, "linear probe, held-out fifth"))
        held, rest = order[: len(order) // 5].to(y_train.device), order[len(order) // 5 :].to(y_train.device)
        fits = _fits(x_train[rest], y_train[rest], ordered)
        hits = [int((fitted.answers(x_train[held]) == y_train[held]).sum()) for fitted in fits]
        chosen = ordered[hits.index(max(hits))]
    return _fits(x_train, y_train, [chosen])[0]


def logistic_regression(
    x: Tensor, y: Tensor, *, num_classes: int, penalty: float, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the weight `(num_classes, d)` and bias `(num_classes,)` of penalised multinomial logistic regression.

    They minimise mean_i cross_entropy(W x_i + b, y_i) + penalty/2 * |W|^2, the bias being free, by full-batch L-BFGS
    with a strong Wolfe line search from `start` (a weight; zeros by default). The minimum is unique up to a constant
    added to the bias when every class occurs. (scikit-learn's C is 1 / (n * penalty).)
    """
    weight = torch.zeros(num_classes, x.shape[1], device=x.device, dtype=x.dtype) if start is None else start.clone()
    bias = torch.zeros(num_classes, 1, device=x.device, dtype=x.dtype)
    fitted = [weight.requires_grad_(), bias.requires_grad_()]
    solver = torch.optim.LBFGS(
        fitted,
        max_iter=1000,
        history_size=20,
        tolerance_grad=1e-5 if x.dtype == torch.float32 else 1e-10,
        tolerance_change=1e-9 if x.dtype == torch.float32 else 1e-15,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        # classes first: both this product and its gradient then run along the rows of x, several times faster here
        loss = functional.cross_entropy((weight @ x.T + bias)[None], y[None]) + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)  # pyright: ignore[reportArgumentType]  # torch's stub wants a float; it needs a tensor
    return weight.detach(), bias.detach()[:, 0]


def knn_probe(
    x_train: Array, y_train: Array, x_test: Array, y_test: Array, *, num_classes: int, k: int = 20,
    temperature: float = 0.07, seed: int = 0,
) -> ProbeScore:  # fmt: skip
    """Score a weighted vote of the k training images most similar to each test image.

    Similarity s is the cosine between features as they are; a neighbour's vote for its class weighs exp(s/temperature).
    Source: Wu et al. 2018, "Unsupervised feature learning via non-parametric instance discrimination", section 3.4
    (there k = 200 on ImageNet). The arguments are those of `linear_probe`; `seed` keys the bootstrap only.

    Raises:
        UserError: as `linear_probe`, or k is not in 1..n, or the temperature is not positive.
    """
    x_train, y_train, x_test, y_test = _checked(x_train, y_train, x_test, y_test, num_classes)
    if not 1 <= k <= len(y_train):
        raise UserError(f"k {k} must lie between 1 and the number of training images, {len(y_train)}")
    if not temperature > 0:
        raise UserError(f"temperature {temperature} must be positive")
    memory = functional.normalize(x_train, dim=1)
    rows = max(1, 2**24 // len(y_train))  # at most 64 MiB of similarities at a time
    correct = []
    for features, labels in zip(x_test.split(rows), y_test.split(rows), strict=True):
        similarity, neighbour = (functional.normalize(features, dim=1) @ memory.T).topk(k, dim=1)
        # relative to the nearest neighbour: the same winner, and exp cannot overflow at a low temperature
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(labels), num_classes).scatter_add_(1, y_train[neighbour], weight)
        correct.append(votes.argmax(dim=1) == labels)
    settings = {"probe": "knn", "k": k, "temperature": temperature, "n_train": len(y_train), "seed": seed}
    return _score(torch.cat(correct), y_test, num_classes, settings)


@torch.no_grad()
def sgd_probe(
    epochs_of_features: Callable[[int], Iterable[tuple[Mapping[str, Tensor], Tensor]]],
    x_test: Mapping[str, Array],
    y_test: Array,
    *,
    num_classes: int,
    epochs: int = 100,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-6,
    seed: int = 0,
    report: Literal["last", "best"] = "last",
) -> dict[str, ProbeScore]:
    """Score linear classifiers trained by SGD on features of augmented images: the protocol of Blockwise SSL.

    One `Linear(d, num_classes)` per name (a stage or a readout), all trained in the same pass over the data, each as if
    alone: cross-entropy, SGD with momentum, the learning rate annealed once per epoch,
    lr * (1 + cos(pi * epoch / epochs)) / 2. Source: the evaluation of Siddiqui et al. 2023 (arXiv 2302.01647), which
    takes batches of 256, 100 epochs, random crops and flips.

    Args:
        epochs_of_features: given the epoch (from 0), the batches of that epoch: features `{name: (b, d)}` of newly
            augmented images, and labels `(b,)`. The iterable is consumed once.
        x_test: `{name: (m, d)}` features of the test images; their device is where the classifiers are trained.
        y_test: `(m,)` labels in 0..num_classes-1.
        num_classes: number of classes.
        epochs: passes over the data.
        lr: learning rate of the first epoch.
        momentum: of SGD.
        weight_decay: L2 penalty of SGD, on weights and biases.
        seed: key of the classifiers' initial values and of the bootstrap.
        report: accuracy after the last epoch, or, as published, of the epoch that is best on the test images
            themselves; the latter is optimistic, and so is its interval.

    Raises:
        UserError: names, shapes or labels do not fit, a feature is not finite, or an epoch has no batches.
    """
    if report not in ("last", "best"):
        raise one_of("report", report, ("last", "best"))
    if epochs < 1 or not x_test:
        raise UserError(
            f"an SGD probe needs at least one epoch and one set of features, not {epochs} and {len(x_test)}"
        )
    tests = {name: _checked_set(x_test[name], y_test, num_classes, f"test features {name!r}") for name in x_test}
    for _, labels in tests.values():
        _enough_test_images(labels)
    probes: dict[str, nn.Linear] = {}
    for name, (x, _) in tests.items():
        with rng.keyed(seed, "sgd probe", name):
            probes[name] = nn.Linear(x.shape[1], num_classes).to(x.device)
    weights = [weight for probe in probes.values() for weight in probe.parameters()]
    optimizer = torch.optim.SGD(weights, lr=lr, momentum=momentum, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    kept: dict[str, tuple[int, Tensor]] = {}
    for epoch in range(epochs):
        batches = 0
        for features, labels in epochs_of_features(epoch):
            _sgd_step(probes, optimizer, features, labels, num_classes)
            batches += 1
        if not batches:
            raise UserError(f"epoch {epoch} of the SGD probe has no batches")
        schedule.step()
        for name, (x, y) in tests.items():
            correct = probes[name](x).argmax(dim=1) == y
            if report == "last" or epoch == 0 or correct.sum() > kept[name][1].sum():
                kept[name] = (epoch, correct)
    shared = {"probe": "sgd", "epochs": epochs, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    return {
        name: _score(
            correct, tests[name][1], num_classes, shared | {"report": report, "reported_epoch": epoch, "seed": seed}
        )
        for name, (epoch, correct) in kept.items()
    }


def bootstrap_interval(
    correct: np.ndarray, *, level: float = 0.95, num: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of an accuracy over its test images.

    Drawing n images with replacement from n of which c are correct makes the number of correct draws
    Binomial(n, c/n): that count is drawn directly, the same distribution without n draws per repetition. The interval
    of 0 or n correct images is that single point, as with any bootstrap.

    Args:
        correct: `(n,)` bool, per test image.
        level: coverage, between 0 and 1.
        num: bootstrap repetitions.
        seed: key of the draws.

    Raises:
        UserError: there are no images, or the level is not between 0 and 1.
    """
    n = _num_images(correct, level)
    draws = np.random.default_rng(rng.key(seed, "bootstrap")).binomial(n, np.count_nonzero(correct) / n, num)
    return _percentiles(draws / n, level)


def paired_bootstrap(
    correct_a: np.ndarray, correct_b: np.ndarray, *, level: float = 0.95, num: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of accuracy a minus accuracy b on the same test images.

    Images are drawn, each with both its answers. Only the counts of images that a alone or b alone names correctly
    matter, and they are multinomial, so they are drawn directly (see `bootstrap_interval` for the arguments).

    Raises:
        UserError: the two differ in length, there are no images, or the level is not between 0 and 1.
    """
    correct_a, correct_b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if correct_a.shape != correct_b.shape:
        raise UserError(f"a paired comparison needs the same test images, not {correct_a.shape} and {correct_b.shape}")
    n = _num_images(correct_a, level)
    only_a, only_b = np.count_nonzero(correct_a & ~correct_b) / n, np.count_nonzero(correct_b & ~correct_a) / n
    shares = [only_a, only_b, max(0.0, 1 - only_a - only_b)]
    draws = np.random.default_rng(rng.key(seed, "paired bootstrap")).multinomial(n, shares, num)
    return _percentiles((draws[:, 0] - draws[:, 1]) / n, level)


def _fits(x_train: Tensor, y_train: Tensor, penalties: Sequence[float]) -> list[LinearProbe]:
    """Return a fit for each penalty, strongest first: each starts from the one before."""
    # only classes that occur: the bias of an absent one would run off to minus infinity
    classes, y_train = y_train.unique(return_inverse=True)
    mean, std = x_train.mean(dim=0), x_train.std(dim=0, correction=0)
    # a constant feature's computed deviation is rounding noise, relative to its size
    varies = std > 1e-6 * x_train.abs().amax(dim=0)
    scale = torch.where(varies, 1 / torch.where(varies, std, 1), 0)
    x_train = (x_train - mean) * scale
    weight, fits = None, []
    for penalty in penalties:
        weight, bias = logistic_regression(x_train, y_train, num_classes=len(classes), penalty=penalty, start=weight)
        fits.append(LinearProbe(classes, mean, scale, weight, bias, penalty))
    return fits


@torch.enable_grad()
def _sgd_step(
    probes: Mapping[str, nn.Linear],
    optimizer: torch.optim.Optimizer,
    features: Mapping[str, Tensor],
    labels: Tensor,
    num_classes: int,
) -> None:
    if features.keys() != probes.keys():
        raise UserError(f"training features {sorted(features)} and test features {sorted(probes)} differ in name")
    losses = []
    for name, probe in probes.items():
        x, y = _checked_set(features[name], labels, num_classes, f"training features {name!r}")
        if x.shape[1] != probe.in_features:
            raise UserError(f"training features {name!r} have width {x.shape[1]}, test features {probe.in_features}")
        logits = probe(x.detach().to(probe.weight.device))
        losses.append(functional.cross_entropy(logits, y.to(logits.device)))
    optimizer.zero_grad()
    torch.autograd.backward(losses)
    optimizer.step()


def _checked(
    x_train: Array, y_train: Array, x_test: Array, y_test: Array, num_classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features as float32 and labels as int64 on the training features' device, or say what is wrong."""
    x, y = _checked_training(x_train, y_train, num_classes)
    x_other, y_other = _checked_set(x_test, y_test, num_classes, "test features")
    if x.shape[1] != x_other.shape[1]:
        raise UserError(f"training features have width {x.shape[1]}, test features {x_other.shape[1]}")
    _enough_test_images(y_other)
    return x, y, x_other.to(x.device), y_other.to(x.device)


def _checked_training(x_train: Array, y_train: Array, num_classes: int) -> tuple[Tensor, Tensor]:
    x, y = _checked_set(x_train, y_train, num_classes, "training features")
    if len(y) < 10 or len(y.unique()) < 2:
        raise UserError(
            f"a probe needs at least 10 training images of 2 classes, not {len(y)} images of {len(y.unique())}"
        )
    return x, y


def _checked_set(x: Array, y: Array, num_classes: int, what: str) -> tuple[Tensor, Tensor]:
    x, y = torch.as_tensor(x).detach().float(), torch.as_tensor(y).to(torch.int64)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise UserError(f"{what} must be (n, d) with labels (n,), not {tuple(x.shape)} with {tuple(y.shape)}")
    if num_classes < 2:
        raise UserError(f"num_classes {num_classes} must be at least 2")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
        raise UserError(f"labels of {what} run from {int(y.min())} to {int(y.max())}; allowed: 0 to {num_classes - 1}")
    bad = int((~x.isfinite()).sum())
    if bad:
        raise UserError(f"{what} hold {bad} values that are NaN or infinite (of {x.numel()})")
    return x, y.to(x.device)


def _enough_test_images(labels: Tensor) -> None:
    if len(labels) < MIN_TEST_IMAGES:
        raise UserError(f"a probe needs at least {MIN_TEST_IMAGES} test images, not {len(labels)}")


def _score(correct: Tensor, labels: Tensor, num_classes: int, settings: dict[str, Any]) -> ProbeScore:
    hits = correct.cpu().numpy()
    low, high = bootstrap_interval(hits, seed=settings["seed"])
    settings = settings | {"largest_class": float(labels.bincount().max()) / len(labels)}
    return ProbeScore(float(hits.mean()), low, high, len(hits), 1 / num_classes, settings, hits)


def _num_images(correct: np.ndarray, level: float) -> int:
    if len(correct) == 0:
        raise UserError("an interval over test images needs at least one image")
    if not 0 < level < 1:
        raise UserError(f"level {level} must lie between 0 and 1")
    return len(correct)


def _percentiles(draws: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
