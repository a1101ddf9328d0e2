"""VICReg, NT-Xent, SupCon and the supervised objectives against numpy formulations written as loops."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from localsim.errors import UserError
from localsim.rules.heads import HEADS
from localsim.rules.objectives import OBJECTIVES, make_objective
from localsim.rules.objectives.contrastive import SupCon

NUM, DIM, CLASSES = 6, 4, 3
LABELS = np.array([0, 1, 0, 2, 1, 0])


def views(num_views: int = 2, *, seed: int = 0, shape: tuple[int, ...] = (NUM, DIM)) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=shape)
    return [(1 + v) * shared + rng.normal(size=shape) - v for v in range(num_views)]


def loss_of(name, embeddings, labels=None, **options) -> float:
    def tensors(z):
        return tuple(map(tensors, z)) if isinstance(z, tuple) else torch.tensor(z)

    loss = make_objective(name, options)(tensors(tuple(embeddings)), None if labels is None else torch.tensor(labels))
    assert loss.shape == ()
    return loss.item()


def close(a: float, b: float) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def numpy_vicreg(z1, z2, sim_weight=25.0, std_weight=25.0, cov_weight=1.0, eps=1e-4):
    n, d = z1.shape
    distance = sum((z1[b, i] - z2[b, i]) ** 2 for b in range(n) for i in range(d)) / (n * d)
    spread = redundancy = 0.0
    for z in (z1, z2):
        for i in range(d):
            spread += max(0.0, 1 - math.sqrt(np.var(z[:, i], ddof=1) + eps)) / d / 2
            for k in range(d):
                if i != k:
                    redundancy += np.cov(z[:, i], z[:, k])[0, 1] ** 2 / d
    return sim_weight * distance + std_weight * spread + cov_weight * redundancy


@pytest.mark.parametrize("options", [{}, {"sim_weight": 2.0, "std_weight": 7, "cov_weight": 0.3, "eps": 0.1}])
@pytest.mark.parametrize("size", [0.2, 1.0])  # below and above the hinge
def test_vicreg(options, size):
    z1, z2 = (size * z for z in views())
    close(loss_of("vicreg", (z1, z2), **options), numpy_vicreg(z1, z2, **options))


def log_probability(rows, a, b, temperature):
    """log p(b | a) among all others of `rows`, by cosine."""

    def score(i, j):
        return rows[i] @ rows[j] / (np.linalg.norm(rows[i]) * np.linalg.norm(rows[j]) * temperature)

    return score(a, b) - math.log(sum(math.exp(score(a, c)) for c in range(len(rows)) if c != a))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.1}])
def test_simclr(options):
    z1, z2 = views()
    rows, temperature = [*z1, *z2], options.get("temperature", 0.5)
    expected = -np.mean([log_probability(rows, a, (a + NUM) % (2 * NUM), temperature) for a in range(2 * NUM)])
    close(loss_of("simclr", (z1, z2), **options), expected)


def numpy_supcon(embeddings, labels, temperature=0.07):
    rows, classes = np.concatenate(embeddings), np.tile(labels, len(embeddings))
    anchors = []
    for a in range(len(rows)):
        positives = [p for p in range(len(rows)) if p != a and classes[p] == classes[a]]
        if positives:
            anchors.append(-np.mean([log_probability(rows, a, p, temperature) for p in positives]))
    return np.mean(anchors)


@pytest.mark.parametrize("num_views", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}])
def test_supcon(num_views, options):
    """With one view, the only image of class 2 is an anchor without a positive."""
    close(loss_of("supcon", views(num_views), LABELS, **options), numpy_supcon(views(num_views), LABELS, **options))


def test_supcon_without_any_positive_is_zero_with_a_gradient():
    z = torch.tensor(views(1)[0], requires_grad=True)
    loss = SupCon()((z,), torch.arange(NUM))
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))


def test_supcon_of_two_views_and_distinct_labels_is_simclr():
    close(loss_of("supcon", views(), np.arange(NUM), temperature=0.5), loss_of("simclr", views()))


def numpy_cross_entropy(logits, labels, smoothing=0.0):
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        for c in range(len(row)):
            wanted = (1 - smoothing) * (c == label) + smoothing / len(row)
            total -= wanted * (row[c] - math.log(np.exp(row).sum()))
    return total / len(labels)


@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(num_views, smoothing):
    logits = views(num_views, shape=(NUM, CLASSES))
    expected = np.mean([numpy_cross_entropy(z, LABELS, smoothing) for z in logits])
    close(loss_of("cross_entropy", logits, LABELS, label_smoothing=smoothing), expected)


def correlation(a, b):
    """Cosine of two vectors, each less its own mean."""
    a, b = a - a.mean(), b - b.mean()
    return (a @ b) / math.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("beta", [0.99, 0.0, 1.0, 0.3])
@pytest.mark.parametrize("num_views", [1, 2])
def test_predsim(beta, num_views):
    logits, features = views(num_views, shape=(NUM, CLASSES)), views(num_views, seed=1)
    expected = 0.0
    for row, z in zip(logits, features, strict=True):
        matching = 0.0
        for a in range(NUM):
            for b in range(NUM):
                # one-hot vectors less their mean 1 / classes
                wanted = 1.0 if LABELS[a] == LABELS[b] else -1 / (CLASSES - 1)
                matching += (correlation(z[a], z[b]) - wanted) ** 2 / NUM**2
        expected += ((1 - beta) * numpy_cross_entropy(row, LABELS) + beta * matching) / num_views
    close(loss_of("predsim", zip(logits, features, strict=True), LABELS, beta=beta), expected)


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("num_views", [1, 2])
def test_infopro(contrast, num_views):
    vectors = views(num_views, shape=(NUM, CLASSES))
    images = views(num_views, seed=2, shape=(NUM, 3, 2, 2))
    targets = [np.random.default_rng(v).uniform(size=(NUM, 3, 2, 2)) for v in range(num_views)]
    error = 0.0
    for image, target in zip(images, targets, strict=True):
        for x, t in zip(image.flat, target.flat, strict=True):
            p = 1 / (1 + math.exp(-x))
            error -= (t * math.log(p) + (1 - t) * math.log(1 - p)) / image.size / num_views
    if contrast:
        task = numpy_supcon(vectors, LABELS)
    else:
        task = np.mean([numpy_cross_entropy(z, LABELS) for z in vectors])
    loss = loss_of("infopro", zip(vectors, images, targets, strict=True), LABELS, contrast=contrast, task=0.3)
    close(loss, 5 * error + 0.3 * task)


@pytest.mark.parametrize("sizes", [(0.3, 0.3), (0.25, 0.25), (1.0, 1.0), (0.1, 0.6)])
@pytest.mark.parametrize("weights", [(25, 25, 1), (1, 10, 0), (3, 0, 0)])
def test_vicreg_chance_level_is_the_least_loss_of_unrelated_views(sizes, weights):
    objective = make_objective("vicreg", dict(zip(("sim_weight", "std_weight", "cov_weight"), weights, strict=True)))
    z = torch.randn(2, 4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)
    z1, z2 = z[0] * sizes[0], z[1] * sizes[1]
    chance = objective.chance_level(3, 4000)
    assert chance is not None
    assert objective((z1, z2), None) > chance - 0.02 * sum(weights)  # sampling error of the distance
    best = min(1.0, weights[1] / (4 * weights[0]))  # closed form up to eps
    assert chance == pytest.approx(2 * weights[0] * best**2 + weights[1] * (1 - best), abs=0.01)
    if sizes == (0.25, 0.25) and weights == (25, 25, 1):
        assert objective((z1, z2), None).item() == pytest.approx(chance, rel=0.01)


@pytest.mark.parametrize(("name", "width"), [("simclr", 2000), ("cross_entropy", 5)])
def test_chance_level_of_unrelated_embeddings(name, width):
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, 16, width, generator=generator, dtype=torch.float64) * (0.05 if width == 5 else 1)
    objective = make_objective(name)
    chance = objective.chance_level(width, 16)
    assert chance == pytest.approx(math.log(31 if name == "simclr" else width))
    labels = torch.randint(width, (16,), generator=generator)
    assert objective(tuple(views), labels).item() == pytest.approx(chance, rel=0.02)


@pytest.mark.parametrize("name", ["supcon", "predsim", "infopro"])
def test_no_chance_level(name):
    assert make_objective(name).chance_level(8, 8) is None


@pytest.mark.parametrize("name", ["vicreg", "simclr", "lpl"])
@pytest.mark.parametrize("num", [1, 3])
def test_exactly_two_views(name, num):
    with pytest.raises(UserError, match=f"{name} compares exactly 2 views, not {num}"):
        loss_of(name, views(num))


@pytest.mark.parametrize("name", ["supcon", "cross_entropy", "predsim", "infopro"])
def test_labels_are_needed(name):
    assert OBJECTIVES[name].needs_labels
    with pytest.raises(UserError, match=f"{name} needs labels"):
        loss_of(name, views(1))


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "simclr"])
def test_embeddings_of_another_kind_are_refused(name):
    with pytest.raises(UserError, match=f"{name} reads one vector per image"):
        loss_of(name, [(z, z) for z in views()])


@pytest.mark.parametrize("name", ["predsim", "infopro"])
def test_vectors_alone_are_refused_by_objectives_of_several_tensors(name):
    with pytest.raises(UserError, match=f"{name} reads .*, but its head does not give them"):
        loss_of(name, views(1), LABELS)


@pytest.mark.parametrize(
    ("name", "option", "value", "allowed"),
    [
        ("vicreg", "sim_weight", -1, "numbers >= 0"),
        ("vicreg", "eps", math.nan, "numbers >= 0"),
        ("vicreg", "cov_weight", True, "numbers >= 0"),
        ("vicreg", "std_weight", "a", "numbers >= 0"),
        ("simclr", "temperature", 0, "numbers > 0"),
        ("supcon", "temperature", math.inf, "numbers > 0"),
        ("cross_entropy", "label_smoothing", 1, "numbers from 0 to below 1"),
        ("cross_entropy", "label_smoothing", -0.1, "numbers from 0 to below 1"),
        ("predsim", "beta", 1.1, "numbers from 0 to 1"),
        ("predsim", "beta", True, "numbers from 0 to 1"),
        ("infopro", "reconstruction", -1, "numbers >= 0"),
        ("infopro", "task", None, "numbers >= 0"),
        ("infopro", "contrast", 1, "False, True"),
        ("infopro", "temperature", 0, "numbers > 0"),
        ("infonce", "num_negatives", 0, "whole numbers from 1"),
        ("infonce", "num_negatives", 2.0, "whole numbers from 1"),
        ("infonce", "skip", -1, "whole numbers from 0"),
        ("infonce", "pair", "above", "below, views"),
        ("infonce", "asymmetric", 0, "False, True"),
        ("hinge", "skip", True, "whole numbers from 0"),
        ("hinge", "pair", None, "below, views"),
        ("hinge", "sampling", "none", "both, either"),
        ("lpl", "push", -1, "numbers >= 0"),
        ("lpl", "pull", math.inf, "numbers >= 0"),
        ("lpl", "decorrelation", "10", "numbers >= 0"),
        ("lpl", "eps", 0, "numbers > 0"),
        ("lpl", "positives", "same", "augmented, shuffled"),
    ],
)
def test_options_outside_their_range_are_named(name, option, value, allowed):
    with pytest.raises(UserError, match=f"^{name}: {option} is {value!r}; allowed: {allowed}$"):
        make_objective(name, {option: value})


def test_a_temperature_without_contrast_is_refused():
    make_objective("infopro", {"contrast": True, "temperature": 0.5})
    with pytest.raises(UserError, match="temperature is of the contrastive loss"):
        make_objective("infopro", {"temperature": 0.5})


def test_every_objective_says_what_it_needs():
    for kind in OBJECTIVES.values():
        known = {"vector", "statistics", "predictions", "similarity", "reconstruction"}
        assert set(kind.reads.split(" or ")) <= known
        assert kind.head in HEADS
        assert kind().num_views in (1, 2)
        assert kind.needs_labels in (False, True)
        # declarations of the class, not options
        assert not {"reads", "head", "num_views", "needs_labels"} & {field.name for field in dataclasses.fields(kind)}
