"""Data sets by name, or from a folder of images: what is trained on, what is tested on, and how it is normalised."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from localsim import rng
from localsim.data.images import UnreadableImageError, decode, find_images, image_shape
from localsim.errors import UserError

Triple = tuple[float, float, float]

EMBEDDED_TRAIN_IMAGES = 5000
EMBEDDED_TEST_IMAGES = 1500
MAX_BYTES_IN_MEMORY = 2**30
"""Folders whose images take more than this when decoded are streamed from disk."""
TEST_FRACTION = 0.2
"""Share of every class that is set aside for testing where a folder has no test images of its own."""

# published per-channel statistics; the others are measured
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a data set, in memory (`images`) or on disk (`paths`): exactly one of the two is set.

    Attributes:
        images: `(n, 3, H, W)` uint8, or None.
        paths: n image files, or None.
        labels: `(n,)` int64 indices of classes, or None if unlabelled.
    """

    images: Tensor | None
    paths: tuple[Path, ...] | None
    labels: Tensor | None

    def __post_init__(self) -> None:
        if (self.images is None) == (self.paths is None):
            raise ValueError("an ImageSet holds either images or paths")
        if self.labels is not None and len(self.labels) != len(self):
            raise ValueError(f"{len(self)} images have {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.images) if self.images is not None else len(cast(tuple, self.paths))

    def subset(self, indices: Sequence[int] | np.ndarray | Tensor) -> ImageSet:
        """Return the images at `indices`, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return ImageSet(
            images=None if self.images is None else self.images[chosen],
            paths=None if self.paths is None else tuple(self.paths[i] for i in chosen.tolist()),
            labels=None if self.labels is None else self.labels[chosen],
        )


@dataclass(frozen=True, eq=False)
class Data:
    """A data set.

    Attributes:
        name: what it was asked for by.
        classes: the classes' names; empty if unlabelled.
        train: what representations are learned from.
        probe_train: labelled images to train probes on; `train` itself where that is labelled, None if nothing is.
        test: labelled images to test probes on, or None if unlabelled.
        mean, std: per channel, of values between 0 and 1; images are normalised to `(x - mean) / std`.
        num_skipped: files left out because they could not be read. Streamed files are only read when they are used;
            the loader counts those.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    probe_train: ImageSet | None
    test: ImageSet | None
    mean: Triple
    std: Triple
    num_skipped: int = 0


def load_data(
    name: str,
    *,
    root: Path | None = None,
    image_size: int,
    train_images: int | None = None,
    test_images: int | None = None,
    seed: int = 0,
) -> Data:
    """Load a data set by name, or from a folder of images.

    | name | train | test |
    |---|---|---|
    | `embedded` | rendered at `image_size`: 5000 images | 1500 images |
    | `cifar10`, `cifar100` | the training split | the test split |
    | `stl10` | the 100,000 unlabelled images (probes: the 5,000 labelled ones) | the test split |
    | `imagenet` | `train/` in `root` or `root/imagenet`, streamed | `val/` |
    | a folder | `train/`; or 80 % of each class; or, if flat, all | `val/` or `test/`; or 20 % of each class; or none |

    A folder's class is its first level of subfolders. Its images are held in memory if all have one size and take at
    most 1 GiB, and are streamed otherwise. Unreadable files are left out with a warning that names them. Streamed
    images are normalised by the statistics of ImageNet, those in memory by their own or, for CIFAR, the published ones.

    Args:
        name: one of the names above, or the path of a folder (`./cifar10` for a folder called like a data set).
        root: where named data sets lie or are downloaded to; by default the environment variable LOCALSIM_DATA, or
            ~/.cache/localsim.
        image_size: pixels at which `embedded` is rendered; all others keep their size until the loader crops them.
        train_images: train on this many only, as evenly over the classes as they allow; the same images in every run,
            whatever its seed, and contained in any larger choice. For `embedded`: how many to render.
        test_images: likewise for testing.
        seed: which 80 % of a folder without test images are trained on. Nothing else depends on it.

    Raises:
        UserError: if there is no such data set or folder, it holds no readable image, it cannot be downloaded, or has
            fewer images than asked for.
    """
    for what, value, lowest in (
        ("image_size", image_size, 8),
        ("train_images", train_images, 1),
        ("test_images", test_images, 1),
    ):
        if value is not None and value < lowest:
            raise UserError(f"{what} is {value}; it must be at least {lowest}")
    limits = {"train": train_images, "test": test_images}
    if name == "embedded":
        return _embedded(image_size, limits)
    if name in _NAMED:
        return _NAMED[name](name, data_root(root), limits)
    return _folder(name, existing_folder(name), limits, seed)


def data_root(root: Path | None) -> Path:
    """Return where named data sets lie: `root`, else LOCALSIM_DATA, else ~/.cache/localsim."""
    return Path(root or os.environ.get("LOCALSIM_DATA") or Path.home() / ".cache" / "localsim")


def existing_folder(name: str) -> Path:
    """Return a data set's folder; UserError if there is none, for then `name` means nothing."""
    if not os.path.isdir(name):  # noqa: PTH112 - False for what no path can be, of which Path.is_dir makes errors
        known = ", ".join(["embedded", *_NAMED])
        raise UserError(f"unknown data set {name!r}: it is neither one of {known} nor a folder that exists")
    return Path(name)


def _embedded(image_size: int, limits: dict[str, int | None]) -> Data:
    from localsim.data import embedded

    defaults = {"train": EMBEDDED_TRAIN_IMAGES, "test": EMBEDDED_TEST_IMAGES}
    splits = {}
    for split, default in defaults.items():
        images, labels = embedded.render(limits[split] or default, image_size, rng.key("embedded", split))
        splits[split] = ImageSet(images, None, labels)
    mean, std = _statistics(splits["train"].images)
    return Data("embedded", embedded.CLASSES, splits["train"], splits["train"], splits["test"], mean, std)


def _cifar(name: str, root: Path, limits: dict[str, int | None]) -> Data:
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    splits, classes = {}, ()
    for split in ("train", "test"):
        loaded = _download(name, root, lambda download, part=split == "train": source(root, part, download=download))
        images = torch.from_numpy(loaded.data).permute(0, 3, 1, 2).contiguous()
        splits[split] = _limited(ImageSet(images, None, torch.tensor(loaded.targets)), limits, split)
        classes = tuple(loaded.classes)
    mean, std = _CIFAR10 if name == "cifar10" else _CIFAR100
    return Data(name, classes, splits["train"], splits["train"], splits["test"], mean, std)


def _stl10(name: str, root: Path, limits: dict[str, int | None]) -> Data:
    from torchvision.datasets import STL10

    splits, classes = {}, ()
    for split in ("unlabeled", "train", "test"):
        loaded = _download(name, root, lambda download, part=split: STL10(root, part, download=download))
        labels = None if split == "unlabeled" else torch.from_numpy(np.asarray(loaded.labels, dtype=np.int64))
        splits[split] = ImageSet(torch.from_numpy(loaded.data), None, labels)
        classes = tuple(loaded.classes)
    mean, std = _statistics(splits["train"].images)
    train, test = _limited(splits["unlabeled"], limits, "train"), _limited(splits["test"], limits, "test")
    return Data(name, classes, train, splits["train"], test, mean, std)


def _download(name: str, root: Path, open_split: Callable[[bool], Any]) -> Any:
    """Return `open_split(download)`, downloading only what is absent or damaged."""
    try:
        return open_split(False)
    except RuntimeError:  # torchvision's word for absent or damaged files
        pass
    try:
        return open_split(True)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{name} is not in {root} and could not be downloaded there: {error}") from error


def _imagenet(name: str, root: Path, limits: dict[str, int | None]) -> Data:
    folder = imagenet_folder(root)
    if folder is None:
        raise UserError(f"imagenet was looked for in {root / name} and {root}; neither has the folders train/ and val/")
    # always streamed: reading the size of a million files would take minutes
    return _folder(name, folder, limits, seed=0, in_memory=False)


def imagenet_folder(root: Path) -> Path | None:
    """Return the folder of ImageNet in `root`, or None."""
    folders = (root / "imagenet", root)
    return next((folder for folder in folders if (folder / "train").is_dir() and (folder / "val").is_dir()), None)


_NAMED: dict[str, Callable[[str, Path, dict[str, int | None]], Data]] = {
    "cifar10": _cifar,
    "cifar100": _cifar,
    "stl10": _stl10,
    "imagenet": _imagenet,
}


def _folder(name: str, folder: Path, limits: dict[str, int | None], seed: int, in_memory: bool = True) -> Data:
    """Load a folder of images; `in_memory` False streams it whatever its size."""
    train_folder = training_folder(folder)
    test_folder = next((folder / s for s in ("val", "test") if (folder / s).is_dir()), None)
    if train_folder == folder:
        test_folder = None  # without train/, folders called val or test are classes like any other
    train, classes = scan_folder(train_folder)
    test = None
    if classes and test_folder is not None:
        test, test_classes = scan_folder(test_folder, least_classes=1)
        if unknown := sorted(set(test_classes) - set(classes)):
            raise UserError(f"{test_folder} has classes that {train_folder} lacks: {', '.join(unknown[:5])}")
        if test.labels is None:
            raise UserError(f"{test_folder} has no class folders, but {train_folder} has")
        to_train = torch.tensor([classes.index(c) for c in test_classes])
        test = replace(test, labels=to_train[test.labels])
    elif classes:
        train, test = _split(train, train_folder, seed)
    elif limits["test"] is not None:
        raise UserError(f"test_images is {limits['test']}, but {folder} has no labelled images to test on")

    train = _limited(train, limits, "train")
    test = None if test is None else _limited(test, limits, "test")
    splits = [train] if test is None else [train, test]
    num_skipped = 0
    mean, std = _IMAGENET
    if in_memory and _fits_in_memory(splits):
        decoded = [_in_memory(split, folder) for split in splits]
        num_skipped = sum(len(s) for s in splits) - sum(len(s) for s in decoded)
        train, test = decoded[0], decoded[1] if len(decoded) > 1 else None
        mean, std = _statistics(train.images)
    else:
        _check_readable(cast(tuple, train.paths), folder)
    return Data(name, classes, train, train if classes else None, test, mean, std, num_skipped)


def training_folder(folder: Path) -> Path:
    """Return the folder with the training images of a folder of images."""
    return folder / "train" if (folder / "train").is_dir() else folder


def scan_folder(folder: Path, least_classes: int = 2) -> tuple[ImageSet, tuple[str, ...]]:
    """Return a folder's images and their classes; fewer than `least_classes` are as good as none."""
    paths = find_images(folder)
    if not paths:
        raise UserError(f"{folder} holds no images")
    levels = [path.relative_to(folder).parts for path in paths]
    classes = tuple(sorted({parts[0] for parts in levels if len(parts) > 1}))
    loose = sum(len(parts) == 1 for parts in levels)
    if len(classes) < least_classes:
        return ImageSet(None, tuple(paths), None), ()
    if loose:
        raise UserError(f"{folder} holds {loose} images beside {len(classes)} class folders; move them into a class")
    place = {name: i for i, name in enumerate(classes)}
    return ImageSet(None, tuple(paths), torch.tensor([place[parts[0]] for parts in levels])), classes


def _split(images: ImageSet, folder: Path, seed: int) -> tuple[ImageSet, ImageSet]:
    """Set aside a fifth of every class (at least one image of two) by a draw keyed by each file's name in `folder`."""
    names = [path.relative_to(folder).as_posix() for path in cast(tuple, images.paths)]
    draw = np.array([rng.key(seed, "split", name) for name in names])
    labels = cast(Tensor, images.labels).numpy()
    is_test = np.zeros(len(images), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        num_test = min(max(1, round(TEST_FRACTION * len(members))), len(members) - 1)
        is_test[members[draw[members].argsort()[:num_test]]] = True
    if not is_test.any():
        raise UserError(f"{folder} has one image per class; at least one class needs two, to test on")
    return images.subset(np.flatnonzero(~is_test)), images.subset(np.flatnonzero(is_test))


def _limited(images: ImageSet, limits: dict[str, int | None], split: str) -> ImageSet:
    """Return the limited choice of a split, spread over its classes: every class's first image, its second, ..."""
    num, limit = len(images), limits[split]
    if limit is not None and limit > num:
        raise UserError(f"{split}_images is {limit}, but there are only {num}")
    return images if limit is None else class_balanced(images, limit, split)


def class_balanced(images: ImageSet, limit: int, split: str) -> ImageSet:
    """Return `limit` images (all, if there are fewer) spread over their classes; always the same for a `split` name.

    Raises:
        UserError: `limit` is below 1.
    """
    if limit < 1:
        raise UserError(f"number of images is {limit}; allowed: 1 or more")
    num = len(images)
    if limit >= num:
        return images
    draw = rng.uniform(np.arange(num), 1, "subset", split)[:, 0]
    labels = np.zeros(num, dtype=np.int64) if images.labels is None else images.labels.numpy()
    round_of = np.empty(num, dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        round_of[members[draw[members].argsort()]] = np.arange(len(members))
    return images.subset(np.sort(np.lexsort((draw, round_of))[:limit]))


def _fits_in_memory(splits: list[ImageSet]) -> bool:
    """Say whether all images have one size and fit; reads heads of files only until two differ."""
    paths = [path for split in splits for path in cast(tuple, split.paths)]
    first = None
    for path in paths:
        shape = image_shape(path)
        if shape is None:
            continue
        first = first or shape
        if shape != first or len(paths) * 3 * shape[0] * shape[1] > MAX_BYTES_IN_MEMORY:
            return False
    return True


def _in_memory(split: ImageSet, folder: Path) -> ImageSet:
    """Decode a split, leaving out what cannot be read."""
    images, kept = [], []
    for i, path in enumerate(cast(tuple, split.paths)):
        try:
            images.append(decode(path))
            kept.append(i)
        except UnreadableImageError as error:
            warn_skipped(str(error))
    if not images:
        raise UserError(f"none of the {len(split)} images in {folder} can be read")
    return ImageSet(torch.stack(images), None, None if split.labels is None else split.labels[torch.tensor(kept)])


def _check_readable(paths: Iterable[Path], folder: Path) -> None:
    for path in paths:
        try:
            decode(path)
        except UnreadableImageError:
            continue
        return
    raise UserError(f"none of the images in {folder} can be read")


def warn_skipped(reason: str) -> None:
    """Warn that an image was left out; `reason` names the file."""
    warnings.warn(f"skipped an unreadable image, {reason}", stacklevel=3)


def _statistics(images: Tensor | None) -> tuple[Triple, Triple]:
    """Return the mean and standard deviation of each channel, of values between 0 and 1, exact from a histogram."""
    channels = cast(Tensor, images).unbind(1)
    value = torch.arange(256, dtype=torch.float64) / 255
    shares = [torch.bincount(c.flatten(), minlength=256).double() / c.numel() for c in channels]
    mean = [float(share @ value) for share in shares]
    # a channel without contrast would be divided by zero
    std = [max(float(share @ (value - m) ** 2) ** 0.5, 1 / 255) for share, m in zip(shares, mean, strict=True)]
    return cast(Triple, tuple(mean)), cast(Triple, tuple(std))
