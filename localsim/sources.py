"""What a phase of training feeds to the network: views of images, or what frozen stages made of them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from localsim.assembly import view_strengths
from localsim.config import Config
from localsim.data import Batch, ViewLoader
from localsim.errors import UserError
from localsim.files import write_json
from localsim.network import IMAGES, LocalNetwork
from localsim.precision import autocast
from localsim.schedule import Phase


class Source(Protocol):
    """Batches of views, and the stage that they enter."""

    @property
    def start(self) -> int:
        """The stage that the views enter."""
        ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over an epoch's batches from `start_step` on."""
        ...


def open_source(net: LocalNetwork, loader: ViewLoader, config: Config, path: Path, phase: Phase) -> Source:
    """Return where a phase's batches come from: the loader, or a cache of the frozen stages' outputs in the run folder.

    Under `view_strength receptive_field` the views of a phase are scaled to its tap. Caches of other phases are
    deleted: an earlier phase, where a run is resumed in it, may change what they hold.

    Raises:
        UserError: the cache cannot be written.
    """
    loader = scaled_views(net, loader, config, phase)
    start = lowest_trained(net, phase.taps)
    folder = path / "cache" / f"phase{phase.number:03d}"
    forget_caches(path, but=folder)
    if not (config.feature_cache and start > 0):
        return Views(loader)
    return CachedFeatures.make(net, loader, folder, start=start, epoch=phase.start // loader.steps_per_epoch,
                               precision=config.precision)  # fmt: skip


def scaled_views(net: LocalNetwork, loader: ViewLoader, config: Config, phase: Phase) -> ViewLoader:
    """Return the loader of a phase's views, as strong as its taps are to see them."""
    strength = max((view_strengths(config, net)[tap] for tap in phase.taps), default=1.0)
    return loader if strength == 1 else loader.with_augmentation(loader.augmentation.scaled(strength))


def forget_caches(path: Path, but: Path | None = None) -> None:
    """Delete the caches in a run folder, all or all but one."""
    for folder in (path / "cache").glob("phase*"):
        if folder != but:
            shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # not there, or not empty
        (path / "cache").rmdir()


def check_cache(net: LocalNetwork, config: Config) -> None:
    """Raise UserError if a tap needs the images in a phase that is to run without them."""
    for index, tap in enumerate(net.taps):
        if config.feature_cache and tap.context == IMAGES and lowest_trained(net, (index,)) > 0:
            raise UserError(
                f"feature_cache True keeps outputs of frozen stages in place of images, which head {config.head} needs"
            )


def lowest_trained(net: LocalNetwork, taps: tuple[int, ...]) -> int:
    """Return the lowest stage that taps which act together may change: while they act, all below it are frozen.

    A tap that changes no stage counts with its own, for its head is trained on that. Where all taps act at once it is
    the lowest of all: a stage that no tap changes still sees training batches.
    """
    if len(taps) == len(net.taps):
        return 0
    lowest = [net.credit.lowest(tap) for tap in taps]
    return min(net.credit.taps[tap] if low is None else low for tap, low in zip(taps, lowest, strict=True))


def set_modes(net: LocalNetwork, phase: Phase) -> None:
    """Put the network in training mode, but the stages that the phase leaves frozen in evaluation mode."""
    net.train()
    for stage in range(lowest_trained(net, phase.taps)):
        net.stages[stage].eval()


def batches(source: Source, first: int, last: int, steps_per_epoch: int) -> Iterator[tuple[int, Batch]]:
    """Iterate over `(epoch, batch)` of the steps from `first` to `last` (not included)."""
    while first < last:
        epoch, done = divmod(first, steps_per_epoch)
        stop = min(last, (epoch + 1) * steps_per_epoch)
        for batch in islice(source.epoch(epoch, done), stop - first):
            yield epoch, batch
        first = stop


@dataclass(frozen=True)
class Views:
    """Views of images, new ones in every epoch."""

    loader: ViewLoader
    start: int = 0

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over an epoch's batches from `start_step` on."""
        return self.loader.epoch(epoch, start_step)


@dataclass(frozen=True)
class CachedFeatures:
    """The outputs of frozen stages for one draw of views of all images, on disk; every epoch has an order of its own.

    The views are those of the phase's first epoch: a stage then costs only itself, and sees every image under the same
    two views throughout its phase.

    Attributes:
        start: the stage that the features enter.
        loader: gives the order of the images, and their labels.
        features: for each view `(readable images, patches per image, channels, height, width)`, mapped from the files.
        place: `(images,)` where in `features` an image is; -1 for those that cannot be read.
    """

    start: int
    loader: ViewLoader
    features: tuple[Tensor, ...]
    place: Tensor

    @classmethod
    def make(
        cls, net: LocalNetwork, loader: ViewLoader, folder: Path, *, start: int, epoch: int, precision: str
    ) -> CachedFeatures:
        """Fill the cache, or take up the one that an interrupted run has filled; leaves evaluation mode on.

        Raises:
            UserError: the files cannot be written.
        """
        record = folder / "complete.json"
        files = [folder / f"view{view}.bin" for view in range(loader.num_views)]
        if not _complete(record, files):
            net.eval()
            _fill(net, loader, folder, files, start=start, epoch=epoch, precision=precision)
        told = json.loads(record.read_text(encoding="utf-8"))
        present = torch.ones(len(loader.images), dtype=torch.bool)
        present[told["unreadable"]] = False
        features = tuple(
            torch.from_file(
                str(file), shared=False, size=math.prod(told["shape"]), dtype=getattr(torch, told["dtype"])
            ).view(told["shape"])
            for file in files
        )
        return cls(start, loader, features, torch.where(present, present.cumsum(0) - 1, -1))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over an epoch's batches from `start_step` on.

        Raises:
            UserError: when fewer than two images of a batch could be read.
        """
        for indices in self.loader.order(epoch, start_step):
            indices = indices[self.place[indices] >= 0]
            if len(indices) < 2:
                raise UserError(f"only {len(indices)} of a batch of {self.loader.batch_size} images could be read")
            places = self.place[indices]
            views = tuple(kept[places].flatten(0, 1).to(self.loader.device) for kept in self.features)
            labels = self.loader.images.labels
            yield Batch(views, None if labels is None else labels[indices].to(self.loader.device), indices)


def _complete(record: Path, files: list[Path]) -> bool:
    """Return whether a cache was filled to its end and its files have the size that its record says."""
    if not record.exists():
        return False
    size = json.loads(record.read_text(encoding="utf-8"))["bytes"]
    return all(file.exists() and file.stat().st_size == size for file in files)


def _fill(
    net: LocalNetwork, loader: ViewLoader, folder: Path, files: list[Path], *, start: int, epoch: int, precision: str
) -> None:
    """Write the outputs of stage `start - 1` for all readable images to `files`, one file per view, then the record.

    They are written as ordinary files: on a full disk a write through a memory map kills the process.
    """
    present = torch.zeros(len(loader.images), dtype=torch.bool)
    record: dict[str, Any] = {"stage": start, "epoch": epoch}
    shutil.rmtree(folder, ignore_errors=True)
    with _writing(folder):
        folder.mkdir(parents=True)
    for batch in loader.all_views(epoch):
        outputs = [_below(net, view, start, precision) for view in batch.views]
        outputs = [out.unflatten(0, (-1, net.patches_per_image)) for out in outputs]
        record |= {"shape": list(outputs[0].shape), "dtype": str(outputs[0].dtype).removeprefix("torch.")}
        if not present.any():
            _check_room(folder, len(loader.images) * sum(out[0].nbytes for out in outputs))
        with _writing(folder):
            for file, out in zip(files, outputs, strict=True):
                with file.open("ab") as handle:
                    handle.write(out.cpu().contiguous().view(torch.uint8).numpy().data)
        present[batch.indices] = True
    with _writing(folder):
        for file in files:
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        record["shape"][0] = int(present.sum())
        record["bytes"] = files[0].stat().st_size
        record["unreadable"] = (~present).nonzero().flatten().tolist()
        write_json(folder / "complete.json", record)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"feature_cache True needs {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free; "
            "make room and continue with --resume"
        )


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn a failure to write the cache into a sentence, and give back the room that it took."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"the feature cache {folder} could not be written ({error.strerror or error}); "
            "make room and continue with --resume"
        ) from error


def _below(net: LocalNetwork, images: Tensor, start: int, precision: str) -> Tensor:
    """Return the output of stage `start - 1`."""
    with torch.no_grad(), autocast(precision, net.device.type)():
        return next(islice(net.stage_outputs(images), start - 1, None))
