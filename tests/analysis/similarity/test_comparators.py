import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import pdist, squareform

from localsim.analysis.similarity.comparators import COMPARATORS, ranks
from localsim.errors import UserError

N = 14


def score(comparator, a, b, dtype=torch.float64):
    chosen = COMPARATORS[comparator]
    return chosen.compare(*(chosen.prepare(torch.as_tensor(pairs, dtype=dtype)) for pairs in (a, b)))


def two_rdms(ties, seed=0, n=N):
    """Related RDMs; with ties, of one digit."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    a, b = (pdist(x + rng.normal(size=x.shape), "sqeuclidean") for _ in range(2))
    return (a.round(), b.round()) if ties else (a, b)


def tau_a(a, b):
    """Concordant less discordant pairs of pairs, of all: from the definition."""
    signs = np.sign(a[:, None] - a) * np.sign(b[:, None] - b)
    return signs.sum() / (len(a) * (len(a) - 1))


def whitened_by_the_dense_matrix(a, b):
    """d' V^-1 d' over pairs, with V the covariance of distances: Diedrichsen et al. 2021."""
    n = squareform(a).shape[0]
    first, second = np.triu_indices(n, 1)
    contrasts = np.eye(n)[first] - np.eye(n)[second]
    inverse = np.linalg.inv((contrasts @ contrasts.T) ** 2)
    return a @ inverse @ b / np.sqrt((a @ inverse @ a) * (b @ inverse @ b))


REFERENCES = {
    "spearman": lambda a, b: stats.spearmanr(a, b)[0],
    "pearson": lambda a, b: stats.pearsonr(a, b)[0],
    "kendall": tau_a,
    "cosine": lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b),
    "whitened_cosine": whitened_by_the_dense_matrix,
    "whitened_pearson": lambda a, b: whitened_by_the_dense_matrix(a - a.mean(), b - b.mean()),
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("comparator", COMPARATORS)
def test_it_is_the_published_formula(comparator, ties):
    for a, b in (two_rdms(ties), two_rdms(ties, 1, n=4)):
        truth = REFERENCES[comparator](a, b)
        assert score(comparator, a, b) == pytest.approx(truth, abs=1e-12)
        assert score(comparator, b, a) == pytest.approx(truth, abs=1e-12)
        assert score(comparator, a, b, torch.float32) == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("ties", [False, True])
def test_it_is_rsatoolboxs(ties):
    compare = pytest.importorskip("rsatoolbox.rdm").compare
    a, b = two_rdms(ties)
    names = {
        "spearman": "spearman",
        "pearson": "corr",
        "kendall": "tau-a",
        "cosine": "cosine",
        "whitened_cosine": "cosine_cov",
        "whitened_pearson": "corr_cov",
    }
    assert set(names) == set(COMPARATORS)
    for ours, theirs in names.items():
        assert score(ours, a, b) == pytest.approx(float(compare(a, b, method=theirs).item()), abs=1e-10), ours


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([-2.5, -1.0, -0.0, 0.0, 1e-30, 1.0, 3.0]), min_size=4, max_size=60), st.booleans())
def test_ranks_are_scipys_average_ranks(values, wide):
    pairs = torch.tensor(values, dtype=torch.float64 if wide else torch.float32)
    truth = stats.rankdata(pairs.numpy())
    truth -= truth.mean()
    if truth.any():
        assert ranks(pairs).numpy() == pytest.approx(truth / np.linalg.norm(truth), abs=1e-12 if wide else 1e-6)


@pytest.mark.slow  # 18 million ranks
def test_ranks_beyond_what_float32_counts():
    m = 2**24 + 2**20  # ranks of the upper million would be rounded to even ones
    values = torch.from_numpy(
        (np.arange(m, dtype=np.int32)[::-1] + 0x3F800000).view(np.float32)
    )  # the floats from 1 on
    truth = torch.arange(m - 1, -1, -1, dtype=torch.float64) - (m - 1) / 2
    found = ranks(values).double() * math.sqrt((m**3 - m) / 12)
    assert float((found - truth).abs().max()) < 0.6  # what float32 leaves of half of 2^24


@pytest.mark.parametrize("comparator", COMPARATORS)
def test_what_is_ignored(comparator):
    a, b = two_rdms(ties=False)
    whole = score(comparator, a, b)
    assert score(comparator, 7 * a, b) == pytest.approx(whole, abs=1e-12)
    moved = score(comparator, a + 50, b)
    if COMPARATORS[comparator].centred:
        assert moved == pytest.approx(whole, abs=1e-12)
    else:
        assert abs(moved - whole) > 1e-3
    assert score(comparator, a, a) == pytest.approx(1, abs=1e-12)
    bent = score(comparator, a**3, b)
    assert (abs(bent - whole) < 1e-12) == (comparator in ("spearman", "kendall"))


@pytest.mark.parametrize("comparator", COMPARATORS)
def test_unrelated_rdms_score_zero_on_average_where_that_is_declared(comparator):
    a, b = two_rdms(ties=False, n=8)
    generator, matrix = np.random.default_rng(0), squareform(b)
    orders = [generator.permutation(8) for _ in range(800)]
    scores = [score(comparator, a, squareform(matrix[order][:, order])) for order in orders]
    error = np.std(scores) / np.sqrt(len(scores))
    assert (abs(np.mean(scores)) < 4 * error) == COMPARATORS[comparator].centred


def test_kendall_counts_ties_against_itself():
    a = np.array([0.0, 0, 1, 1, 1, 1])
    assert score("kendall", a, a) == pytest.approx(8 / 15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("comparator", COMPARATORS)
def test_equal_distances_cannot_be_correlated(comparator, dtype):
    rounding = 1 + torch.finfo(dtype).eps * (torch.arange(10) % 2).to(dtype)
    if COMPARATORS[comparator].centred:
        with pytest.raises(UserError, match=r"equally dissimilar \(distances between 1 and 1\)"):
            score(comparator, rounding, rounding, dtype)
    else:
        assert score(comparator, rounding, rounding, dtype) == pytest.approx(1)
