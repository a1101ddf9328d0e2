"""Half-samples, their intervals' coverage, why images are not drawn with replacement, and p values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localsim.analysis.similarity import get_measure, similarity
from localsim.analysis.statistics import centred_interval, half_samples, p_value, resample, shuffles
from localsim.errors import UserError


@settings(deadline=None, max_examples=25)
@given(n=st.integers(8, 60), seed=st.integers(0, 99))
def test_halves_come_in_pairs_that_share_no_image(n, seed):
    halves = list(half_samples(n, 20, seed))
    assert len(halves) == 20
    for one, other in zip(halves[::2], halves[1::2], strict=True):
        assert len(one) == len(other) == n // 2
        assert not set(one) & set(other) and set(one) | set(other) <= set(range(n))
        assert list(one) == sorted(set(one)) and list(other) == sorted(set(other))
    if n % 2 == 0:
        assert set(np.bincount(np.concatenate(halves), minlength=n)) == {10}


def test_draws_depend_on_seed_number_and_purpose_only():
    def drawn(of, *arguments):
        return [indices.tolist() for indices in of(*arguments)]

    for of in (half_samples, resample, shuffles):
        assert drawn(of, 12, 24, 3) == drawn(of, 12, 30, 3)[:24], "more draws leave the first as they were"
        assert drawn(of, 12, 24, 3) != drawn(of, 12, 24, 4)
        assert len({tuple(indices) for indices in drawn(of, 30, 24, 0)}) == 24
    assert all(sorted(order) == list(range(12)) for order in drawn(shuffles, 12, 5, 0))
    repeated = np.array(drawn(resample, 50, 100, 0))
    assert np.mean([len(set(indices)) for indices in repeated]) == pytest.approx(50 * (1 - np.exp(-1)), rel=0.03)


@pytest.mark.parametrize(
    ("n", "resamples", "sentence"),
    [(7, 20, "an interval over 7 images is not possible; allowed: 8 images or more"),
     (8, 19, "19 resamples are too few for an interval; allowed: 0 .none., or 20 or more")],
)  # fmt: skip
def test_too_little_for_an_interval_is_a_sentence(n, resamples, sentence):
    with pytest.raises(UserError, match=sentence):
        next(half_samples(n, resamples, 0))
    with pytest.raises(UserError, match=r"-1 permutations are not possible; allowed: 0 .none., or more"):
        next(shuffles(9, -1, 0))


def test_the_interval_lies_around_the_estimate_whatever_the_draws_are_biased_by():
    draws = np.random.default_rng(0).normal(size=4001)
    low, high = centred_interval(0.5, draws)
    assert (low, high) == pytest.approx((0.5 - 1.96, 0.5 + 1.96), abs=0.1)
    assert centred_interval(0.5, draws + 7) == pytest.approx((low, high), abs=1e-12)
    assert centred_interval(0.5, np.full(20, 0.3)) == pytest.approx((0.5, 0.5))


def test_p_values_count_the_score_itself():
    null = [0.0, 0.1, 0.2, 0.3]
    assert p_value(0.9, null) == 1 / 5
    assert p_value(0.2, null) == 3 / 5, "a chance score as large as the score counts"
    assert p_value(-1, null) == 1
    assert p_value(0.05, null, larger=False) == 2 / 5
    assert p_value(-1, null, larger=False) == 1 / 5


def test_p_values_of_unrelated_scores_are_as_rare_as_they_say():
    scores = np.random.default_rng(1).normal(size=(2000, 20))
    ps = np.array([p_value(one[0], one[1:]) for one in scores])
    for level in (0.05, 0.25, 0.5):
        assert np.mean(ps <= level) == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 2000))


MIX = [np.random.default_rng(9).normal(size=(4, width)) for width in (10, 14)]


def layers(n, seed):
    """Return two layers that see four common causes, each under noise of its own."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(n, 4))
    return [causes @ mix + sd * rng.normal(size=(n, mix.shape[1])) for mix, sd in zip(MIX, (2, 3), strict=True)]


def population_cka():
    """Return linear CKA of the two layers for infinitely many images: the cosine of covariances."""
    covariances = [mix.T @ mix + sd**2 * np.eye(mix.shape[1]) for mix, sd in zip(MIX, (2, 3), strict=True)]
    norms = np.prod([np.linalg.norm(covariance) for covariance in covariances])
    return np.linalg.norm(MIX[0].T @ MIX[1]) ** 2 / norms


def test_the_interval_of_debiased_cka_covers_the_population_value():
    measure, truth = get_measure("cka_debiased"), population_cka()
    assert measure(*layers(3000, 10**6)) == pytest.approx(truth, abs=0.02), "the truth is the truth"
    scores = [similarity(*layers(80, seed), measure, resamples=40) for seed in range(200)]
    covered = np.mean([score.low <= truth <= score.high for score in scores])  # pyright: ignore[reportOptionalOperand]
    assert 0.88 <= covered <= 0.99
    spread = np.std([score.value for score in scores])
    assert np.mean([score.draws.std() for score in scores]) == pytest.approx(spread, rel=0.25)
    biased = [similarity(*layers(80, seed), get_measure("cka"), resamples=0).value for seed in range(40)]
    assert np.mean(biased) - truth > 0.04, "of a biased measure no interval could"


def test_the_interval_of_rsa_covers_the_value_of_many_images():
    measure = get_measure("rsa")
    truth = np.mean([measure(*layers(500, 10**6 + seed)) for seed in range(6)])
    scores = [similarity(*layers(60, seed), measure, resamples=20) for seed in range(100)]
    covered = np.mean([score.low <= truth <= score.high for score in scores])  # pyright: ignore[reportOptionalOperand]
    assert 0.82 <= covered <= 0.99, "20 draws give the tails of an interval roughly"


@pytest.mark.parametrize(("name", "least"), [("cka_debiased", 0.5), ("rsa_sqeuclidean_pearson", 0.4), ("rsa", 0.03)])
def test_images_drawn_with_replacement_make_unrelated_layers_alike_and_halves_do_not(name, least):
    measure = get_measure(name)
    values, bootstrapped, halved = [], [], []
    for seed in range(12):
        x, y = np.random.default_rng(seed).normal(size=(2, 40, 100))
        values.append(measure(x, y))
        bootstrapped.append(np.mean([measure(x[images], y[images]) for images in resample(40, 20, seed)]))
        halved.append(np.mean([measure(x[images], y[images]) for images in half_samples(40, 20, seed)]))
    error = np.std(values) / np.sqrt(12)
    assert abs(np.mean(values)) < 4 * error
    assert np.mean(halved) == pytest.approx(np.mean(values), abs=0.02)
    assert np.mean(bootstrapped) - np.mean(values) > max(least, 5 * np.std(np.subtract(bootstrapped, values)) / 12**0.5)


def test_halves_of_predictivity_do_not_matter_but_its_fits_are_held():
    """Its interval is over the images that are predicted: narrower than the spread of new experiments."""
    measure = get_measure("predictivity")
    scores = [similarity(*layers(80, seed), measure, resamples=40) for seed in range(60)]
    spread = np.std([score.value for score in scores])
    assert 0.4 * spread < np.mean([score.draws.std() for score in scores]) < spread


def test_draws_are_indices_that_torch_takes():
    for images in (*half_samples(9, 20, 0), *shuffles(9, 2, 0), *resample(9, 2, 0)):
        assert torch.arange(9)[torch.from_numpy(images)].tolist() == images.tolist()
