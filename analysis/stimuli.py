"""Images of any kind as a stream of raw pixels, in order, with labels and a hash of every pixel that was seen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from localsim.data import ImageSet
from localsim.data.augment import without_colour
from localsim.data.datasets import Triple, scan_folder, warn_skipped
from localsim.data.images import UnreadableImageError, decode
from localsim.data.loader import central_square
from localsim.errors import UserError

ALLOWED = "an array (n, 3, H, W), an ImageSet, a folder, or a torch Dataset or DataLoader of images or (image, label)"


class Row(NamedTuple):
    """One image `(3, H, W)` as it was given, its label if it has one, and its place in what it came from."""

    image: Tensor
    label: int | None
    index: int


@dataclass(frozen=True, eq=False)
class Stimuli:
    """Images to show, which can be run through several times.

    Attributes:
        images: a tensor, an ImageSet, a Dataset or a DataLoader.
    """

    images: Any
    _warned: set[Path] = field(default_factory=set, repr=False)

    def rows(self) -> Iterator[Row]:
        """Iterate over the images, in order; unreadable files are left out with a warning that names them."""
        if isinstance(self.images, ImageSet):
            yield from self._image_set(self.images)
            return
        index = 0
        for item in _items(self.images):
            image, label = (
                (item[0], item[1] if len(item) > 1 else None) if isinstance(item, tuple | list) else (item, None)
            )
            image = _tensor(image)
            several = image.ndim == 4
            labels = [None] * len(image) if label is None else _tensor(label).tolist() if several else [label]
            for one, its_label in zip(image if several else [image], labels, strict=False):
                yield Row(_checked(one), _whole(its_label, index), index)
                index += 1

    def _image_set(self, images: ImageSet) -> Iterator[Row]:
        labels = [None] * len(images) if images.labels is None else images.labels.tolist()
        if images.images is not None:
            yield from (Row(*row) for row in zip(images.images, labels, range(len(images)), strict=True))
            return
        for index, (path, label) in enumerate(zip(images.paths or (), labels, strict=True)):
            try:
                yield Row(decode(path), label, index)
            except UnreadableImageError as error:
                if path not in self._warned:
                    self._warned.add(path)
                    warn_skipped(str(error))


@dataclass
class Register:
    """What is known of the images that went by."""

    labels: list[int | None] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    _digest: Any = field(default_factory=hashlib.sha256)

    def add(self, row: Row) -> None:
        """Enter one image."""
        self._digest.update(f"{row.image.dtype} {tuple(row.image.shape)}".encode())
        self._digest.update(row.image.contiguous().numpy())
        self.labels.append(row.label)
        self.indices.append(row.index)

    @property
    def hash(self) -> str:
        """SHA-256 over type, shape and pixels of all images, in order."""
        return self._digest.hexdigest()

    @classmethod
    def of(cls, stimuli: Stimuli) -> Register:
        """Return the register of a whole run through the images."""
        made = cls()
        for row in stimuli.rows():
            made.add(row)
        return made


def open_images(images: Any) -> Stimuli:
    """Return images as a stream; UserError if they are of no kind that is known, or there are none."""
    if isinstance(images, str | Path):
        if not Path(images).is_dir():
            raise UserError(f"images {str(images)!r} is not a folder that exists; allowed: {ALLOWED}")
        images = scan_folder(Path(images))[0]
    elif isinstance(images, Tensor | np.ndarray):
        images = _tensor(images).cpu()
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"images are an array of shape {tuple(images.shape)}; allowed: (n, 3, H, W)")
    elif not isinstance(images, ImageSet | Dataset | DataLoader):
        raise UserError(f"images are of type {type(images).__name__}; allowed: {ALLOWED}")
    if not isinstance(images, IterableDataset | DataLoader) and len(images) == 0:  # type: ignore[arg-type]
        raise UserError("there are no images to show: 0 were given")
    return Stimuli(images)


def in_batches(stimuli: Stimuli, batch_size: int, register: Register) -> Iterator[list[Tensor]]:
    """Iterate over the images in lists of `batch_size`, the last one perhaps shorter, entering each in `register`."""
    rows = stimuli.rows()
    while batch := list(islice(rows, batch_size)):
        for row in batch:
            register.add(row)
        yield [row.image for row in batch]


def shown(
    images: list[Tensor],
    *,
    size: int | None,
    mean: Triple | None,
    std: Triple | None,
    grey: bool,
    crop: float | None,
    device: torch.device,
) -> Tensor:
    """Return the batch `(n, 3, H, W)` float32 that a network is shown, as `localsim.data.plain_batches` makes it.

    uint8 is divided by 255; then images become `(x - mean) / std`, or stay as they are without `mean`.

    Raises:
        UserError: images of several sizes without a `size`, or floats outside [0, 1] that are to be normalised.
    """
    one_kind = len({(image.shape, image.dtype) for image in images}) == 1
    if not one_kind and size is None:
        kinds = list(dict.fromkeys(f"{image.dtype} {tuple(image.shape)}" for image in images))
        raise UserError(f"images differ ({', '.join(kinds[:3])}) and the source has no size to bring them to; give one")
    groups = [torch.stack(images)] if one_kind else [image[None] for image in images]
    pixels = torch.cat([_unit(central_square(group.to(device), size, crop)) for group in groups])
    if not torch.isfinite(pixels).all():
        raise UserError("images hold values that are not finite; allowed: uint8, or float between 0 and 1")
    pixels = without_colour(pixels) if grey else pixels
    if mean is None or std is None:
        return pixels
    lowest, highest = pixels.min().item(), pixels.max().item()
    if lowest < -1e-4 or highest > 1 + 1e-4:  # resampling overshoots by rounding
        raise UserError(
            f"images run from {lowest:.3g} to {highest:.3g}; allowed: uint8, or float between 0 and 1, which are then "
            "normalised (a Source without mean and std takes them as they are)"
        )
    centre, scale = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    return (pixels - centre) / scale


def _unit(images: Tensor) -> Tensor:
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def _items(images: Any) -> Iterator[Any]:
    if isinstance(images, Dataset) and not isinstance(images, IterableDataset):
        # those without __iter__ would be iterated over until an IndexError, which not all of them raise
        return (images[index] for index in range(len(images)))  # type: ignore[arg-type]
    return iter(images)


def _tensor(values: Any) -> Tensor:
    """Return an array, a PIL image or numbers as a tensor of uint8, float32 or int64."""
    if hasattr(values, "convert"):
        values = np.array(values.convert("RGB")).transpose(2, 0, 1)
    try:
        made = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"images hold {type(values).__name__}; allowed: {ALLOWED}") from None
    return made.float() if made.is_floating_point() else made


def _checked(image: Tensor) -> Tensor:
    if image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"an image has shape {tuple(image.shape)}; allowed: (3, H, W)")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise UserError(f"images hold {str(image.dtype).removeprefix('torch.')}; allowed: uint8, or float in [0, 1]")
    return image.cpu()


def _whole(label: Any, index: int) -> int | None:
    try:
        return None if label is None else int(label)
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"the label of image {index} is {label!r}; allowed: whole numbers, or no labels") from None
