"""Batches of views for training, and of plain images for evaluation, from memory or streamed from disk."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from localsim import rng
from localsim.data.augment import Augmentation, augment_batch, crop_image, put, recolour_, without_colour
from localsim.data.datasets import ImageSet, Triple, warn_skipped
from localsim.data.images import UnreadableImageError, decode
from localsim.errors import UserError

CHUNK = 64
"""Most images a worker hands over at once: workers share a batch, and never hold whole ones in shared memory."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some images.

    Attributes:
        views: one or more `(n, 3, size, size)` float32 tensors, normalised, on the loader's device.
        labels: `(n,)` int64 on the loader's device, or None if unlabelled.
        indices: `(n,)` int64 places of the images in their ImageSet, on the CPU.
    """

    views: tuple[Tensor, ...]
    labels: Tensor | None
    indices: Tensor


class ViewLoader:
    """Random views of shuffled images, epoch by epoch.

    The order of an epoch and every view depend on the seed, the epoch and the image only: not on the number of workers
    or on where the epoch is entered.

    Args:
        images: what to draw from.
        augmentation: how views are made.
        size: height and width of the views, in pixels.
        batch_size: images in a batch; the rest of an epoch that does not fill one is left out.
        seed: of the order and the views.
        mean, std: per channel, to normalise by.
        num_views: views of each image.
        workers: processes that decode and crop streamed images; 0 does it in this process. Images in memory need none.
        device: where views are recoloured (images in memory: made) and returned.
        share: `(k, n)` gives the k-th of n consecutive parts of every batch, for a process that has n - 1 peers.

    Attributes:
        steps_per_epoch: batches in an epoch.
        num_skipped, skipped: streamed files found unreadable so far. They are left out of their batches, with one
            warning each.

    Raises:
        UserError: if the batch, the views or the workers cannot be had from these images.
    """

    def __init__(
        self,
        images: ImageSet,
        augmentation: Augmentation,
        *,
        size: int,
        batch_size: int,
        seed: int,
        mean: Triple,
        std: Triple,
        num_views: int = 2,
        workers: int = 0,
        device: torch.device | str = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> None:
        _check_at_least(("size", size, 1), ("batch_size", batch_size, 2), ("num_views", num_views, 1))
        _check_at_least(("workers", workers, 0))
        if len(images) < batch_size:
            raise UserError(f"batch_size is {batch_size}, but there are only {len(images)} images to train on")
        self.images, self.augmentation, self.size, self.batch_size = images, augmentation, size, batch_size
        self.seed, self.num_views, self.workers, self.device = seed, num_views, workers, torch.device(device)
        self.steps_per_epoch = len(images) // batch_size
        self.share = share
        self._normalise = _normaliser(mean, std, self.device)
        self._skipped: set[str] = set()

    @property
    def num_skipped(self) -> int:
        return len(self._skipped)

    @property
    def skipped(self) -> list[str]:
        """The paths of the files found unreadable so far."""
        return sorted(self._skipped)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over an epoch's batches from `start_step` on: the very batches of an epoch that was not interrupted.

        Raises:
            UserError: when fewer than two images of a batch can be read.
        """
        batches = self._order(epoch, start_step)
        return self._views([self._mine(indices) for indices in batches], epoch, fewest=2 if self.share[1] == 1 else 1)

    def order(self, epoch: int, start_step: int = 0) -> Iterator[Tensor]:
        """Iterate over the `(batch_size,)` indices of the batches that `epoch` gives, without making views.

        Streamed images that cannot be read are among them, as nothing is read here.
        """
        return iter(self._order(epoch, start_step))

    def all_views(self, epoch: int) -> Iterator[Batch]:
        """Iterate over the views of all images in their order, drawn as in that epoch; the last batch may be smaller.

        On a CPU they are the views of `epoch` bit for bit, though in other batches; on a GPU, up to rounding. Streamed
        images that cannot be read are left out.

        Raises:
            UserError: when no image can be read.
        """
        return self._views(_batches(torch.arange(len(self.images)), self.batch_size), epoch, fewest=0)

    def with_augmentation(self, augmentation: Augmentation) -> ViewLoader:
        """Return a loader of the same images, order and draws with another augmentation; it counts and warns of
        unreadable files together with this one.
        """
        other = copy.copy(self)
        other.augmentation = augmentation
        return other

    def _order(self, epoch: int, start_step: int) -> list[Tensor]:
        if not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(f"start_step is {start_step}; an epoch has {self.steps_per_epoch} steps")
        order = torch.randperm(len(self.images), generator=rng.generator(self.seed, "order", epoch))
        return _batches(order[start_step * self.batch_size : self.steps_per_epoch * self.batch_size], self.batch_size)

    def _mine(self, indices: Tensor) -> Tensor:
        """Return this process's share of a batch."""
        place, num = self.share
        return indices[len(indices) * place // num : len(indices) * (place + 1) // num]

    def _views(self, batches: list[Tensor], epoch: int, fewest: int) -> Iterator[Batch]:
        """Iterate over batches of images; streamed ones must have at least `fewest` that can be read."""
        key = (self.seed, "augment", epoch)
        return self._from_memory(batches, key) if self.images.paths is None else self._streamed(batches, key, fewest)

    def _from_memory(self, batches: list[Tensor], key: tuple[rng.Part, ...]) -> Iterator[Batch]:
        pixels = cast(Tensor, self.images.images)
        for indices in batches:
            source = put(pixels[indices], self.device)
            make = partial(augment_batch, source, indices.numpy(), self.augmentation, size=self.size, key=key)
            views = tuple(self._normalise(make(view=view)) for view in range(self.num_views))
            yield Batch(views, _labels(self.images, indices, self.device), indices)

    def _streamed(self, batches: list[Tensor], key: tuple[rng.Part, ...], fewest: int) -> Iterator[Batch]:
        crop = partial(_crops, augmentation=self.augmentation, size=self.size, num_views=self.num_views, key=key)
        for indices, crops, failures in _stream(self.images, batches, crop, self.workers, self.device):
            _warn_once(failures, self._skipped)
            if len(indices) < fewest:
                place, num = self.share
                of_what = "a batch" if num == 1 else f"share {place + 1} of {num} of a batch"
                raise UserError(
                    f"only {len(indices)} of {of_what} of {self.batch_size} images could be read, the last failure "
                    f"being {failures[-1][1]}"
                )
            if not len(indices):
                continue
            views = []
            for view in range(self.num_views):
                cropped = crops[:, view].float().div_(255)
                coloured = recolour_(cropped, indices.numpy(), self.augmentation, view=view, key=key)
                views.append(self._normalise(coloured))
            yield Batch(tuple(views), _labels(self.images, indices, self.device), indices)
        _check_any_read(self.images, self._skipped)


def plain_batches(
    images: ImageSet,
    *,
    size: int,
    batch_size: int,
    mean: Triple,
    std: Triple,
    workers: int = 0,
    device: torch.device | str = "cpu",
    grey: bool = False,
    crop: float | None = None,
) -> Iterator[Batch]:
    """Iterate over all images once, in order and unaugmented, one view each; the last batch may be smaller.

    Images of another size are resized (bilinear, antialiased) until the shorter side is 8/7 of `size`, and cropped to
    the central square: 256 and 224 pixels in torchvision's evaluation of ImageNet. Unreadable streamed files are left
    out with a warning that names them; `indices` says which images a batch holds. `grey` takes their colour away, for
    networks that have never seen any; `crop` shows the central square whose side is that part of the shorter side, for
    networks that have seen images at that one scale.

    Raises:
        UserError: if a number is out of range, or no image can be read.
    """
    _check_at_least(("size", size, 1), ("batch_size", batch_size, 1), ("workers", workers, 0))
    return _plain_batches(images, size, batch_size, workers, torch.device(device), mean, std, grey, crop)


def _plain_batches(
    images: ImageSet,
    size: int,
    batch_size: int,
    workers: int,
    device: torch.device,
    mean: Triple,
    std: Triple,
    grey: bool,
    crop: float | None,
) -> Iterator[Batch]:
    normalise = _normaliser(mean, std, device)

    def finished(plain: Tensor) -> Tensor:
        pixels = plain.float().div_(255)
        return normalise(without_colour(pixels) if grey else pixels)

    batches = _batches(torch.arange(len(images)), batch_size)
    if images.images is not None:
        for indices in batches:
            plain = central_square(put(images.images[indices], device), size, crop)
            yield Batch((finished(plain),), _labels(images, indices, device), indices)
        return
    skipped: set[str] = set()
    for indices, plain, failures in _stream(images, batches, partial(_one_view, size=size, crop=crop), workers, device):
        _warn_once(failures, skipped)
        if len(indices):
            yield Batch((finished(plain[:, 0]),), _labels(images, indices, device), indices)
    _check_any_read(images, skipped)


Failure = tuple[str, str]
"""The path of an unreadable image, and what is wrong with it."""

Chunk = tuple[list[int], Tensor | None, list[Failure]]
"""The indices of the images that could be read, their views (None if there are none), and the failures."""


class _Files(Dataset):
    """Image files as `(index, views)`, or `(index, failure)` where one cannot be read."""

    def __init__(self, paths: tuple[Path, ...], transform: Callable[[Tensor, int], Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __getitem__(self, index: int) -> tuple[int, Tensor | Failure]:
        try:
            return index, self.transform(decode(self.paths[index]), index)
        except UnreadableImageError as error:
            return index, (str(self.paths[index]), str(error))


def _stream(
    images: ImageSet,
    batches: list[Tensor],
    transform: Callable[[Tensor, int], Tensor],
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor, list[Failure]]]:
    """Iterate over `(indices, views, failures)` of batches; `transform(image, index)` makes the views.

    The workers deliver the batches in chunks, which are joined here, the views on `device`.
    """
    chunked = [indices.split(CHUNK) for indices in batches]
    longest = max((len(indices) for indices in batches), default=0)
    ended = multiprocessing.RawValue("b", False)
    # called at the latest when this process ends, before multiprocessing sends workers one SIGTERM and waits for them
    end = Finalize(None, setattr, (ended, "value", True), exitpriority=0)
    loader = DataLoader(
        _Files(cast(tuple, images.paths), transform),
        batch_sampler=[chunk.tolist() for chunks in chunked for chunk in chunks],
        num_workers=workers,
        # a batch ahead, all workers together, but two chunks each at least, so that none is idle
        prefetch_factor=max(2, ceil(longest / CHUNK / workers)) if workers else None,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=partial(_outlive_a_signal, ended=ended),
        generator=rng.generator("workers"),  # else it draws their seeds from torch's default generator
    )
    loaded = iter(loader)
    try:
        for chunks in chunked:
            yield _join([next(loaded) for _ in chunks], device)
    finally:
        end()


def _outlive_a_signal(_worker: int, ended: Any) -> None:
    """Keep a worker alive when Ctrl-C or a scheduler's SIGTERM goes to all processes: the step may need its images.

    Once `ended.value` is true the main process wants no more of them, and SIGTERM ends the worker. A second SIGTERM
    does so in any case, as it does the main process.
    """
    told = False

    def on_sigterm(number: int, _frame: object) -> None:
        nonlocal told
        if ended.value:
            os._exit(0)  # without an error, which torch would raise in the main process
        if told:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        told = True

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_sigterm)
    if ended.value:  # the SIGTERM may have come before its handler
        os._exit(0)


def _batches(order: Tensor, batch_size: int) -> list[Tensor]:
    """Return `order` in pieces of `batch_size`, the last one perhaps smaller, none of them empty."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _collate(items: list[tuple[int, Tensor | Failure]]) -> Chunk:
    read = [(index, views) for index, views in items if isinstance(views, Tensor)]
    failures = [failure for _, failure in items if not isinstance(failure, Tensor)]
    views = torch.stack([views for _, views in read]) if read else None
    return [index for index, _ in read], views, failures


def _join(chunks: list[Chunk], device: torch.device) -> tuple[Tensor, Tensor, list[Failure]]:
    indices = torch.tensor([index for read, _, _ in chunks for index in read], dtype=torch.int64)
    # copied one by one: the chunks are in pinned memory, as their concatenation on the CPU would not be
    views = [views.to(device, non_blocking=True) for _, views, _ in chunks if views is not None]
    failures = [failure for _, _, failed in chunks for failure in failed]
    return indices, torch.cat(views) if views else torch.empty(0), failures


def _crops(
    image: Tensor, index: int, augmentation: Augmentation, size: int, num_views: int, key: tuple[rng.Part, ...]
) -> Tensor:
    """Return `(num_views, 3, size, size)` uint8 random crops."""
    crops = [crop_image(image, index, augmentation, size=size, view=view, key=key) for view in range(num_views)]
    return torch.stack(crops)


def _one_view(image: Tensor, index: int, size: int, crop: float | None) -> Tensor:
    """Return the `(1, 3, size, size)` uint8 centre; `index` is what `_Files` hands to every transform."""
    return central_square(image[None], size, crop)


def central_square(images: Tensor, size: int | None, crop: float | None = None) -> Tensor:
    """Return the centres `(n, 3, size, size)` of images `(n, 3, H, W)`, uint8 or float.

    They are resized first so that an eighth of the side is cut off, or with `crop` so that the square is that part of
    the shorter side. Images of that size already, or without a `size`, are not resampled.
    """
    if crop is not None:
        side = round(crop * min(images.shape[-2:]))
        top, left = ((length - side) // 2 for length in images.shape[-2:])
        images = images[..., top : top + side, left : left + side]
    height, width = images.shape[-2:]
    if size is None or (height, width) == (size, size):
        return images
    target = size if crop is not None else max(round(size * 8 / 7), size)
    shape = [max(target, int(target * side / min(height, width))) for side in (height, width)]
    resized = functional.interpolate(images.float(), size=shape, mode="bilinear", antialias=True)
    top, left = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    centre = resized[..., top : top + size, left : left + size]
    return centre.round().to(torch.uint8) if images.dtype == torch.uint8 else centre


def _normaliser(mean: Triple, std: Triple, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return the function that normalises `(n, 3, H, W)` values between 0 and 1 in place."""
    centre = torch.tensor(mean, device=device)[:, None, None]
    scale = torch.tensor(std, device=device)[:, None, None]
    return lambda images: images.sub_(centre).div_(scale)


def _labels(images: ImageSet, indices: Tensor, device: torch.device) -> Tensor | None:
    return None if images.labels is None else put(images.labels[indices], device)


def _warn_once(failures: list[Failure], known: set[str]) -> None:
    """Warn of the failures whose path is not `known` yet, and remember them."""
    for path, reason in failures:
        if path not in known:
            known.add(path)
            warn_skipped(reason)


def _check_any_read(images: ImageSet, skipped: set[str]) -> None:
    if len(skipped) == len(images):
        raise UserError(f"none of the {len(images)} images can be read")


def _check_at_least(*values: tuple[str, int, int]) -> None:
    for what, value, lowest in values:
        if value < lowest:
            raise UserError(f"{what} is {value}; it must be at least {lowest}")
