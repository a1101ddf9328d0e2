"""What may be given as features, how precisely they are read, and images taken wherever a matrix is."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from localsim.analysis.similarity import MEASURES, measure, rdm, similarity
from localsim.analysis.similarity.alignment import Batch
from localsim.analysis.similarity.measure import Numerics, as_features, column_chunks, take_rows, take_square
from localsim.errors import UserError

CKA = MEASURES["cka"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(
    "other",
    [
        np.ndarray.tolist,
        lambda x: x.astype(">f8"),
        np.asfortranarray,
        np.longdouble,
        lambda x: torch.from_numpy(x).requires_grad_(),
        lambda x: torch.from_numpy(x).requires_grad_() * 1,
    ],
    ids=["list", "big-endian", "fortran", "longdouble", "leaf", "in a graph"],
)
@pytest.mark.parametrize("name", ["cka", "rsa", "cca", "predictivity_r"])
def test_features_are_what_they_hold_and_not_how(name, other):
    x, y = normal(20, 5), normal(20, 6, seed=1)
    for pair in ((other(x), y), (x, other(y)), (other(x), other(y))):
        assert MEASURES[name](*pair) == pytest.approx(MEASURES[name](x, y), abs=1e-12)


def test_whole_numbers_and_booleans_are_features():
    x, y = np.random.default_rng(0).integers(0, 9, (20, 5)), normal(20, 6)
    assert CKA(x, y, dtype="float64") == pytest.approx(CKA(x.astype(float), y), abs=1e-12)
    assert CKA(x > 4, y, dtype="float64") == pytest.approx(CKA((x > 4).astype(float), y), abs=1e-12)
    assert CKA(torch.from_numpy(x > 4), y, dtype="float64") == CKA(x > 4, y, dtype="float64")


def test_mapped_features_of_another_byte_order_stay_on_disk(tmp_path):
    x = normal(100, 5)
    np.save(tmp_path / "x.npy", x.astype(">f4"))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert as_features(mapped) is mapped
    assert CKA(mapped, x) == CKA(x.astype(np.float32), x)
    assert Numerics.of(mapped).dtype == torch.float32
    assert Numerics.of(mapped.astype(">f8")).dtype == torch.float64


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (normal(9, 3) + 1j, "dtype complex128 cannot be compared; allowed: real numbers"),
        (torch.from_numpy(normal(9, 3) + 1j), "dtype complex128 cannot be compared; allowed: real numbers"),
        (normal(9, 3).astype(object), "dtype object cannot be compared"),
        ([["a", "b"]] * 9, "dtype <U1 cannot be compared"),
        ([[1.0, 2.0], [3.0]], "features are no array: .*; allowed: arrays, tensors or rows of one length"),
        (3.0, r"features must be \(n, p\)"),
    ],
)
def test_what_is_no_table_of_real_numbers_is_a_sentence(x, sentence):
    for call in (lambda: CKA(x, normal(9, 3)), lambda: CKA(normal(9, 3), x), lambda: rdm(x)):
        with pytest.raises(UserError, match=sentence):
            call()


@pytest.mark.parametrize("kind", [str, lambda name: getattr(torch, name), lambda name: getattr(np, name), np.dtype])
def test_a_dtype_is_a_name_or_a_type(kind):
    for name in ("float32", "float64"):
        assert Numerics.of(normal(4, 2), dtype=kind(name)).dtype == getattr(torch, name)
    with pytest.raises(UserError, match=r"unknown dtype .*; allowed: float32, float64"):
        Numerics.of(normal(4, 2), dtype=kind("float16"))


EVERY = pytest.mark.parametrize(
    "name", ["cka", "cka_rbf", "cka_minibatch", "rsa", "rsa_euclidean_pearson", "procrustes", "cca", "svcca",
             "predictivity", "predictivity_r", "mutual_knn", "mutual_knn_euclidean"],
)  # fmt: skip


@EVERY
@pytest.mark.parametrize(("dtype", "factor"), [("float64", 1e-200), ("float32", 1e-30), ("float32", 1e-60)])
def test_features_too_small_to_square_are_not_called_constant(name, dtype, factor):
    x, y = normal(20, 5), normal(20, 6, seed=1)
    with pytest.raises(UserError, match=f"too small to square in {dtype}; multiply them"):
        MEASURES[name](x * factor, y, dtype=dtype)


def test_one_large_feature_is_enough_and_none_is_constant(monkeypatch):
    x, y = normal(20, 5), normal(20, 6, seed=1)
    monkeypatch.setattr(measure, "CHUNK", 20)  # one feature at a time
    assert np.isfinite(CKA(np.hstack([x * 1e-200, x]), y))
    for dtype in (np.float64, np.uint32):
        with pytest.raises(UserError, match="constant"):
            CKA(np.zeros((20, 3), dtype), y)
    with pytest.raises(UserError, match="too small"):
        list(column_chunks(np.hstack([np.zeros((20, 2)), x * 1e-200]), Numerics.of(x)))


# -- images are numbered on the CPU, wherever what they are taken from is ---------------------------------------------


@pytest.mark.parametrize("take", [take_square, take_rows])
def test_indices_follow_the_matrix_to_its_device(take):
    with FakeTensorMode():
        matrix, images = torch.empty(9, 9, device="cuda"), torch.tensor([4, 0, 7])
        taken = take(matrix, images)
        assert taken.device.type == "cuda" and len(taken) == 3


def test_batches_are_looked_up_where_images_are_numbered():
    state = MEASURES["cka_minibatch"].represent(normal(600, 5), Numerics.of(normal(4, 2)))
    away = tuple(Batch(batch.images, batch.matrix.to("meta")) for batch in state)
    images = torch.arange(0, 600, 7)
    taken, there = (MEASURES["cka_minibatch"].take(batches, images) for batches in (state, away))
    assert len(there) == 2 and all(batch.matrix.is_meta for batch in there)
    assert [batch.matrix.shape for batch in there] == [batch.matrix.shape for batch in taken]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@EVERY
def test_half_samples_are_scored_on_the_gpu(name):
    x, y = normal(40, 5), normal(40, 6, seed=1)
    here, there = (
        similarity(x, y, MEASURES[name], resamples=20, permutations=2, device=device) for device in ("cpu", "cuda")
    )
    assert there.value == pytest.approx(here.value, abs=1e-6)
    np.testing.assert_allclose(there.draws, here.draws, atol=1e-6)
