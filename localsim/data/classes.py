"""How many classes a data set has, found out without loading it: what a classifier must know before training."""

from __future__ import annotations

from pathlib import Path

from localsim.data.datasets import data_root, existing_folder, imagenet_folder, scan_folder, training_folder
from localsim.data.embedded import CLASSES

_PUBLISHED = {"embedded": len(CLASSES), "cifar10": 10, "cifar100": 100, "stl10": 10}
_IMAGENET = 1000


def count_classes(data: str, root: Path | None = None) -> int | None:
    """Return the number of classes that `load_data` finds in a data set, or None where it finds no labels.

    The training images of `stl10` are unlabelled all the same: its 10 classes are those of its probe and test images.
    `imagenet` has 1000, or those of the part of it that lies in `root`; a folder has as many as its subfolders (or
    those of its `train/`) with images, and none if they are fewer than two.

    Args:
        data: a name or a folder, as `load_data` takes it.
        root: where named data sets lie, as in `load_data`.

    Raises:
        UserError: for an unknown data set, or a folder that `load_data` refuses for its names.
    """
    if data in _PUBLISHED:
        return _PUBLISHED[data]
    folder = imagenet_folder(data_root(root)) if data == "imagenet" else existing_folder(data)
    if folder is None:
        return _IMAGENET
    _, classes = scan_folder(training_folder(folder))
    return len(classes) or None
