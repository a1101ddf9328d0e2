"""InfoNCE and hinge against numpy loops with the same draws, and what an asymmetric predictor must leave unchanged."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from localsim.errors import UserError
from localsim.rules.objectives import make_objective
from localsim.rules.objectives.common import derangement

NUM, DIM, ROWS, COLS = 5, 3, 6, 2
STEPS = 3


def embedding(num_tensors: int, seed: int = 0, rows: int = ROWS) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(0.8 * rng.normal(size=(NUM, DIM, rows, COLS)) for _ in range(num_tensors))


def loss_of(name, embeddings, seed=7, **options) -> float:
    torch.manual_seed(seed)
    tensors = tuple(tuple(torch.tensor(x) for x in z) for z in embeddings)
    return make_objective(name, options)(tensors, None).item()


def cyclic(num):
    """The other image of each image, by the same draw: a shuffled ring."""
    ring = torch.randperm(num).tolist()
    return {image: ring[i - 1] for i, image in enumerate(ring)}


def places(embeddings, skip, pair, asymmetric):
    """For every view and step: lists of (image, target row, column, target vector) and the predictions there."""
    for view, z in enumerate(embeddings):
        num_steps = (len(z) - 1) // (2 if asymmetric else 1)
        yield [
            [
                (
                    embeddings[1 - view][0] if pair == "views" else z[0],
                    z[1 + k + side * num_steps],
                    0 if pair == "views" else k + 1 + skip,
                )
                for side in range(2 if asymmetric else 1)
            ]
            for k in range(num_steps)
        ]


def numpy_infonce(embeddings, num_negatives=16, skip=1, pair="below", asymmetric=False, seed=7):
    torch.manual_seed(seed)
    losses = []
    for steps in places(embeddings, skip, pair, asymmetric):
        for sides in steps:
            rows = sides[0][0].shape[2] - sides[0][2]
            index = [(b, r, c) for b in range(NUM) for r in range(rows) for c in range(COLS)]
            drawn = torch.randint(len(index), (len(index), num_negatives)).tolist()
            total = 0.0
            for z, p, down in sides:
                for (b, r, c), negatives in zip(index, drawn, strict=True):
                    prediction = p[b, :, r, c]
                    positive = math.exp(z[b, :, r + down, c] @ prediction)
                    others = [index[j] for j in negatives]
                    negative = sum(math.exp(z[b2, :, r2 + down, c2] @ prediction) for b2, r2, c2 in others)
                    total -= math.log(positive / (positive + negative)) / len(index)
            losses.append(total)
    return np.mean(losses)


def numpy_hinge(embeddings, skip=1, pair="below", sampling="both", asymmetric=False, seed=7):
    torch.manual_seed(seed)
    losses = []
    for steps in places(embeddings, skip, pair, asymmetric):
        other = cyclic(NUM)
        attracted = repelled = list(range(NUM))
        if sampling == "either":
            coin = torch.rand(NUM, dtype=torch.float32).tolist()
            attracted = [b for b in range(NUM) if coin[b] < 0.5]
            repelled = [b for b in range(NUM) if coin[b] >= 0.5]
        for sides in steps:
            total = 0.0
            for z, p, down in sides:
                where = [(r, c) for r in range(z.shape[2] - down) for c in range(COLS)]
                for images, sign, source in ((attracted, -1, lambda b: b), (repelled, 1, other.__getitem__)):
                    for b in images:
                        for r, c in where:
                            u = z[source(b), :, r + down, c] @ p[b, :, r, c]
                            total += max(0.0, 1 + sign * u) / len(where) / len(images)
            losses.append(total)
    return np.mean(losses)


NUMPY = {"infonce": numpy_infonce, "hinge": numpy_hinge}
OPTIONS = [
    ("infonce", {}),
    ("infonce", {"num_negatives": 3, "skip": 0}),
    ("infonce", {"asymmetric": True}),
    ("hinge", {}),
    ("hinge", {"skip": 2}),
    ("hinge", {"asymmetric": True}),
    ("hinge", {"sampling": "either"}),
    ("hinge", {"sampling": "either", "asymmetric": True, "skip": 0}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("num_views", [1, 2])
def test_pairs_below_equal_numpy(name, options, num_views):
    embeddings = [embedding(1 + STEPS * (1 + options.get("asymmetric", False)), seed=v) for v in range(num_views)]
    np.testing.assert_allclose(loss_of(name, embeddings, **options), NUMPY[name](embeddings, **options), rtol=1e-12)


@pytest.mark.parametrize(("name", "options"), [o for o in OPTIONS if "skip" not in o[1]])
@pytest.mark.parametrize("rows", [1, 3])
def test_pairs_of_views_equal_numpy(name, options, rows):
    options = {**options, "pair": "views"}
    embeddings = [embedding(3 if options.get("asymmetric") else 2, seed=v, rows=rows) for v in range(2)]
    np.testing.assert_allclose(loss_of(name, embeddings, **options), NUMPY[name](embeddings, **options), rtol=1e-12)


@pytest.mark.parametrize(("name", "options"), [("infonce", {}), ("hinge", {}), ("hinge", {"sampling": "either"})])
def test_asymmetric_predictors_of_equal_weights_have_the_gradient_of_the_symmetric_one(name, options):
    """f(z, W sg(c)) + f(sg(z), W c): the first moves the targets, the second the context, together as f(z, W c)."""
    z = torch.tensor(embedding(1)[0])
    w1, w2 = torch.randn(2, DIM, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gradient(asymmetric: bool):
        x = z.clone().requires_grad_()
        weights = [w.clone().requires_grad_() for w in (w1, w2)]
        p = [torch.einsum("ij,njrc->nirc", w, x.detach() if asymmetric else x) for w in weights]
        q = [torch.einsum("ij,njrc->nirc", w, x) for w in (w1, w2)] if asymmetric else []
        torch.manual_seed(1)
        loss = make_objective(name, {**options, "asymmetric": asymmetric})(((x, *p, *q),), None)
        return torch.autograd.grad(loss, [x, *weights])

    for a, b in zip(gradient(True), gradient(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), [("infonce", {}), ("hinge", {}), ("hinge", {"sampling": "either"})])
def test_asymmetric_context_losses_leave_the_targets_alone(name, options):
    z = torch.tensor(embedding(1)[0], requires_grad=True)
    p, q = (torch.tensor(x, requires_grad=True) for x in embedding(2, seed=1))
    loss = make_objective(name, {**options, "asymmetric": True})
    for scale in (0.0, 1.0):  # with p = 0 no gradient reaches z: q's loss holds it constant
        torch.manual_seed(0)
        grad = torch.autograd.grad(loss(((z, scale * p, q),), None), z)[0]
        assert grad.any() == bool(scale)


@pytest.mark.parametrize("num", [2, 3, 8])
def test_derangements_leave_no_image_in_place_and_reach_every_other_one(num):
    torch.manual_seed(0)
    counts = np.zeros((num, num))
    for _ in range(700):
        other = derangement(num, torch.device("cpu")).numpy()
        assert sorted(other) == list(range(num))
        counts[np.arange(num), other] += 1
    assert not counts.diagonal().any()
    expected = 700 / (num - 1)
    off = counts[~np.eye(num, dtype=bool)]
    assert np.abs(off - expected).max() <= 5 * math.sqrt(expected)


def test_the_hinge_negative_is_the_same_place_of_another_image():
    """One image's place alone is one-hot: only predictions at that place, of the image it is a negative for, see it."""
    z = np.zeros((NUM, DIM, ROWS, COLS))
    z[2, 0, 4, 1] = 1.0
    p = torch.zeros(NUM, DIM, ROWS, COLS, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    grad = torch.autograd.grad(make_objective("hinge")(((torch.tensor(z), p),), None), p)[0]
    torch.manual_seed(3)
    seer = next(image for image, other in cyclic(NUM).items() if other == 2)
    assert seer != 2
    assert sorted(map(tuple, grad.nonzero().tolist())) == sorted([(2, 0, 2, 1), (seer, 0, 2, 1)])
    assert grad[2, 0, 2, 1] == -grad[seer, 0, 2, 1] == -1 / (NUM * (ROWS - 2) * COLS)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_chance_level_is_reached_by_predictions_that_say_nothing_and_not_undercut(name, options):
    num_tensors = 1 + STEPS * (1 + options.get("asymmetric", False))
    chance = make_objective(name, options).chance_level(DIM, NUM)
    assert chance is not None
    losses = {}
    for scale in (1e-3, 1.5):
        unrelated = [
            [tuple(scale * x for x in embedding(num_tensors, seed=s))] for s in range(200 if name == "hinge" else 20)
        ]
        losses[scale] = [loss_of(name, embeddings, seed=s, **options) for s, embeddings in enumerate(unrelated)]
    error = np.std(losses[1e-3]) / math.sqrt(len(losses[1e-3]))
    assert abs(np.mean(losses[1e-3]) - chance) < max(1e-4, 4 * error)
    assert np.mean(losses[1.5]) > chance


@pytest.mark.parametrize("name", ["infonce", "hinge"])
def test_embeddings_that_do_not_fit_are_named(name):
    with pytest.raises(UserError, match=f"{name}: step 3 with skip 3 looks 6 rows down, but there are 6 rows"):
        loss_of(name, [embedding(4)], skip=3)
    loss_of(name, [embedding(4)], skip=2)
    with pytest.raises(UserError, match=f"{name} with pair 'views' compares exactly 2 views, not 1"):
        loss_of(name, [embedding(2)], pair="views")
    with pytest.raises(UserError, match=f"{name}: pair 'views' has 1 step, not 2"):
        loss_of(name, [embedding(3)] * 2, pair="views")
    with pytest.raises(UserError, match=f"{name}: skip counts rows below"):
        make_objective(name, {"pair": "views", "skip": 0})
    with pytest.raises(UserError, match=f"{name} reads predictions in pairs"):
        loss_of(name, [embedding(4)], asymmetric=True)
    for wrong in ((torch.zeros(2, 3),), ((torch.zeros(2, 3, 1, 1),),)):
        with pytest.raises(UserError, match=f"{name} reads targets and predictions"):
            make_objective(name)(wrong, None)


def test_a_single_image_has_no_negative():
    with pytest.raises(UserError, match="a batch of 1 has no other image"):
        make_objective("hinge")(((torch.zeros(1, 2, 4, 1), torch.zeros(1, 2, 4, 1)),), None)
