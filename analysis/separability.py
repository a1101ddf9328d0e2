"""Classes and views in feature space: how far apart are classes, how close are two views of one image?

The part of `localsim.analysis.geometry` that needs labels or views; import it from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from localsim.analysis.probes import MIN_TEST_IMAGES, ProbeScore, bootstrap_interval
from localsim.errors import UserError

Features = ArrayLike | torch.Tensor
MIN_IMAGES = 4
PAIRS = 2**22
"""Pairs of images held at a time: 32 MiB."""
ROUNDING = 1e-24
"""Share of a sum of squares that is what rounding leaves of a difference between equal numbers."""


class UndefinedError(UserError):
    """Features are fine, but a quantity has no value for them: they are all equal, say, or a row has no direction."""


@dataclass(frozen=True)
class ClassSeparability:
    """How a cloud of features divides into its classes; see `class_separability`.

    Attributes:
        between_over_within: tr(S_b) / tr(S_w); infinite where the images of each class are all equal.
        within_share: tr(S_w) / tr(S_t), the share of variance that is within classes, 0 (collapsed) to 1 (mixed).
        nc1: tr(S_w S_b^+) / C, 0 in complete neural collapse.
        classes: number of classes C.
        n: number of images.
    """

    between_over_within: float
    within_share: float
    nc1: float
    classes: int
    n: int


def class_separability(x: Features, labels: Features) -> ClassSeparability:
    """Return how much of the variance of features `(n, d)` lies between the classes named by `labels` `(n,)`.

        S_w = 1/n sum_i (x_i - m_c(i)) (x_i - m_c(i))^T,   S_b = sum_c n_c/n (m_c - m) (m_c - m)^T,   S_t = S_w + S_b
        NC1 = tr(S_w S_b^+) / C

    m_c is the mean of class c, m that of all images. The traces are Fukunaga 1990, "Introduction to statistical pattern
    recognition", section 10.2; NC1 (within-class collapse) is Papyan, Han & Donoho 2020, PNAS 117(40), whose classes
    are equally large: other classes count here as often as they occur, which keeps S_t = S_w + S_b. S_b^+ is the
    pseudo-inverse over the at most C - 1 directions in which class means differ by more than rounding. None of the
    three changes with rotation, shift or scale. A class mean of few images adds within-class scatter to S_b: compare
    at equal n.

    Raises:
        UserError: features are not a finite (n, d) matrix of at least 4 images, labels do not fit, there are fewer
            than two classes, a class has a single image, or all class means are equal.
    """
    x = checked_features(x)
    return _separability(x, checked_labels(labels, len(x)))


def nearest_class_mean_accuracy(
    x_train: Features, y_train: Features, x_test: Features, y_test: Features, *, seed: int = 0
) -> ProbeScore:
    """Score the classifier that gives each test image the class whose mean training feature is nearest.

        answer(x) = argmin_c |x - m_c|

    Features `(n, d)` and `(m, d)` with labels `(n,)` and `(m,)`; Euclidean distance between features as they are, with
    nothing fitted but the means. Source: Mensink et al. 2013, "Distance-based image classification" (NCM); that trained
    classifiers come to agree with it is NC4 of Papyan et al. 2020. The interval is the 95 % bootstrap over test images
    (`localsim.analysis.probes.bootstrap_interval`, keyed by `seed`).

    Raises:
        UserError: features are not finite matrices of one width, labels do not fit, a training class has a single
            image, a test class none, or there are fewer than 10 test images.
    """
    x_train, x_test = checked_features(x_train, "training features"), checked_features(x_test, "test features")
    if x_train.shape[1] != x_test.shape[1]:
        raise UserError(f"training features have width {x_train.shape[1]}, test features {x_test.shape[1]}")
    if len(x_test) < MIN_TEST_IMAGES:
        raise UserError(f"a nearest-class-mean score needs at least {MIN_TEST_IMAGES} test images, not {len(x_test)}")
    y_train, y_test = checked_labels(y_train, len(x_train)), _integers(y_test, len(x_test))
    classes = np.unique(y_train)
    unknown = np.setdiff1d(y_test, classes)
    if len(unknown):
        raise UserError(f"test class {unknown[0]} has no training image; training classes are {_listed(classes)}")
    centre = x_train.mean(0)
    means, _, _ = _class_means(x_train - centre, y_train)
    correct = classes[_squared_distances(x_test - centre, means).argmin(1)] == y_test
    low, high = bootstrap_interval(correct, seed=seed)
    settings: dict[str, Any] = {"probe": "nearest_class_mean", "n_train": len(x_train), "seed": seed}
    settings["largest_class"] = float(np.unique(y_test, return_counts=True)[1].max()) / len(y_test)
    return ProbeScore(float(correct.mean()), low, high, len(correct), 1 / len(classes), settings, correct)


def leave_one_out_hits(x: Features, labels: Features) -> np.ndarray:
    """Return `(n,)` bool: is the class mean nearest to each image, the image itself left out, that of its class?

    The nearest-class-mean rule where there is one set of images only. Without x_i its class mean lies
    n_c / (n_c - 1) times as far from x_i as with it, so that nothing is computed n times.

    Raises:
        UserError: as `class_separability`, except that class means may be equal.
    """
    x = checked_features(x)
    centred = x - x.mean(0)
    means, own, counts = _class_means(centred, checked_labels(labels, len(x)))
    distance = _squared_distances(centred, means)
    image = np.arange(len(x))
    distance[image, own] *= np.square(counts / (counts - 1))[own]
    return distance.argmin(1) == own


def alignment(views: Features) -> float:
    """Return how far apart the views of one image lie, for features `(v, n, d)` of v views of n images.

        alignment = mean over images and pairs of views i < j of |z_i - z_j|^2,    z = x / |x|

    0 (views are told apart in nothing) to 4. Source: Wang & Isola 2020, "Understanding contrastive representation
    learning through alignment and uniformity on the hypersphere", equation 3 with alpha = 2.

    Raises:
        UserError: views are not a finite (v, n, d) array of at least 2 views of at least 4 images, or a row is zero.
    """
    return float(view_distances(views).mean())


def view_distances(views: Features) -> np.ndarray:
    """Return `(n,)`: the terms of `alignment`, averaged over pairs of views for each image."""
    sphere = [_unit(view) for view in checked_views(views)]
    return np.mean([np.square(a - b).sum(1) for a, b in combinations(sphere, 2)], axis=0)


def shared_variance(views: Features) -> float:
    """Return the share of variance of features `(v, n, d)` that the views of an image have in common.

        share = mean over pairs i != j of tr Cov(x_i, x_j)  /  mean over i of tr Cov(x_i, x_i)

    1 if views are equal, about 0 if they are independent (and possibly below): the intraclass correlation of images,
    and, of two views, the sum of `cvpca` over the mean sum of `spectrum` (Stringer et al. 2019, Methods).

    Raises:
        UserError: as `alignment`, or features do not vary over the images.
    """
    given = checked_views(views)
    z = given - given.mean(1, keepdims=True)
    within = np.square(z).sum()
    if within <= ROUNDING * np.square(given).sum():
        what = f"features of {z.shape[1]} images do not vary over the images"
        raise UndefinedError(f"{what}: they have no variance to share")
    return float((np.square(z.sum(0)).sum() - within) / (within * (len(z) - 1)))


def uniformity(x: Features) -> float:
    """Return how evenly features `(n, d)` spread over the unit sphere; lower is more even, 0 all in one direction.

        uniformity = log mean over pairs i < j of exp(-2 |z_i - z_j|^2),    z = x / |x|

    Source: Wang & Isola 2020, equation 4 with t = 2; -4 for points spread evenly in many dimensions. All n (n - 1) / 2
    pairs are taken, in blocks of rows.

    Raises:
        UserError: features are not a finite (n, d) matrix of at least 4 images, or a row is zero.
    """
    x = checked_features(x)
    return float(uniformity_of_subsets(x, np.ones((len(x), 1)))[0])


def uniformity_of_subsets(x: Features, member: np.ndarray) -> np.ndarray:
    """Return `(r,)`: the `uniformity` of r subsets of the images, given by 0 or 1 in `member` `(n, r)`, in one pass."""
    z = _unit(checked_features(x))
    rows = max(1, PAIRS // len(z))
    total = np.zeros(member.shape[1])
    for start in range(0, len(z), rows):
        block = z[start : start + rows]
        kernel = np.exp(4 * (block @ z.T - 1))  # |z_i - z_j|^2 = 2 - 2 z_i . z_j
        np.fill_diagonal(kernel[:, start:], 0)
        total += np.einsum("ir,ir->r", member[start : start + rows], kernel @ member)
    size = member.sum(0)
    return np.log(total / (size * (size - 1)))


def separability_of_part(x: np.ndarray, labels: np.ndarray) -> ClassSeparability:
    """Return `class_separability` of a random part of the images, without the classes it holds fewer than two of.

    Raises:
        UserError: fewer than two classes are left.
    """
    classes, own, counts = np.unique(labels, return_inverse=True, return_counts=True)
    kept = counts[own] >= 2
    if np.count_nonzero(counts >= 2) < 2:
        found = f"half of the images holds two images of fewer than two of {len(classes)} classes"
        raise UserError(f"{found}: an interval needs more images per class")
    return _separability(x[kept], labels[kept])


def checked_features(x: Features, what: str = "features", *, least: int = MIN_IMAGES) -> np.ndarray:
    """Return features `(n, d)` as a float64 array, or say what is wrong with them."""
    return _checked(x, what, ("n", "d"), (least, 1))


def checked_views(views: Features) -> np.ndarray:
    """Return views `(v, n, d)` as a float64 array, or say what is wrong with them."""
    return _checked(views, "views", ("v", "n", "d"), (2, MIN_IMAGES, 1))


def checked_labels(labels: Features, n: int) -> np.ndarray:
    """Return labels `(n,)` as int64 of at least two classes of at least two images, or say what is wrong with them."""
    y = _integers(labels, n)
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise UserError(f"labels name the one class {classes[0]} only: separability needs at least two classes")
    if counts.min() < 2:
        raise UserError(f"class {classes[counts.argmin()]} has a single image: each class needs at least two")
    return y


def _checked(x: Any, what: str, axes: tuple[str, ...], least: tuple[int, ...]) -> np.ndarray:
    given = _array(x, what)
    if given.ndim != len(axes) or any(size < m for size, m in zip(given.shape, least, strict=True)):
        needed = " and ".join(f"{axis} >= {size}" for axis, size in zip(axes, least, strict=True))
        raise UserError(f"{what} must be a finite ({', '.join(axes)}) array with {needed}, not of shape {given.shape}")
    bad = given.size - np.count_nonzero(np.isfinite(given))
    if bad:
        raise UserError(f"{what} hold {bad} values that are NaN or infinite (of {given.size})")
    return given


def _array(x: Any, what: str) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        return x.detach().to("cpu", torch.float64).numpy()
    try:
        return np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} must be an array of numbers, not {type(x).__name__}") from error


def _integers(labels: Any, n: int) -> np.ndarray:
    if labels is None:
        raise UserError(f"labels are missing: {n} images need a class each")
    given = _array(labels, "labels")
    if given.shape != (n,):
        raise UserError(f"labels must be one per image, shape ({n},), not {given.shape}")
    bad = given[~((given >= 0) & (given == np.floor(given)))]
    if len(bad):
        raise UserError(f"labels must be integers from 0 (leave unlabelled images out), not {bad[0]:g}")
    return given.astype(np.int64)


def _listed(classes: np.ndarray) -> str:
    return ", ".join(map(str, classes[:10])) + (f" ... ({len(classes)} in all)" if len(classes) > 10 else "")


def _unit(x: np.ndarray) -> np.ndarray:
    # the largest entry first: the square of a tiny or huge row would leave the range of float64
    largest = np.abs(x).max(1, keepdims=True)
    zero = np.count_nonzero(largest == 0)
    if zero:
        raise UndefinedError(f"{zero} of {len(x)} feature rows are zero and have no direction on the unit sphere")
    x = x / largest
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _class_means(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean of each class `(C, d)`, the row of it that each image belongs to `(n,)`, and counts `(C,)`."""
    _, own, counts = np.unique(y, return_inverse=True, return_counts=True)
    sums = np.add.reduceat(x[np.argsort(own, kind="stable")], np.cumsum(counts) - counts)
    return sums / counts[:, None], own, counts


def _squared_distances(x: np.ndarray, means: np.ndarray) -> np.ndarray:
    return np.maximum(np.square(x).sum(1)[:, None] - 2 * x @ means.T + np.square(means).sum(1), 0)


def _separability(x: np.ndarray, y: np.ndarray) -> ClassSeparability:
    centred = x - x.mean(0)
    means, own, counts = _class_means(centred, y)
    residual = centred - means[own]
    total, within = np.square(centred).sum() / len(x), np.square(residual).sum() / len(x)
    # S_b = B^T B, so that S_b^+ is V diag(1 / s^2) V^T with the right singular vectors of the small matrix B
    _, s, directions = np.linalg.svd(np.sqrt(counts / len(x))[:, None] * means, full_matrices=False)
    # weighted by their counts the means add up to 0: one value is always rounding, of the size that x has, not B
    rounding = max(s[0] * max(means.shape) * np.finfo(float).eps, math.sqrt(ROUNDING * np.square(x).mean(0).sum()))
    kept = (s > rounding) & (np.arange(len(s)) < len(counts) - 1)
    if not kept.any():
        raise UndefinedError(f"the means of all {len(counts)} classes are equal: NC1 is not defined")
    scatter = np.square(residual @ directions[kept].T).sum(0) / len(x)
    return ClassSeparability(
        between_over_within=float((total - within) / within) if within > ROUNDING * total else math.inf,
        within_share=float(within / total),
        nc1=float((scatter / s[kept] ** 2).sum() / len(counts)),
        classes=len(counts),
        n=len(x),
    )
