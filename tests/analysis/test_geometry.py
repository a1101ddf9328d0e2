"""The geometry of features: closed forms, invariances, loops written out, and intervals that cover."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from localsim.analysis import separability
from localsim.analysis.geometry import (
    alignment,
    class_separability,
    cvpca,
    describe,
    effective_rank,
    nearest_class_mean_accuracy,
    participation_ratio,
    power_law,
    shared_variance,
    spectrum,
    spectrum_slope,
    uniformity,
)
from localsim.errors import UserError


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def with_spectrum(eigenvalues, n, *, seed=0):
    """Return features (n, d) whose covariance has exactly these eigenvalues, turned at random."""
    d = len(eigenvalues)
    rows = normal(n, d, seed=seed)
    rows = np.linalg.qr(rows - rows.mean(0))[0] * np.sqrt(n - 1)
    return rows * np.sqrt(eigenvalues) @ np.linalg.qr(normal(d, d, seed=seed + 1))[0] + 3


def three_classes(per=10, d=6, spread=1.0, seed=0):
    y = np.repeat([4, 0, 7], per)
    return 3 * normal(8, d, seed=seed)[y] + spread * normal(3 * per, d, seed=seed + 1), y


# -- spectrum ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(4, 12), st.integers(1, 12), st.integers(0, 99))
def test_the_spectrum_is_that_of_the_covariance(n, d, seed):
    x = normal(n, d, seed=seed) + 3
    values = np.linalg.eigvalsh(np.cov(x.T, ddof=1).reshape(d, d))[::-1][: min(n - 1, d)]
    np.testing.assert_allclose(spectrum(x), values, rtol=1e-8, atol=1e-12)
    assert participation_ratio(x) == pytest.approx(values.sum() ** 2 / np.square(values).sum(), rel=1e-9)
    assert 1 <= participation_ratio(x) + 1e-9 <= min(n - 1, d) + 1e-6
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)[: min(n - 1, d)]
    assert effective_rank(x) == pytest.approx(np.exp(stats.entropy(singular)), rel=1e-6)
    assert participation_ratio(x) <= effective_rank(x) + 1e-9 <= min(n - 1, d) + 1e-6


def test_known_spectra():
    axes = np.concatenate([np.eye(5), -np.eye(5)])
    assert participation_ratio(axes) == pytest.approx(5) == effective_rank(axes)
    line = np.outer(np.arange(6.0), [1, 2, 3])
    assert participation_ratio(line) == pytest.approx(1) == effective_rank(line)
    np.testing.assert_array_equal(spectrum(line)[1:], 0)
    assert participation_ratio(np.full((4, 3), 0.1)) == 0
    np.testing.assert_allclose(spectrum(with_spectrum([4.0, 2, 1], 20)), [4, 2, 1])
    # singular values 2, 1, 1: not eigenvalues 4, 1, 1
    assert effective_rank(with_spectrum([4.0, 1, 1], 20)) == pytest.approx(2 ** (1.5), rel=1e-9)


def test_a_gaussian_samples_participation_ratio_is_biased_as_documented():
    for n in (40, 160):
        inverse = np.mean([1 / participation_ratio(normal(n, 80, seed=seed)) for seed in range(10)])
        assert inverse == pytest.approx(1 / 80 + 1 / n, rel=0.03)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.floats(1e-3, 1e3))
def test_rotation_shift_and_scale_change_nothing(seed, scale):
    x, y = three_classes(seed=seed)
    turn = np.linalg.qr(normal(6, 6, seed=seed))[0]
    moved = scale * (x @ turn) + normal(6, seed=seed + 1)
    for measure in (participation_ratio, effective_rank, lambda z: spectrum_slope(z, first=1, last=4).alpha):
        assert measure(moved) == pytest.approx(measure(x), rel=1e-6)
    assert vars(class_separability(moved, y)) == pytest.approx(vars(class_separability(x, y)), rel=1e-6)
    assert uniformity(scale * x @ turn) == pytest.approx(uniformity(x), rel=1e-9)
    views = np.stack([x, x + normal(*x.shape, seed=seed)])
    assert alignment(scale * views @ turn) == pytest.approx(alignment(views), rel=1e-9)
    assert shared_variance(scale * views @ turn) == pytest.approx(shared_variance(views), rel=1e-9)


def test_tensors_memmaps_and_lists_are_the_same_features(tmp_path):
    x = normal(12, 5).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped, leaf = np.load(tmp_path / "x.npy", mmap_mode="r"), torch.tensor(x, requires_grad=True)
    for measure in (spectrum, participation_ratio, effective_rank, uniformity):
        for same in (mapped, leaf, x.tolist()):
            np.testing.assert_array_equal(measure(same), measure(x.astype(np.float64)))
    assert participation_ratio(leaf.bfloat16()) == pytest.approx(participation_ratio(x), rel=0.05)


# -- slope ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d", "first", "last"), [(50, 7, 1, 3), (300, 64, 3, 31), (40, 60, 1, 19)])
def test_an_exact_power_law_gives_its_exponent(n, d, first, last):
    eigenvalues = 5.0 * np.arange(1, d + 1) ** -1.3
    if n <= d:  # n images have n - 1 eigenvalues
        eigenvalues = eigenvalues[: n - 1]
    x = np.pad(with_spectrum(eigenvalues, n), ((0, 0), (0, d - len(eigenvalues))))
    slope = spectrum_slope(x)
    assert (slope.first, slope.last) == (first, last)
    assert (slope.alpha, slope.intercept, slope.r2) == pytest.approx((1.3, math.log(5), 1))
    assert spectrum_slope(x, first=2, last=6).alpha == pytest.approx(1.3)


def test_the_published_ranks_are_taken_where_they_exist():
    slope = power_law(np.arange(1, 2801) ** -1.0)
    assert (slope.first, slope.last) == (11, 500)
    assert power_law(np.ones(30)).alpha == pytest.approx(0) and power_law(np.ones(30)).r2 == 1


def test_a_bent_spectrum_is_fitted_with_weights_of_one_over_rank():
    values = np.arange(1, 41) ** -1.0 * np.exp(0.3 * normal(40))
    slope = power_law(np.sort(values)[::-1], first=2, last=30)
    k, log_l = np.log(np.arange(2, 31)), np.log(np.sort(values)[::-1][1:30])
    w = 1 / np.arange(2, 31)
    mean_k, mean_l = (w * k).sum() / w.sum(), (w * log_l).sum() / w.sum()
    correlation = (w * (k - mean_k) * (log_l - mean_l)).sum()
    assert slope.alpha == pytest.approx(-correlation / (w * (k - mean_k) ** 2).sum())
    r2 = correlation**2 / (w * (k - mean_k) ** 2).sum() / (w * (log_l - mean_l) ** 2).sum()
    assert slope.r2 == pytest.approx(r2) and 0.5 < slope.r2 < 1


@pytest.mark.parametrize(
    ("ranks", "match"),
    [({}, "7 positive"), ({"first": 0, "last": 4}, "0 to 4"), ({"first": 3, "last": 4}, "3 to 4"), ({"last": 9}, "9"),
     ({"first": 1, "last": 8}, "eigenvalue 7 is 0")],
)  # fmt: skip
def test_ranks_that_cannot_be_fitted_are_refused(ranks, match):
    with pytest.raises(UserError, match=match):
        power_law([6, 5, 4, 3, 2, 1, 0, 0], **ranks) if ranks else power_law([6, 5, 4, 3, 2, 1])


# -- cross-validated PCA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(30, 5), (6, 20)])
def test_cvpca_is_the_covariance_of_the_projections(n, d):
    x1, x2 = normal(n, d), normal(n, d, seed=1) + normal(n, d)
    expected = np.zeros(min(n - 1, d))
    for one, other in ((x1, x2), (x2, x1)):
        axes = np.linalg.svd(one - one.mean(0), full_matrices=False)[2]
        for k in range(len(expected)):
            expected[k] += np.cov(one @ axes[k], other @ axes[k])[0, 1] / 2
    np.testing.assert_allclose(cvpca(x1, x2), expected, atol=1e-12)
    np.testing.assert_allclose(cvpca(x1, x1), spectrum(x1), atol=1e-12)
    share = cvpca(x1, x2).sum() / ((spectrum(x1).sum() + spectrum(x2).sum()) / 2)
    assert shared_variance(np.stack([x1, x2])) == pytest.approx(share)


def test_cvpca_sees_through_noise():
    signal = with_spectrum(10 * np.arange(1, 41) ** -1.5, 2000)
    x1, x2 = signal + normal(2000, 40, seed=5), signal + normal(2000, 40, seed=6)
    clean, noisy = power_law(cvpca(x1, x2), first=1, last=10).alpha, spectrum_slope(x1, first=1, last=10).alpha
    assert clean == pytest.approx(1.5, abs=0.1) and noisy < 1.2
    independent = cvpca(normal(2000, 40, seed=5), normal(2000, 40, seed=6))
    assert abs(independent.sum()) < 0.3 and (independent < 0).any()


# -- classes ----------------------------------------------------------------------------------------------------------


def test_separability_by_the_definition():
    x, y = three_classes()
    x, y = x[:-4], y[:-4]  # classes of 10, 10 and 6
    mean, within, between = x.mean(0), 0, 0
    for c in np.unique(y):
        own = x[y == c]
        within = within + (own - own.mean(0)).T @ (own - own.mean(0)) / len(x)
        between = between + len(own) / len(x) * np.outer(own.mean(0) - mean, own.mean(0) - mean)
    found = class_separability(torch.tensor(x), torch.tensor(y))
    assert found.between_over_within == pytest.approx(np.trace(between) / np.trace(within))
    assert found.within_share == pytest.approx(np.trace(within) / np.trace(np.cov(x.T, ddof=0)))
    assert found.nc1 == pytest.approx(np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / 3)
    assert (found.classes, found.n) == (3, 26)


def test_hand_made_neural_collapse():
    """Two classes at (+-2, 0), images 1 above and below: S_w = diag(0, 1) is not seen by S_b = diag(4, 0)."""
    x, y = [[2, 1], [2, -1], [-2, 1], [-2, -1]], [0, 0, 1, 1]
    upright = class_separability(x, y)
    assert (upright.between_over_within, upright.within_share, upright.nc1) == pytest.approx((4, 0.2, 0))
    # images 1 before and behind: S_w = diag(1, 0), NC1 = (1 / 4) / 2
    assert class_separability([[3, 0], [1, 0], [-3, 0], [-1, 0]], y).nc1 == pytest.approx(1 / 8)
    collapsed = class_separability(np.repeat(np.eye(3), 4, axis=0), np.repeat([0, 1, 2], 4))
    assert (collapsed.between_over_within, collapsed.within_share, collapsed.nc1) == (math.inf, 0, 0)


def test_nearest_class_mean():
    x, y = three_classes(per=30, spread=3)
    order = np.random.default_rng(0).permutation(90)
    train, test = order[:45], order[45:]
    means = {c: x[train][y[train] == c].mean(0) for c in np.unique(y)}
    right = [min(means, key=lambda c: np.linalg.norm(x[i] - means[c])) == y[i] for i in test]
    score = nearest_class_mean_accuracy(x[train], y[train], x[test], y[test])
    np.testing.assert_array_equal(score.correct, right)
    assert 0.4 < score.low < score.accuracy == np.mean(right) < score.high < 1
    assert (score.n_test, score.chance) == (45, 1 / 3)
    assert score == nearest_class_mean_accuracy(x[train], y[train], x[test], y[test])

    def left_out(i):
        rest = np.arange(90) != i
        means = {c: x[rest & (y == c)].mean(0) for c in np.unique(y)}
        return min(means, key=lambda c: np.linalg.norm(x[i] - means[c])) == y[i]

    one = next(row for row in describe(x, y, resamples=0) if row.quantity == "nearest_class_mean_accuracy")
    assert one.value == np.mean([left_out(i) for i in range(90)]) != 1


# -- sphere -----------------------------------------------------------------------------------------------------------


def test_uniformity_and_alignment_by_loops():
    views = normal(3, 15, 4)
    z = views / np.linalg.norm(views, axis=2, keepdims=True)
    pairs = [np.exp(-2 * np.sum((z[0, i] - z[0, j]) ** 2)) for i in range(15) for j in range(i)]
    assert uniformity(views[0]) == pytest.approx(np.log(np.mean(pairs)))
    near = [np.sum((z[a, i] - z[b, i]) ** 2) for i in range(15) for a in range(3) for b in range(a)]
    assert alignment(views) == pytest.approx(np.mean(near))
    assert alignment(torch.tensor(views[[0, 0]])) == 0
    assert alignment(np.stack([views[0], -views[0]])) == pytest.approx(4)
    assert uniformity(np.outer([1.0, 2, 3, 1e-200, 1e200], [1, 2])) == pytest.approx(0, abs=1e-12)


def test_uniformity_over_several_blocks(monkeypatch):
    x = normal(50, 3)
    whole = uniformity(x)
    monkeypatch.setattr(separability, "PAIRS", 50 * 7)
    assert uniformity(x) == pytest.approx(whole, rel=1e-12)


# -- one stage --------------------------------------------------------------------------------------------------------


def test_rows_agree_with_the_functions_and_are_reproducible():
    x, y = three_classes(per=20, d=30)
    views = np.stack([x, x + normal(*x.shape, seed=9)])
    rows = {row.quantity: row for row in describe(x, y, views, resamples=40)}
    separable = class_separability(x, y)
    expected = {
        "participation_ratio": participation_ratio(x),
        "effective_rank": effective_rank(x),
        "spectrum_slope": spectrum_slope(x).alpha,
        "within_share": separable.within_share,
        "nc1": separable.nc1,
        "shared_variance": shared_variance(views),
        "uniformity": uniformity(x),
        "alignment": alignment(views),
    }
    assert {name: row.value for name, row in rows.items() if name in expected} == pytest.approx(expected)
    assert rows.keys() - expected.keys() == {"nearest_class_mean_accuracy"}
    assert all(row.n == 60 for row in rows.values())
    assert all(rows[name].low < value < rows[name].high for name, value in expected.items())
    assert rows["spectrum_slope"].settings["last"] == 14 and rows["alignment"].settings["views"] == 2
    assert list(rows.values()) == describe(x, y, views, resamples=40)
    assert list(rows.values()) != describe(x, y, views, resamples=40, seed=1)


def test_without_labels_views_or_resamples():
    assert [row.quantity for row in describe(normal(20, 3), resamples=0)] == [
        "participation_ratio", "effective_rank", "uniformity",
    ]  # fmt: skip
    assert all(row.low is None is row.high for row in describe(*three_classes(), resamples=0))


def test_a_dead_image_costs_no_more_than_what_it_leaves_undefined():
    x, y = three_classes(per=20, d=30)
    views = np.stack([x, x + normal(*x.shape, seed=9)])
    whole = [row.quantity for row in describe(x, y, views, resamples=20)]
    x[7] = views[1, 3] = 0
    rows = describe(x, y, views, resamples=20)
    assert [row.quantity for row in rows] == [name for name in whole if name not in ("uniformity", "alignment")]
    assert {row.quantity: row.value for row in rows}["effective_rank"] == pytest.approx(effective_rank(x))
    assert all(row.low < row.value < row.high for row in rows)


def test_a_collapsed_stage_has_the_rows_that_are_defined():
    y = np.arange(20) % 4
    one, dead = np.full((20, 5), 0.1), np.zeros((20, 5))
    for resamples in (0, 20):
        end = 0 if resamples else None
        found = {row.quantity: row for row in describe(one, y, np.stack([one, one]), resamples=resamples)}
        assert found.keys() == {"participation_ratio", "uniformity", "alignment"}
        assert all(row.value == pytest.approx(0, abs=1e-12) for row in found.values())
        assert (found["participation_ratio"].low, found["participation_ratio"].high) == (end, end)
        (row,) = describe(dead, y, np.stack([dead, dead]), resamples=resamples)
        assert (row.quantity, row.value, row.low, row.high, row.n) == ("participation_ratio", 0, end, end, 20)


def test_what_some_half_does_not_define_has_no_interval():
    x = np.zeros((20, 5))
    x[3] = 1  # half of the halves are without it
    rows = {row.quantity: row for row in describe(x, resamples=20)}
    assert rows.keys() == {"participation_ratio", "effective_rank"}
    assert rows["participation_ratio"].value == pytest.approx(1) and rows["participation_ratio"].low < 1
    assert rows["effective_rank"].value == pytest.approx(1)
    assert rows["effective_rank"].low is None is rows["effective_rank"].high


def test_intervals_cover_what_other_images_give():
    """95 % of intervals should hold the mean over samples of the same size; 60 samples: 50 is 4 standard errors off."""
    mixing = normal(8, 8, seed=99) * np.arange(1, 9) ** -0.5
    tables = [describe(normal(100, 8, seed=seed) @ mixing, resamples=60, seed=seed) for seed in range(60)]
    for rows in zip(*tables, strict=True):
        middle = np.mean([row.value for row in rows])
        covered = sum(row.low <= middle <= row.high for row in rows)
        assert covered >= 50, (rows[0].quantity, covered)
        assert np.mean([row.high - row.low for row in rows]) < 8 * np.std([row.value for row in rows])


# -- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [np.zeros(3), np.zeros((1, 3)), np.full((3, 3), np.nan)])
def test_what_is_no_cloud_is_refused(x):
    with pytest.raises(ValueError, match="finite"):
        participation_ratio(x)


X, Y = three_classes()
BAD = [(np.zeros((3, 4)), "n >= 4"), (np.full((5, 4), np.inf), "20 values"), ("what", "numbers"), (X[:, 0], "finite")]


@pytest.mark.parametrize(("x", "match"), BAD)
@pytest.mark.parametrize("measure", [spectrum, effective_rank, spectrum_slope, describe, lambda x: cvpca(x, x)])
def test_bad_features_are_refused(measure, x, match):
    with pytest.raises(UserError, match=match):
        measure(x)


@pytest.mark.parametrize("measure", [spectrum, effective_rank, spectrum_slope, lambda x: cvpca(x, x)])
def test_constant_features_have_no_spectrum(measure):
    with pytest.raises(UserError, match="do not vary"):
        measure(np.full((9, 4), 0.1))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: uniformity(np.eye(5)[[0, 1, 2, 3, 3]] * [1, 1, 1, 0, 1]), "2 of 5 feature rows are zero"),
        (lambda: alignment(X[None]), "v >= 2"),
        (lambda: shared_variance(np.full((2, 5, 3), 0.1)), "do not vary"),
        (lambda: cvpca(X, X[:-1]), "alike in shape"),
        (lambda: class_separability(X, None), "missing"),
        (lambda: class_separability(X, Y[:-1]), r"\(30,\)"),
        (lambda: class_separability(X, Y - 1), "not -1"),
        (lambda: class_separability(X, Y + 0.5), "not 4.5"),
        (lambda: class_separability(X, Y * 0), "one class 0"),
        (lambda: class_separability(X, [9, *Y[1:]]), "class 9 has a single image"),
        (lambda: class_separability([[1.0], [2], [1], [2]], [0, 0, 1, 1]), "means of all 2 classes are equal"),
        (lambda: nearest_class_mean_accuracy(X, Y, X[:, 1:], Y), "width 6, test features 5"),
        (lambda: nearest_class_mean_accuracy(X, Y, X[:9], Y[:9]), "at least 10 test images"),
        (lambda: nearest_class_mean_accuracy(X, Y, X, [*Y[1:], 5]), "test class 5 .* are 0, 4, 7"),
        (lambda: describe(X, views=X[None, :-1].repeat(2, 0)), "30 images and 6 features"),
        (lambda: describe(X, resamples=5), "5 resamples"),
        (lambda: describe(X[:6]), "8 images"),
        (lambda: describe(X[:16], np.repeat(np.arange(8), 2), resamples=200), "more images per class"),
    ],
)
def test_what_cannot_be_said_is_refused(call, match):
    with pytest.raises(UserError, match=match):
        call()
