"""Shared neighbours against scikit-learn and a loop, chance, and what is declared."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localsim.analysis.similarity import kernels
from localsim.analysis.similarity.measure import Numerics
from localsim.analysis.similarity.neighbours import MEASURES, mutual_knn, mutual_knn_measure
from localsim.errors import UserError

F64 = Numerics(torch.device("cpu"), torch.float64)
ways = pytest.mark.parametrize("nearness", ["cosine", "euclidean"])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def related(n=50, p=6, q=80, seed=0):
    """Return two layers of images in clusters, which they share, with noise of their own."""
    rng = np.random.default_rng(seed)
    causes = 2 * rng.normal(size=(5, 4))[rng.integers(5, size=n)] + rng.normal(size=(n, 4))
    mix = [causes @ rng.normal(size=(4, w)) + 0.5 * rng.normal(size=(n, w)) for w in (p, q)]
    return mix[0] + 0.5, mix[1]


def overlap(x, y, k, nearness):
    """Return the shared neighbours of every image, one image after another."""
    shares = []
    for i in range(len(x)):
        near = []
        for z in (x, y):
            if nearness == "cosine":
                unit = z / np.linalg.norm(z, axis=1, keepdims=True)
                away = -unit @ unit[i]
            else:
                away = np.linalg.norm(z - z[i], axis=1)
            away[i] = np.inf
            near.append(set(np.argsort(away)[:k]))
        shares.append(len(near[0] & near[1]) / k)
    return np.array(shares)


@ways
@pytest.mark.parametrize("k", [1, 10, 48])
@pytest.mark.parametrize("seed", range(2))
def test_it_is_the_mean_share_of_common_neighbours(nearness, k, seed):
    x, y = related(seed=seed)
    shares = overlap(x, y, k, nearness)
    assert mutual_knn(x, y, k=k, nearness=nearness) == pytest.approx(shares.mean(), abs=1e-12)


@ways
def test_neighbours_are_those_of_scikit_learn(nearness):
    sklearn = pytest.importorskip("sklearn.neighbors")
    x, _ = related()
    theirs = sklearn.NearestNeighbors(n_neighbors=7, metric=nearness).fit(x).kneighbors(return_distance=False)
    measure = mutual_knn_measure(k=7, nearness=nearness)
    ours = measure.transform(measure.represent(x, F64)).numpy()
    np.testing.assert_array_equal(np.sort(ours), np.sort(theirs))


@ways
def test_unrelated_layers_are_at_the_chance_level(nearness):
    values = [mutual_knn(normal(60, 8, seed=s), normal(60, 8, seed=s + 99), nearness=nearness) for s in range(40)]
    assert abs(np.mean(values) - 10 / 59) < 4 * np.std(values) / np.sqrt(40)


@ways
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), factor=st.floats(1e-3, 1e3))
def test_declared_invariances_hold(nearness, seed, factor):
    declared = mutual_knn_measure(nearness=nearness).invariances
    assert declared == {"orthogonal", "scale"} | ({"translation"} if nearness == "euclidean" else set())
    x, y = related(seed=seed)
    value = mutual_knn(x, y, nearness=nearness)
    assert mutual_knn(x @ np.linalg.qr(normal(6, 6, seed=seed))[0], y, nearness=nearness) == value
    assert mutual_knn(x * factor, y, nearness=nearness) == value
    assert mutual_knn(y, x, nearness=nearness) == value
    assert mutual_knn(x, x, nearness=nearness) == 1
    if "translation" in declared:
        assert mutual_knn(x + normal(6, seed=seed), y, nearness=nearness) == value


def test_what_is_not_declared_changes_it():
    x, y = related()
    assert abs(mutual_knn(x + 5, y) - mutual_knn(x, y)) > 0.01
    for nearness in ("cosine", "euclidean"):
        stretched = mutual_knn(x * [20, 1, 1, 1, 1, 1], y, nearness=nearness)
        assert abs(stretched - mutual_knn(x, y, nearness=nearness)) > 0.01


@ways
def test_some_of_the_images_are_as_if_only_they_had_been_represented(nearness):
    x, y = related(n=80)
    images = np.sort(np.random.default_rng(1).permutation(80)[:40])
    measure = mutual_knn_measure(nearness=nearness)
    a, b = (measure.transform(measure.take(measure.represent(z, F64), torch.from_numpy(images))) for z in (x, y))
    assert measure.compare(a, b) == measure(x[images], y[images])


@ways
def test_float32_agrees_with_float64(nearness):
    x, y = related(n=200)
    single = mutual_knn(x, y, nearness=nearness, dtype="float32")
    assert single == pytest.approx(mutual_knn(x, y, nearness=nearness), abs=1e-3)  # one neighbour of 2000 is 0.0005


def test_neighbours_do_not_change_what_stands_for_the_layer():
    measure = mutual_knn_measure()
    state = measure.represent(related()[0], F64)
    before = state.clone()
    measure.transform(state)
    assert torch.equal(state, before)


def test_what_cannot_be_compared_raises_a_sentence(monkeypatch):
    x, y = related()
    with pytest.raises(UserError, match=r"k=10 neighbours of n = 11 images are all there are; allowed: k up to 9"):
        mutual_knn(x[:11], y[:11])
    assert 0 <= mutual_knn(x[:12], y[:12]) <= 1
    with pytest.raises(UserError, match="k=0 neighbours"):
        mutual_knn(x, y, k=0)
    with pytest.raises(UserError, match="unknown nearness 'l1'; allowed: cosine, euclidean"):
        mutual_knn(x, y, nearness="l1")
    with pytest.raises(UserError, match="constant"):
        mutual_knn(np.ones((50, 3)), y)
    with pytest.raises(UserError, match="NaN"):
        mutual_knn(x, y * np.nan)
    with pytest.raises(UserError, match="3 images are too few"):
        mutual_knn(x[:3], y[:3], k=1)
    x[7] = 0
    with pytest.raises(UserError, match="features of image 7 are all 0"):
        mutual_knn(x, y)
    assert mutual_knn(x, y, nearness="euclidean") > 0.2
    monkeypatch.setattr(kernels, "MATRIX_BYTES", 8 * 20**2)
    with pytest.raises(UserError, match="allowed: 20 images or fewer"):
        mutual_knn(x, y)


def test_both_are_in_the_registry_and_are_resampled_with_neighbours_found_anew():
    assert all(measure.terms is None for measure in MEASURES)
    assert [measure.name for measure in MEASURES] == ["mutual_knn", "mutual_knn_euclidean"]
