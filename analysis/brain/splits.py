"""Brain-Score's train and test images, from the same draws of scikit-learn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count
from numbers import Integral

import numpy as np

from localsim.errors import UserError

MIN_IMAGES = 20
MIN_TEST = 3
"""Test images with which a correlation says anything: two always give 1 or -1."""
RANDOM_STATE = 1
"""Brain-Score's."""

Folds = list[tuple[np.ndarray, np.ndarray]]


def check_splits(splits: int, train_size: float) -> None:
    """Raise UserError unless there is a split at least, and a share of images to fit and one to test."""
    if not isinstance(splits, Integral) or splits < 1:
        raise UserError(f"{splits} splits are not possible; allowed: 1 or more")
    if not 0 < train_size < 1:
        raise UserError(f"train_size {train_size} is not possible; allowed: shares of the images between 0 and 1")


def cross_validation(n: int, groups: Sequence[str] | None = None, splits: int = 10, train_size: float = 0.9) -> Folds:
    """Return the train and test images of every split, as Brain-Score's `CrossValidation` draws them.

    Without groups by scikit-learn's ShuffleSplit; with groups by StratifiedShuffleSplit, which gives every group its
    share of both. Both with random_state 1, so that the images' order decides which is drawn.

    Args:
        n: images.
        groups: category of each image; Brain-Score's `object_name`.
        splits: how many.
        train_size: share of images to fit.

    Returns:
        Pairs of indices `(n_train,)` and `(n_test,)`.

    Raises:
        UserError: too few images, or groups too small to be in every train and test set.
    """
    check_splits(splits, train_size)
    if n < (least := _least(train_size)):
        raise UserError(
            f"{n} images are too few for a regression that is fitted to {train_size:.0%} of them and tested on the "
            f"others; allowed: {least} or more"
        )
    train, test = _sizes(n, train_size)
    from sklearn.model_selection import ShuffleSplit, StratifiedShuffleSplit

    options = {"n_splits": int(splits), "train_size": train_size, "random_state": RANDOM_STATE}
    if groups is None:
        return list(ShuffleSplit(**options).split(np.zeros(n)))
    _check_groups(groups, train, test)
    return list(StratifiedShuffleSplit(**options).split(np.zeros(n), np.asarray(groups)))


def _least(train_size: float) -> int:
    """Return from how many images on there are enough to fit and to test."""
    enough = (n for n in count(MIN_IMAGES) if _sizes(n, train_size) >= (MIN_IMAGES // 2, 0))
    return next(n for n in enough if _sizes(n, train_size)[1] >= MIN_TEST)


def _sizes(n: int, train_size: float) -> tuple[int, int]:
    train = int(np.floor(train_size * n))
    return train, n - train


def _check_groups(groups: Sequence[str], train: int, test: int) -> None:
    instead = "allowed: larger groups, or a recording without groups"
    sizes = Counter(groups)
    name, size = min(sizes.items(), key=lambda item: item[1])
    if size < 2:
        raise UserError(f"group {name!r} has {size} image and cannot be both fitted and tested; {instead}")
    if len(sizes) > min(train, test):
        raise UserError(
            f"{len(sizes)} groups cannot all be among {train} images to fit and {test} to test; {instead}, or another "
            "train_size"
        )
