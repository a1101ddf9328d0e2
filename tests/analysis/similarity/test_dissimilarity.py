import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance

from localsim.analysis.similarity import dissimilarity, measure
from localsim.analysis.similarity.dissimilarity import (
    KINDS,
    REPEATED,
    image_count,
    pairs_of,
    rdm,
    square,
    take_pairs,
)
from localsim.analysis.similarity.measure import Numerics
from localsim.errors import UserError

PLAIN = [kind for kind in KINDS if kind not in REPEATED]
FLOAT64 = Numerics(torch.device("cpu"), torch.float64)


def clustered(seed=0, n=24, p=40):
    """A pattern that all share, ten times as large as what differs; clusters of low rank; and a little noise."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(4, 3)) @ rng.normal(size=(3, p))
    return 10 * rng.normal(size=p) + centres[np.arange(n) % 4] + 0.1 * rng.normal(size=(n, p))


def repeated(seed=0, repeats=4, n=12, p=9, signal=1.0):
    """Repeated measurements with noise that is correlated over features and has another size in each."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(p, p)) * np.linspace(0.5, 1.5, p)
    return signal * rng.normal(size=(n, p)) + rng.normal(size=(repeats, n, p)) @ mixing


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("x", [np.random.default_rng(1).normal(size=(20, 7)), clustered()], ids=["random", "clustered"])
def test_it_is_scipys_distance(kind, x):
    truth = distance.squareform(distance.pdist(x, kind))
    wide = rdm(x, kind)
    assert wide.dtype == np.float64
    assert np.abs(wide - truth).max() <= 1e-12 * max(1, truth.max())
    narrow = rdm(x.astype(np.float32), kind)
    assert narrow.dtype == np.float32
    assert np.abs(narrow - truth).max() <= 3e-6 * truth.max()


def test_a_common_pattern_costs_float32_no_digits():
    x = 1000 * np.random.default_rng(0).normal(size=50) + np.random.default_rng(1).normal(size=(20, 50))
    x = x.astype(np.float32).astype(np.float64)
    for kind in PLAIN:
        truth = distance.pdist(x, kind)
        assert distance.squareform(rdm(x, kind, dtype="float32"), checks=False) == pytest.approx(truth, rel=2e-4), kind


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(PLAIN), st.integers(4, 12), st.integers(3, 12), st.integers(0, 999))
def test_kinds_without_repeats_are_distances(kind, n, p, seed):
    x = np.random.default_rng(seed).normal(size=(n, p)).round(1) + 0.01 * np.arange(p)
    d = rdm(x.astype(np.float32), kind)
    assert (d == d.T).all() and (np.diag(d) == 0).all() and (d >= 0).all()
    assert d.max() <= 2 or kind not in ("correlation", "cosine")


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equal_distances_stay_equal(kind, dtype):
    labels = np.eye(7)[np.arange(60) % 7]  # ranks would order 1e-16 of rounding as if it were signal
    values = np.unique(rdm(labels, kind, dtype=dtype))
    assert len(values) == 2 and values[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_columns_may_come_in_chunks_and_from_disk(kind, monkeypatch, tmp_path):
    x = repeated(p=80) if kind in REPEATED else clustered(p=80)
    whole = rdm(x, kind)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.setattr(measure, "CHUNK", 7 * x[..., 0].size)
    monkeypatch.setattr(dissimilarity, "_ROWS", 5)
    chunked = rdm(np.load(tmp_path / "x.npy", mmap_mode="r"), kind)
    assert np.abs(chunked - whole).max() < 1e-10 * np.abs(whole).max()


def loops(x, covariance):
    """Both noise-normalised distances from their definitions."""
    repeats, n, _ = x.shape
    precision = np.linalg.inv(covariance)
    plain, crossed = np.zeros((2, n, n))
    for i in range(n):
        for j in range(n):
            each = x[:, i] - x[:, j]
            plain[i, j] = each.mean(0) @ precision @ each.mean(0)
            crossed[i, j] = np.mean(
                [each[r] @ precision @ each[s] for r in range(repeats) for s in range(repeats) if r != s]
            )
    return plain, crossed


@pytest.mark.parametrize(("n", "p"), [(12, 9), (6, 60)], ids=["more residuals", "more features"])
def test_noise_normalised_kinds_follow_their_definitions(n, p):
    covariances = pytest.importorskip("sklearn.covariance")
    x = repeated(n=n, p=p) + 5
    residuals = (x - x.mean(0)).reshape(-1, p)
    shrunk, _ = covariances.ledoit_wolf(residuals, assume_centered=True)
    plain, crossed = loops(x, shrunk * len(residuals) / (len(residuals) - n))
    assert np.abs(rdm(x, "mahalanobis") - plain).max() < 1e-8 * plain.max()
    assert np.abs(rdm(x, "crossnobis") - crossed).max() < 1e-8 * plain.max()
    assert rdm(x.astype(np.float32), "crossnobis") == pytest.approx(crossed, rel=1e-4, abs=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # rsatoolbox fills with NaN
@pytest.mark.parametrize("kind", ["correlation", "sqeuclidean", "mahalanobis", "crossnobis"])
def test_it_is_rsatoolboxs_distance_up_to_its_factor(kind):
    toolbox = pytest.importorskip("rsatoolbox")
    noise = pytest.importorskip("rsatoolbox.data.noise")
    x = repeated()
    repeats, n, p = x.shape
    labels = {"image": np.tile(np.arange(n), repeats), "fold": np.repeat(np.arange(repeats), n)}
    data = toolbox.data.Dataset(x.reshape(-1, p), obs_descriptors=labels)
    method = "euclidean" if kind == "sqeuclidean" else kind
    extra = {}
    if kind in REPEATED:
        extra["noise"] = noise.prec_from_unbalanced(data, "image", method="shrinkage_eye")
    if kind == "crossnobis":
        extra["cv_descriptor"] = "fold"
    theirs = toolbox.rdm.calc_rdm(data, method=method, descriptor="image", **extra).get_matrices()[0]
    ours = rdm(x if kind in REPEATED else x.mean(0), kind)
    assert np.abs(ours - theirs * (1 if kind == "correlation" else p)).max() < 1e-9 * np.abs(ours).max()


def test_crossnobis_is_about_zero_on_average_where_images_do_not_differ():
    draws = [rdm(repeated(seed, repeats=3, n=20, p=5, signal=0), "crossnobis") for seed in range(100)]
    plain = [rdm(repeated(seed, repeats=3, n=20, p=5, signal=0), "mahalanobis") for seed in range(100)]
    above = np.triu_indices(20, 1)
    means = np.array([draw[above].mean() for draw in draws])
    error = means.std() / np.sqrt(len(means))
    # the noise of the mean of 3 repeats alone gives 2 p / 3; the 0.05 is what estimating its covariance may leave
    assert np.mean(plain) > 2.5
    assert abs(means.mean()) < 4 * error + 0.05
    assert min(draw.min() for draw in draws) < -1


def test_the_noise_covariance_of_the_same_repeats_leaves_crossnobis_a_positive_bias():
    above = np.triu_indices(100, 1)
    shares = []
    for p in (5, 50, 100):
        draws = [np.random.default_rng(seed).normal(size=(4, 100, p)) for seed in range(15)]
        crossed, plain = (np.array([rdm(x, kind)[above].mean() for x in draws]) for kind in REPEATED[::-1])
        shares.append(crossed.mean() / plain.mean())
        if p == 50:
            assert crossed.mean() > 3 * crossed.std() / np.sqrt(len(draws))
    assert shares == sorted(shares)
    assert shares[1:] == pytest.approx([0.04, 0.08], abs=0.02)  # the docstring's


@pytest.mark.parametrize("factor", [1e-100, 1e100])
def test_noise_normalised_kinds_ignore_a_factor_however_large(factor):
    for kind in REPEATED:
        assert rdm(repeated() * factor, kind) == pytest.approx(rdm(repeated(), kind), rel=1e-9)


def test_crossnobis_is_the_distance_without_noise_on_average():
    rng = np.random.default_rng(0)
    repeats, n, p, variance = 4, 30, 5, 4.0
    truth = rng.normal(size=(n, p))
    exact = distance.pdist(truth, "sqeuclidean") / variance
    draws = [truth + variance**0.5 * rng.normal(size=(repeats, n, p)) for _ in range(200)]
    crossed, plain = (
        np.mean([distance.squareform(rdm(x, kind), checks=False) for x in draws], 0) for kind in REPEATED[::-1]
    )
    assert np.mean(crossed) == pytest.approx(np.mean(exact), rel=0.1)
    assert np.mean(plain - crossed) == pytest.approx(2 * p / repeats, rel=0.05)
    assert np.abs(crossed - exact).mean() < 0.2 * np.abs(plain - exact).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_taking_images_is_measuring_those(kind):
    x = repeated() if kind in REPEATED else clustered()
    pairs = pairs_of(x, FLOAT64, kind)
    for images in (torch.tensor([0, 2, 3, 7, 11]), torch.tensor([9, 1, 11, 0, 4, 5])):
        taken = take_pairs(pairs, images)
        assert torch.equal(square(taken), square(pairs)[images][:, images])
        if kind not in REPEATED:  # whose noise covariance stays that of all images
            assert (taken - pairs_of(x[images], FLOAT64, kind)).abs().max() < 1e-10 * pairs.abs().max()


def test_pairs_and_matrix():
    pairs = torch.arange(1.0, 16.0)
    assert image_count(pairs) == 6
    assert np.array_equal(square(pairs).numpy(), distance.squareform(pairs.numpy()))
    assert [image_count(torch.empty(n * (n - 1) // 2)) for n in range(2, 200)] == list(range(2, 200))


def test_tensors_are_not_changed():
    x = torch.from_numpy(clustered())
    before = x.clone()
    for kind in PLAIN:
        assert np.array_equal(rdm(x, kind), rdm(x.numpy(), kind))
    assert torch.equal(x, before)


def with_row(value):
    x = clustered()
    x[5] = value
    return x


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("kind", "x", "message"),
    [
        ("correlation", with_row(0.1), "image 5 has no correlation distance: its features are all equal"),
        ("correlation", with_row(0.0), "image 5 has no correlation distance"),
        ("cosine", with_row(0.0), "image 5 has no cosine distance: its features are all zero"),
        ("correlation", np.arange(12.0).reshape(4, 3) ** 2 * 0 + [0.1, 0.7, 0.2], "constant"),
        ("cosine", np.outer(np.arange(1, 9), [0.1, 0.7, 0.2]), "every cosine distance is 0"),
        ("correlation", np.outer(np.arange(1, 9), [0.1, 0.7, 0.2]) + 3, "every correlation distance is 0"),
        ("euclidean", np.full((5, 3), 0.1), "constant"),
        ("euclidean", np.eye(3), "3 images are too few"),
        ("euclidean", with_row(np.nan), "NaN"),
        ("manhattan", np.eye(5), "unknown kind of RDM 'manhattan'; allowed: correlation"),
        ("euclidean", np.zeros((2, 5, 3)), r"\(n, p\)"),
        ("crossnobis", np.eye(5), r"\(repeats, n, p\)"),
        ("crossnobis", repeated(repeats=1), "2 repeats or more"),
        ("mahalanobis", np.stack([clustered()] * 3), "repeats of every image are equal"),
        ("crossnobis", np.stack([clustered() - np.eye(40)[0], clustered() + np.eye(40)[0]]), "no inverse"),
    ],
)
def test_what_has_no_distances_is_refused(kind, x, message, dtype):
    with pytest.raises(UserError, match=message):
        rdm(x, kind, dtype=dtype)


def test_lists_and_other_bytes_are_what_arrays_are():
    x = clustered()
    for other in (x.tolist(), x.astype(">f8"), torch.from_numpy(x).requires_grad_()):
        assert np.array_equal(rdm(other), rdm(x))
    assert rdm(x, dtype=torch.float32).dtype == rdm(x, dtype=np.float32).dtype == np.float32


def test_overflow_is_refused_in_float32_only():
    with pytest.raises(UserError, match="overflow"):
        rdm(clustered() * 1e30, "euclidean", dtype="float32")
    assert np.isfinite(rdm(clustered() * 1e30, "euclidean")).all()
