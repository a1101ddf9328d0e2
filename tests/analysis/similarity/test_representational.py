import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import pdist

from localsim.analysis.similarity.comparators import COMPARATORS
from localsim.analysis.similarity.dissimilarity import KINDS, REPEATED
from localsim.analysis.similarity.measure import INVARIANCES, Numerics
from localsim.analysis.similarity.representational import MEASURES, representational_similarity, rsa
from localsim.errors import UserError

NAMED = {measure.name: measure for measure in MEASURES}


def layers(repeats, seed=0, n=16, p=6, q=8):
    """Two layers that share a part of what they show, with an offset, and noisy repeats where they are asked for."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, 3))
    x, y = (shared @ rng.normal(size=(3, width)) + 0.5 * rng.normal(size=(n, width)) + 1 for width in (p, q))
    if not repeats:
        return x, y
    return tuple(part + 0.6 * rng.normal(size=(3, *part.shape)) * np.linspace(0.5, 2, part.shape[1]) for part in (x, y))


def changed(x, invariance, rng):
    """Features after a map of the named group."""
    p = x.shape[-1]
    match invariance:
        case "translation":
            return x + 3 * rng.normal(size=p)
        case "orthogonal":
            return x @ stats.ortho_group.rvs(p, random_state=rng)
        case "scale":
            return x * float(np.exp(rng.normal()))
        case _:
            return x @ (rng.normal(size=(p, p)) * np.exp(np.linspace(-2, 2, p)))


def test_every_combination_has_a_name():
    assert len(NAMED) == len(MEASURES) == len(KINDS) * len(COMPARATORS) - 2 + 1
    for measure in MEASURES[1:]:
        _, kind, comparator = measure.name.split("_", 2)
        assert kind in KINDS and comparator in COMPARATORS
        assert measure.repeats == (kind in REPEATED)
    x, y = layers(repeats=False)
    assert NAMED["rsa"](x, y) == rsa(x, y) == NAMED["rsa_correlation_spearman"](x, y)


def test_it_is_the_correlation_of_distances():
    x, y = layers(repeats=False)
    truth = stats.spearmanr(pdist(x, "correlation"), pdist(y, "correlation"))[0]
    assert rsa(x, y) == pytest.approx(truth, abs=1e-12)
    truth = stats.pearsonr(pdist(x), pdist(y))[0]
    assert rsa(x, y, rdm="euclidean", comparator="pearson") == pytest.approx(truth, abs=1e-12)


def test_whitened_cosine_of_squared_distances_is_linear_cka():
    x, y = layers(repeats=False)
    x, y = x - x.mean(0), y - y.mean(0)
    cka = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert rsa(x, y, rdm="sqeuclidean", comparator="whitened_cosine") == pytest.approx(cka, abs=1e-12)


@pytest.mark.parametrize("measure", MEASURES, ids=NAMED)
def test_properties_hold(measure):
    for seed in range(3):
        x, y = layers(measure.repeats, seed)
        value = measure(x, y)
        assert measure.low <= value <= measure.high
        assert measure(y, x) == pytest.approx(value, abs=1e-12)
        assert measure(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(value, abs=1e-4)
        assert measure(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(value, abs=1e-12)
        assert measure(x, x) == pytest.approx(1, abs=1e-10)


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 999))
@pytest.mark.parametrize("measure", MEASURES, ids=NAMED)
def test_declared_invariances(measure, seed):
    x, y = layers(measure.repeats, seed)
    rng = np.random.default_rng(seed)
    for invariance in measure.invariances:
        moved = measure(changed(x, invariance, rng), changed(y, invariance, rng))
        assert moved == pytest.approx(measure(x, y), abs=1e-9), invariance


@pytest.mark.parametrize("measure", MEASURES, ids=NAMED)
def test_other_invariances_are_broken(measure):
    x, y = layers(measure.repeats)
    for invariance in set(INVARIANCES) - measure.invariances:
        moved = measure(changed(x, invariance, np.random.default_rng(0)), y)
        assert abs(moved - measure(x, y)) > 1e-3, invariance


def test_a_range_that_starts_at_zero_is_no_accident():
    x, y = layers(repeats=False)
    assert {m.low for m in MEASURES if not m.repeats and m.name.endswith("cosine")} == {0.0}
    noise = layers(repeats=True, n=6)
    below = [
        representational_similarity("crossnobis", "cosine")(*(np.random.default_rng(s + k).normal(size=z.shape)
        for k, z in enumerate(noise))) for s in range(20)
    ]  # fmt: skip
    assert min(below) < 0
    assert rsa(x, y, comparator="cosine") > 0


@pytest.mark.parametrize("measure", MEASURES, ids=NAMED)
def test_taking_images_then_transforming_is_measuring_those(measure):
    x, y = layers(measure.repeats)
    images = torch.tensor([0, 1, 3, 4, 8, 9, 13, 15])
    numerics = Numerics.of(x)
    taken = [measure.transform(measure.take(measure.represent(part, numerics), images)) for part in (x, y)]
    value = measure.compare(*taken)
    assert math.isfinite(value)
    if not measure.repeats:  # whose noise covariance stays that of all images
        assert value == pytest.approx(measure(x[images], y[images]), abs=1e-10)


def test_measures_of_one_kind_share_what_stands_for_a_layer():
    for kind in KINDS:
        assert len({id(m.represent) for m in MEASURES if m.name.startswith(f"rsa_{kind}_")}) == 1


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"rdm": "manhattan"}, "unknown kind of RDM 'manhattan'; allowed: correlation, euclidean"),
        ({"comparator": "rho"}, "unknown comparator of RDMs 'rho'; allowed: spearman, pearson"),
        (
            {"rdm": "euclidean", "comparator": "whitened_cosine"},
            "whitened_cosine compares squared distances, not euclidean ones; allowed: correlation, sqeuclidean, cosine",
        ),
        ({"rdm": "crossnobis"}, r"\(repeats, n, p\)"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_unfit_choices_are_refused(choice, message):
    with pytest.raises(UserError, match=message):
        rsa(*layers(repeats=False), **choice)


def test_unfit_features_are_refused():
    x, y = layers(repeats=False)
    with pytest.raises(UserError, match="16 and 15 images"):
        rsa(x, y[:15])
    with pytest.raises(UserError, match="3 images are too few"):
        rsa(x[:3], y[:3])
    with pytest.raises(UserError, match="equally dissimilar"):
        rsa(x, np.eye(16), rdm="euclidean")
    with pytest.raises(UserError, match="image 2 has no correlation distance"):
        rsa(x, np.where(np.arange(16)[:, None] == 2, 0, y))
