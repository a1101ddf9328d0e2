"""Gram matrices and coordinates: by chunks, centred, within memory, and against numpy written out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist, squareform

from localsim.analysis.similarity import kernels, measure
from localsim.analysis.similarity.measure import Numerics
from localsim.errors import UserError

F64 = Numerics(torch.device("cpu"), torch.float64)
F32 = Numerics(torch.device("cpu"), torch.float32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def centring(n):
    return np.eye(n) - 1 / n


def u_centred(matrix):
    """Return the U-centred matrix, entry by entry as Szekely & Rizzo 2014 define it."""
    n = len(matrix)
    made = np.zeros((n, n))
    a = matrix - np.diag(np.diag(matrix))
    for i in range(n):
        for j in range(n):
            if i != j:
                made[i, j] = a[i, j] - a[i].sum() / (n - 2) - a[:, j].sum() / (n - 2) + a.sum() / ((n - 1) * (n - 2))
    return made


@pytest.mark.parametrize("chunk", [measure.CHUNK, 100, 1])
@pytest.mark.parametrize("block", [kernels.BLOCK, 7])
def test_gram_is_that_of_centred_features_whatever_the_chunks(monkeypatch, chunk, block):
    monkeypatch.setattr(measure, "CHUNK", chunk)
    monkeypatch.setattr(kernels, "BLOCK", block)
    x = normal(30, 11) + 5
    matrix = kernels.gram(x, F64).numpy()
    np.testing.assert_allclose(matrix, centring(30) @ x @ x.T @ centring(30), atol=1e-11)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-13)
    np.testing.assert_allclose(kernels.gram(x, F64, centre=False).numpy(), x @ x.T, rtol=1e-12)


def test_a_large_mean_costs_no_precision_in_float32():
    x = normal(40, 9)
    offset = (x + 1000).astype(np.float32)
    exact = kernels.gram(offset.astype(np.float64), F64)
    assert (kernels.gram(offset, F32).double() - exact).abs().max() < 1e-5 * exact.abs().max()


def test_batches_are_blocks_of_the_gram_matrix():
    x = normal(11, 5)
    whole = kernels.gram(x, F64)
    batches = [torch.tensor([9, 0, 4, 1]), torch.tensor([2, 3, 5, 6, 7, 8, 10])]
    for made, part in zip(kernels.grams(x, F64, batches), batches, strict=True):
        torch.testing.assert_close(made, whole[part][:, part])


def test_squared_distances_are_those_of_scipy():
    x = normal(20, 6) + 3
    made = kernels.squared_distances_(kernels.gram(x, F64)).numpy()
    np.testing.assert_allclose(made, squareform(pdist(x, "sqeuclidean")), atol=1e-12)


@pytest.mark.parametrize("n", [9, 10])  # 36 and 45 pairs
def test_the_width_of_the_rbf_kernel_is_a_fraction_of_the_lower_median_distance(n):
    distances = pdist(normal(n, 3))
    median = np.sort(distances)[(len(distances) - 1) // 2]
    made = kernels.rbf(torch.from_numpy(squareform(distances**2)), 0.4)
    np.testing.assert_allclose(made, np.exp(-squareform(distances**2) / (2 * (0.4 * median) ** 2)), rtol=1e-12)


def test_rbf_has_no_width_where_most_images_look_the_same():
    x = np.zeros((8, 3))
    x[0] = 1
    with pytest.raises(UserError, match="the median distance, would be 0"):
        kernels.rbf(kernels.squared_distances_(kernels.gram(x, F64)), 0.5)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(4, 12), seed=st.integers(0, 1000))
def test_centring_and_u_centring_in_place_are_those_written_out(n, seed):
    x = normal(n, 5, seed=seed)
    made = kernels.centre_(torch.from_numpy(x @ x.T)).numpy()
    np.testing.assert_allclose(made, centring(n) @ x @ x.T @ centring(n), atol=1e-11)
    made = kernels.u_centre_(torch.from_numpy(x @ x.T)).numpy()
    np.testing.assert_allclose(made, u_centred(x @ x.T), atol=1e-11)
    np.testing.assert_allclose(made.sum(0), 0, atol=1e-11)


def test_u_centring_of_equal_distances_leaves_exactly_nothing():
    assert not kernels.u_centre_(kernels.gram(np.eye(9) + 0.3, F64)).any()
    assert not kernels.u_centre_(kernels.gram(np.eye(9, dtype=np.float32) + np.float32(0.3), F32)).any()


@settings(deadline=None, max_examples=30)
@given(n=st.integers(4, 12), seed=st.integers(0, 1000))
def test_hsic_without_centring_equals_hsic_of_centred_matrices(n, seed):
    a, b = (normal(n, 4, seed=seed + k) for k in (0, 1001))
    k, m = a @ a.T, b @ b.T
    h = centring(n)
    biased = kernels.hsic(*(kernels.Kernel.of(torch.from_numpy(z)) for z in (k, m)), debiased=False)
    assert biased == pytest.approx(np.trace(k @ h @ m @ h) / (n - 1) ** 2, abs=1e-10)
    hollow = (z - np.diag(np.diag(z)) for z in (k, m))
    unbiased = kernels.hsic(*(kernels.Kernel.of(torch.from_numpy(z)) for z in hollow), debiased=True)
    assert unbiased == pytest.approx((u_centred(k) * u_centred(m)).sum() / (n * (n - 3)), abs=1e-10)


def test_sums_of_many_float32_products_stay_exact(monkeypatch):
    a, b = (torch.from_numpy(np.abs(normal(2000, 1000, seed=s)).astype(np.float32)) for s in (0, 1))
    exact = float((a.double() * b.double()).sum())
    assert kernels.dot(a, b) == pytest.approx(exact, rel=1e-7)
    monkeypatch.setattr(kernels, "ENTRIES", 1)
    assert kernels.dot(a, b) == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("p", [3, 12, 13, 40])
def test_coordinates_have_the_inner_products_of_the_centred_features(p):
    x = normal(12, p) + 2
    made = kernels.coordinates(x, F64)
    assert made.shape == (12, p if p <= 12 else 11)
    torch.testing.assert_close(made @ made.T, kernels.gram(x, F64), atol=1e-11, rtol=0)


def test_coordinates_of_a_wide_low_rank_layer_are_few():
    x = normal(20, 3) @ normal(3, 50, seed=1)
    assert kernels.coordinates(x, F64).shape == (20, 3)


def test_more_images_than_memory_is_meant_for(monkeypatch):
    with pytest.raises(UserError, match=r"30000 images need a matrix of 3\.6 GB per layer; allowed: 23170 images or"):
        kernels.room(30_000, F32)
    kernels.room(20_000, F32)
    with pytest.raises(UserError, match="allowed: 16384 images"):
        kernels.room(20_000, F64)
    monkeypatch.setattr(kernels, "MATRIX_BYTES", 8 * 10**2)
    with pytest.raises(UserError, match="allowed: 10 images"):
        kernels.coordinates(normal(11, 12), F64)


@pytest.mark.parametrize("make", [kernels.gram, kernels.coordinates])
def test_features_that_cannot_be_compared_raise_a_sentence(make):
    with pytest.raises(UserError, match="constant"):
        make(np.full((5, 3), 0.1), F32)
    with pytest.raises(UserError, match="constant"):
        make(np.full((5, 9), 0.1), F32)
    with pytest.raises(UserError, match="NaN"):
        make(np.where(np.eye(5) > 0, np.nan, 1.0), F64)
    with pytest.raises(UserError, match="overflow float32"):
        make(normal(5, 3) * 1e30, F32)


def test_centred_coordinates_of_some_images_may_be_constant():
    with pytest.raises(UserError, match="constant"):
        kernels.centred(torch.ones(4, 2))


def test_only_rounding_is_clamped():
    assert kernels.within(1 + 1e-7, 0, 1) == 1
    assert kernels.within(-1e-7, 0, 1) == 0
    assert kernels.within(0.5, 0, 1) == 0.5
    assert kernels.within(1.1, 0, 1) == 1.1


def test_features_on_disk_and_read_only_arrays_are_read_and_left_alone(tmp_path):
    x = normal(10, 6)
    np.save(tmp_path / "x.npy", x)
    torch.testing.assert_close(kernels.gram(np.load(tmp_path / "x.npy", mmap_mode="r"), F64), kernels.gram(x, F64))
    tensor = torch.from_numpy(x.copy())
    kernels.gram(tensor, F64)
    kernels.coordinates(tensor, F64)
    np.testing.assert_array_equal(tensor.numpy(), x)
