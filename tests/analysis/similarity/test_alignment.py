"""CKA against its published formulas, closed forms, rsatoolbox, and what it declares about itself."""

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform

from localsim.analysis.similarity import kernels
from localsim.analysis.similarity.alignment import MEASURES, cka, cka_measure
from localsim.analysis.similarity.measure import Numerics
from localsim.errors import UserError
from localsim.rng import key

F64 = Numerics(torch.device("cpu"), torch.float64)
VARIANTS: dict[str, dict[str, Any]] = {
    "cka": {},
    "cka_debiased": {"debiased": True},
    "cka_rbf": {"kernel": "rbf"},
    "cka_rbf_debiased": {"kernel": "rbf", "debiased": True},
    "cka_minibatch": {"debiased": True, "batch": 10},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def related(n=40, p=7, q=60, seed=0):
    """Return two layers that are mixtures of common and own causes; images come in clusters."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(5, 4))[rng.integers(5, size=n)] + 0.5 * rng.normal(size=(n, 4))
    mix = [causes @ rng.normal(size=(4, w)) + 0.3 * rng.normal(size=(n, w)) for w in (p, q)]
    return mix[0] + 3, mix[1]


def unrelated(n=40, p=7, q=60, seed=0):
    return normal(n, p, seed=seed), normal(n, q, seed=seed + 500)


layers = pytest.mark.parametrize("layers", [related, unrelated])


def dealt(n, number):
    """Return the images of every batch."""
    order = np.random.default_rng(key(0, "batches", n)).permutation(n)
    return [order[index::number] for index in range(number)]


def cosine(hsic, k, m):
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def hsic0(k, m):
    n = len(k)
    h = np.eye(n) - 1 / n
    return np.trace(k @ h @ m @ h) / (n - 1) ** 2


def hsic1(k, m):
    """Return the unbiased HSIC in matrix form, Song et al. 2012."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    one = np.ones(n)
    middle = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + middle - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))


def hsic_of_quadruples(k, m):
    """Return the unbiased HSIC as the U-statistic it is: a mean over all ordered quadruples of different images."""
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in itertools.permutations(range(len(k)), 4)]
    return np.mean(terms)


def gaussian(x, fraction):
    d = pdist(x)
    return np.exp(-squareform(d**2) / (2 * (fraction * np.sort(d)[(len(d) - 1) // 2]) ** 2))


@layers
def test_linear_cka_is_the_published_formula_in_both_its_forms(layers):
    x, y = layers()
    assert cka(x, y) == pytest.approx(cosine(hsic0, x @ x.T, y @ y.T), abs=1e-10)
    a, b = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    assert cka(x, y) == pytest.approx(norm(b.T @ a) ** 2 / (norm(a.T @ a) * norm(b.T @ b)), abs=1e-10)


@layers
def test_debiased_cka_is_the_published_formula(layers):
    x, y = layers()
    assert cka(x, y, debiased=True) == pytest.approx(cosine(hsic1, x @ x.T, y @ y.T), abs=1e-10)
    x, y = layers(n=7)
    assert cka(x, y, debiased=True) == pytest.approx(cosine(hsic_of_quadruples, x @ x.T, y @ y.T), abs=1e-10)


@layers
@pytest.mark.parametrize("fraction", [None, 0.2])
def test_rbf_cka_is_the_published_formula(layers, fraction):
    x, y = layers()
    k, m = (gaussian(z, fraction or 0.8) for z in (x, y))
    assert cka(x, y, kernel="rbf", fraction=fraction) == pytest.approx(cosine(hsic0, k, m), abs=1e-10)
    debiased = cka(x, y, kernel="rbf", fraction=fraction, debiased=True)
    assert debiased == pytest.approx(cosine(hsic1, k, m), abs=1e-10)


@layers
@pytest.mark.parametrize(("batch", "sizes"), [(10, [10] * 4), (11, [14, 13, 13]), (30, [40]), (100, [40])])
def test_minibatch_cka_averages_the_unbiased_hsic_over_batches(layers, batch, sizes):
    x, y = layers()
    batches = dealt(40, len(sizes))
    assert [len(images) for images in batches] == sizes

    def mean(a, b):
        return np.mean([hsic1(a[i] @ a[i].T, b[i] @ b[i].T) for i in batches])

    value = cka(x, y, debiased=True, batch=batch)
    assert value == pytest.approx(mean(x, y) / np.sqrt(mean(x, x) * mean(y, y)), abs=1e-10)


def test_minibatch_cka_of_images_sorted_by_class_is_that_of_all():
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(20), 20)
    causes = rng.normal(size=(20, 8))[classes]  # all that the layers share
    x, y = (causes @ rng.normal(size=(8, 30)) + 2 * rng.normal(size=(400, 30)) for _ in "xy")
    whole = cka(x, y, debiased=True)
    assert whole > 0.5
    assert cka(x, y, debiased=True, batch=20) == pytest.approx(whole, abs=0.02)


@layers
def test_linear_cka_is_the_whitened_cosine_of_rsatoolbox(layers):
    x, y = layers(n=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rsatoolbox's imports and of its sparse matrices
        data, rdm = pytest.importorskip("rsatoolbox.data"), pytest.importorskip("rsatoolbox.rdm")
        a, b = (rdm.calc_rdm(data.Dataset(z), method="euclidean") for z in (x, y))
        theirs = rdm.compare(a, b, method="cosine_cov").item()
    assert cka(x, y) == pytest.approx(theirs, abs=1e-8)


def test_layers_with_the_same_directions_have_a_closed_form():
    rows = normal(50, 6)
    rows = np.linalg.qr(rows - rows.mean(0))[0]
    s, t = np.arange(1.0, 7), np.array([3.0, 1, 4, 1, 5, 9])
    turned = np.linalg.qr(normal(30, 30, seed=3))[0][:6]
    value = cka(rows * s + 2, (rows * t) @ turned)
    assert value == pytest.approx((s**2 @ t**2) / np.sqrt((s**4).sum() * (t**4).sum()), abs=1e-12)


def test_biased_cka_of_unrelated_layers_grows_with_width_and_debiased_is_zero_on_average():
    biased, debiased, batches = [], [], []
    for seed in range(60):
        x, y = normal(30, 300, seed=seed), normal(30, 300, seed=seed + 1000)
        biased.append(cka(x, y))
        debiased.append(cka(x, y, debiased=True))
        batches.append(cka(x, y, debiased=True, batch=10))
    assert min(biased) > 0.85
    for values in (debiased, batches):
        assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(60)
        assert np.std(values) < 0.2
    assert min(debiased) < 0


@pytest.mark.parametrize("n", [4, 5, 12])
def test_debiased_cka_reaches_minus_one(n):
    # the diagonal does not count, so that a large one makes a Gram matrix of any pattern and of its opposite
    pattern = kernels.u_centre_(torch.from_numpy(np.cov(normal(n, n + 5)))).numpy()
    height = 2 * np.abs(np.linalg.eigvalsh(pattern)).max()
    x, y = (np.linalg.cholesky(sign * pattern + height * np.eye(n)) for sign in (1, -1))
    assert cka(x, y, debiased=True) == pytest.approx(-1, abs=1e-10)


@variants
@layers
def test_identical_and_turned_layers_score_one_and_order_does_not_matter(layers, options):
    x, y = layers()
    turn = np.linalg.qr(normal(7, 7))[0]
    assert cka(x, x, **options) == pytest.approx(1, abs=1e-12)
    assert cka(x, x @ turn * 3 + 1, **options) == pytest.approx(1, abs=1e-10)
    assert cka(x, y, **options) == cka(y, x, **options)
    assert cka(x, y, **options) < 0.99


@variants
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), factor=st.floats(1e-3, 1e3), offset=st.floats(-10, 10))
def test_declared_invariances_hold(options, seed, factor, offset):
    assert cka_measure(**options).invariances == {"translation", "orthogonal", "scale"}
    x, y = related(seed=seed)
    turn = np.linalg.qr(normal(7, 7, seed=seed))[0]
    value = cka(x, y, **options)
    assert cka(x + offset * normal(7, seed=seed), y, **options) == pytest.approx(value, abs=1e-9)
    assert cka(x @ turn, y, **options) == pytest.approx(value, abs=1e-9)
    assert cka(x * factor, y, **options) == pytest.approx(value, abs=1e-9)


@variants
def test_other_linear_maps_change_it(options):
    x, y = related()
    assert abs(cka(x * np.array([10, 1, 1, 1, 1, 1, 1]), y, **options) - cka(x, y, **options)) > 0.01


@variants
@layers
def test_some_of_the_images_are_as_if_only_they_had_been_represented(layers, options):
    x, y = layers(n=60)
    measure = cka_measure(**options)
    images = np.sort(np.random.default_rng(1).permutation(60)[:24])
    a, b = (measure.transform(measure.take(measure.represent(z, F64), torch.from_numpy(images))) for z in (x, y))
    value = measure.compare(a, b)
    if "batch" not in options:
        assert value == pytest.approx(measure(x[images], y[images]), abs=1e-10)
        return
    inside = [np.intersect1d(images, batch) for batch in dealt(60, 6)]
    kept = [i for i in inside if len(i) >= 4]

    def mean(p, q):
        return np.mean([hsic1(p[i] @ p[i].T, q[i] @ q[i].T) for i in kept])

    assert 1 < len(kept) < 6  # batches that are too small are among them
    assert value == pytest.approx(mean(x, y) / np.sqrt(mean(x, x) * mean(y, y)), abs=1e-10)


@layers
def test_batches_of_some_images_in_another_order_are_those_images(layers):
    measure = cka_measure(debiased=True, batch=10)
    state = measure.represent(layers(n=60)[0], F64)
    first, second = (torch.from_numpy(np.random.default_rng(n).permutation(n)[: n - 20]) for n in (60, 40))
    twice = measure.take(measure.take(state, first), second)
    for batch, once in zip(twice, measure.take(state, first[second]), strict=True):
        torch.testing.assert_close(batch.matrix[batch.images.argsort()], once.matrix[once.images.argsort()])
    for batch, part in zip(state, measure.take(state, first), strict=True):
        for i, image in enumerate(part.images):
            for j, other in enumerate(part.images):
                a, b = ((batch.images == first[k]).nonzero().item() for k in (image, other))
                assert part.matrix[i, j] == batch.matrix[a, b]


@variants
@layers
def test_float32_agrees_with_float64(layers, options):
    x, y = layers(n=200, p=50, q=300)
    assert cka(x + 20, y, dtype="float32", **options) == pytest.approx(cka(x + 20, y, **options), abs=1e-5)


def test_float32_still_sees_no_relation_between_very_wide_layers():
    x, y = (normal(40, 20_000, seed=s).astype(np.float32) for s in (0, 1))
    assert cka(x, y, debiased=True) == pytest.approx(cka(x, y, debiased=True, dtype="float64"), abs=1e-4)


@variants
def test_four_images_are_enough_and_three_are_not(options):
    x, y = unrelated(n=4)
    assert -1 <= cka(x, y, **options) <= 1
    with pytest.raises(UserError, match="3 images are too few"):
        cka(x[:3], y[:3], **options)


@variants
def test_what_cannot_be_compared_raises_a_sentence(options):
    x, y = related()
    with pytest.raises(UserError, match="constant"):
        cka(np.ones((40, 3)), y, **options)
    with pytest.raises(UserError, match="40 and 39 images"):
        cka(x, y[:39], **options)
    with pytest.raises(UserError, match="NaN"):
        cka(x, y * np.nan, **options)


@pytest.mark.parametrize("options", [{"debiased": True}, {"debiased": True, "kernel": "rbf"}])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_images_that_are_all_equally_far_from_each_other_have_no_structure(options, dtype):
    with pytest.raises(UserError, match="as far from every other"):
        cka(np.eye(12) * 0.7 + 0.1, normal(12, 3), dtype=dtype, **options)


def test_some_images_may_be_constant_or_without_structure_or_too_few():
    x = np.concatenate([np.full((5, 3), 0.1), normal(15, 3)])
    for debiased in (False, True):
        measure = cka_measure(debiased=debiased)
        with pytest.raises(UserError, match=r"constant|as far"):
            measure.transform(measure.take(measure.represent(x, F64), torch.arange(5)))
    measure = cka_measure(debiased=True, batch=5)
    few = torch.from_numpy(np.concatenate([batch[:2] for batch in dealt(20, 4)]))
    with pytest.raises(UserError, match="no batch has the 4 images"):
        measure.transform(measure.take(measure.represent(x, F64), few))


@pytest.mark.parametrize("options", [{}, {"debiased": True}, {"debiased": True, "batch": 10}])
@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1e-15), ("float64", 1e-100)])
def test_inner_products_too_small_to_square_are_not_called_constant(options, dtype, factor):
    x, y = related()
    with pytest.raises(UserError, match=f"squares of their inner products underflow {dtype}; multiply them"):
        cka(x * factor, y, dtype=dtype, **options)
    assert cka(x * factor, y, dtype=dtype, kernel="rbf") == pytest.approx(cka(x, y, kernel="rbf"), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "poly"}, "unknown kernel 'poly'; allowed: linear, rbf"),
        ({"fraction": 0.5}, "has no meaning with kernel='linear'"),
        ({"kernel": "rbf", "fraction": 0.0}, "fraction=0.0 of the median"),
        ({"kernel": "rbf", "fraction": float("nan")}, "fraction=nan of the median"),
        ({"kernel": "rbf", "debiased": True, "batch": 9}, "goes with kernel='linear' only"),
        ({"batch": 9}, "needs debiased=True"),
        ({"debiased": True, "batch": 3}, "batch=3 images are too few"),
    ],
)
def test_options_that_do_not_go_together_raise(options, message):
    with pytest.raises(UserError, match=message):
        cka(*related(), **options)


def test_too_many_images_point_to_batches(monkeypatch):
    monkeypatch.setattr(kernels, "MATRIX_BYTES", 8 * 20**2)
    x, y = related()
    for kernel in ("linear", "rbf"):
        with pytest.raises(UserError, match=r"40 images need a matrix of .* use cka_minibatch or fewer images"):
            cka(x, y, kernel=kernel)
    assert 0 < cka(x, y, debiased=True, batch=20) < 1


def test_the_registry_has_every_variant_under_its_own_name():
    assert [measure.name for measure in MEASURES] == list(VARIANTS)
    for measure in MEASURES:
        assert (measure.bias == "debiased") == (measure.low == -1)
