"""Features of any layer of any network for any images, in one pass over them, to memory, to files or from a cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from localsim import __version__
from localsim.analysis.feature_store import (
    FORMAT,
    Features,
    FolderWriter,
    cached,
    copy_folder,
    new_folder,
    read_folder,
    refuse_existing,
)
from localsim.analysis.points import Indices, Names, Point, whole
from localsim.analysis.sources import Source
from localsim.analysis.spatial import Reducer
from localsim.analysis.stimuli import Register, Stimuli, in_batches, open_images, shown
from localsim.errors import UserError
from localsim.opening import open_device
from localsim.precision import autocast
from localsim.runs import Run

Add = Callable[[str, np.ndarray], None]


def features(
    source: Source | Run | str | Path | nn.Module,
    images: Any = None,
    *,
    stages: Indices = None,
    units: Names = None,
    readouts: Indices = None,
    modules: list[str] | tuple[str, ...] | None = None,
    spatial: str = "mean",
    batch_size: int = 128,
    device: str | torch.device | None = None,
    precision: str = "full",
    to: str | Path | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
) -> Features:
    """Return what layers of a network give for images: an `(n, d)` float32 array per layer, one row per image.

    The network runs in evaluation mode without gradients and is left as it was. Every batch is reduced as soon as a
    layer has run; nothing else is kept. Where a layer runs several times in one pass, its last output counts.

    Rows are what a layer's first axis counts, and it must be as long as the batch. Of a layer that puts something else
    first, as a recurrent or attention layer without `batch_first` does with time `(t, n, d)`, rows would be steps in
    time: this is refused where t is not the number of images in a batch and goes unnoticed where it is.

    Args:
        source: a run or its folder, any module, `torchvision:NAME`, `timm:NAME`: see `Source.of`, which also gives a
            run's snapshots and its untrained twin.
        images: `(n, 3, H, W)` uint8, or float between 0 and 1; an ImageSet; a folder; a torch Dataset or DataLoader of
            images or (image, label). By default the run's own test images.
        stages: of a LocalNetwork: indices from 0, or `all`. Their keys are `stage1`, `stage2`, ...
        units: unit blocks by name (`stem`, `layer1.0`, ...), or `all`; also of torchvision's ResNets and VGGs.
        readouts: what the taps of these stages read: indices from 0, or `all`. Their keys are `readout1`, ...; of
            several taps on a stage the first is taken.
        modules: dotted names as in `named_modules()`; of a LocalNetwork also torchvision's (`layer2`,
            `layer3.0.conv1`). If no layer is chosen at all: all stages, of torchvision's ResNets `layer1` to `layer4`.
        spatial: `mean`, `2x2` (any k x k), `flatten` or `project1000` (any number), see `localsim.analysis.spatial`.
        batch_size: images per forward pass.
        device: where to run; by default where the network is. It is moved back afterwards.
        precision: of the forward pass, `full` or `bf16`.
        to: a folder to be made, with one `.npy` file per layer; the arrays are then mapped from it, never in memory.
        cache: a folder that keeps features by content: of weights, images, layers and settings, never by name.
        seed: of random projections, and of untrained networks by name.

    Raises:
        UserError: the source, a layer, the images or a setting is not there or does not fit; `to` exists already.
    """
    if to is not None:
        refuse_existing(Path(to))
    chosen = {"stages": stages, "units": units, "readouts": readouts, "modules": modules}
    asked = _asked(source, images, chosen, spatial, batch_size, device, precision, seed)
    shown_to = asked.source
    settings = {
        "weights": shown_to.weights_hash(),
        "layers": [point.key for point in asked.points],
        "places": [point.where for point in asked.points],
        "spatial": spatial,
        "seed": seed,
        "size": shown_to.size,
        "mean": shown_to.mean,
        "std": shown_to.std,
        "grey": shown_to.grey,
        "crop": shown_to.crop,
        "precision": precision,
        "format": FORMAT,
    }

    def extract(add: Add) -> Register:
        seen = Register()
        for batch in _batches(asked, seen):
            for name, rows in batch.items():
                add(name, rows)
        return seen

    def record(seen: Register) -> dict[str, Any]:
        versions = {"localsim": __version__, "torch": torch.__version__, "numpy": np.__version__}
        return {"source": shown_to.name, "n": len(seen.indices), "images": seen.hash, **settings, "versions": versions}

    def fill(writer: FolderWriter, expected: str | None = None) -> None:
        seen = extract(writer.add)
        if expected not in (None, seen.hash):
            raise UserError(
                "the images differed between two passes over them, so their features cannot be cached; give them in a "
                "fixed order and without random transforms"
            )
        writer.finish(record(seen), *_rows(seen))

    if cache is not None:
        seen = Register.of(asked.stimuli)
        _at_least_one(seen)
        key = hashlib.sha256(json.dumps({**settings, "images": seen.hash}, sort_keys=True).encode()).hexdigest()
        kept = cached(Path(cache), key, lambda writer: fill(writer, seen.hash))
        # the key says what was seen by whom, not what people call it
        made = Features(kept.arrays, *_rows(seen), {**kept.record, "source": shown_to.name})
        return made if to is None else copy_folder(made, Path(to))
    if to is not None:
        with new_folder(Path(to)) as writer:
            fill(writer)
        return read_folder(Path(to))
    parts: dict[str, list[np.ndarray]] = {point.key: [] for point in asked.points}
    seen = extract(lambda name, rows: parts[name].append(rows))
    joined = {name: _joined(parts.pop(name)) for name in list(parts)}
    return Features(joined, *_rows(seen), record(seen))


def feature_batches(
    source: Source | Run | str | Path | nn.Module,
    images: Any = None,
    *,
    stages: Indices = None,
    units: Names = None,
    readouts: Indices = None,
    modules: list[str] | tuple[str, ...] | None = None,
    spatial: str = "mean",
    batch_size: int = 128,
    device: str | torch.device | None = None,
    precision: str = "full",
    seed: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield what `features` gives one batch of images after another, `{layer: (batch, d)}`, and keep none of it.

    For what needs no more than a batch at a time, such as minibatch CKA. Arguments and errors as for `features`. Until
    the iteration ends or is closed the network stays in evaluation mode.
    """
    chosen = {"stages": stages, "units": units, "readouts": readouts, "modules": modules}
    return _batches(_asked(source, images, chosen, spatial, batch_size, device, precision, seed), Register())


@dataclass(frozen=True)
class _Asked:
    """A request for features, checked and opened."""

    source: Source
    points: list[Point]
    stimuli: Stimuli
    reduce: Reducer
    batch_size: int
    device: torch.device
    precision: str


def _asked(
    source: Source | Run | str | Path | nn.Module,
    images: Any,
    chosen: dict[str, Any],
    spatial: str,
    batch_size: int,
    device: str | torch.device | None,
    precision: str,
    seed: int,
) -> _Asked:
    reduce = Reducer(spatial, seed)
    if type(batch_size) is not int or batch_size < 1:
        raise UserError(f"batch_size is {batch_size!r}; allowed: whole numbers from 1")
    opened = Source.of(source, seed=seed)
    points = opened.points.choose(**chosen)
    if images is None and opened.images is None:
        raise UserError(f"{opened.name} has no test images of its own; give images")
    stimuli = open_images(opened.images if images is None else images)
    place = opened.device if device is None else open_device(str(device))
    autocast(precision, place.type)  # refuses an unknown word before anything is read
    return _Asked(opened, points, stimuli, reduce, batch_size, place, precision)


def _batches(asked: _Asked, seen: Register) -> Iterator[dict[str, np.ndarray]]:
    """Show all images to the network once, yield every batch's features, and note in `seen` what was shown."""
    source, points = asked.source, asked.points
    look = {"size": source.size, "mean": source.mean, "std": source.std, "grey": source.grey, "crop": source.crop}
    with source.evaluating(asked.device), _listening(source, points, asked.reduce) as batch:
        for images in in_batches(asked.stimuli, asked.batch_size, seen):
            x = shown(images, **look, device=asked.device)
            batch.clear()
            batch.update(shape=x.shape)
            try:
                # not around the loop: between two batches it would be the caller's code that runs without gradients
                with torch.no_grad(), autocast(asked.precision, asked.device.type)():
                    source.network(x)
            except UserError:
                raise
            except (RuntimeError, AssertionError, ValueError, TypeError, LookupError) as error:
                cause = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(f"{source.name} cannot be run on images {tuple(x.shape[1:])}: {cause}") from error
            for point in points:
                if point.key not in batch:
                    raise UserError(f"{point.key} of {source.name} does not take part in the forward pass")
                if not np.isfinite(batch[point.key]).all():
                    raise UserError(f"{point.key} of {source.name} gives values that are not finite")
            yield {point.key: batch.pop(point.key) for point in points}
    _at_least_one(seen)


@contextmanager
def _listening(source: Source, points: list[Point], reduce: Reducer) -> Iterator[dict[str, Any]]:
    """Yield a dictionary that a forward pass fills with the points' features; `shape` is that of the images."""
    batch: dict[str, Any] = {}

    def hook(point: Point) -> Callable[[nn.Module, Any, Any], None]:
        def listen(_module: nn.Module, _given: Any, output: Any) -> None:
            output = (
                output[0] if isinstance(output, tuple | list) and output else output
            )  # attention gives its weights too
            if not isinstance(output, Tensor):
                raise UserError(f"{point.key} of {source.name} gives {type(output).__name__}; allowed: a tensor")
            output = output if point.readout is None else point.readout(output)
            num, _, height, side = batch["shape"]
            output = whole(output, source.network, num, side, point.key)
            # square images have square maps, so a side and the channels must have changed places
            if output.ndim == 4 and height == side and output.shape[1] == output.shape[2] != output.shape[3]:
                _refuse_channels_last(output, reduce.spatial, point.key)
            rows = reduce(output, point.key)
            # copied: the next layer may work in place, and float32 on the CPU would be a view
            batch[point.key] = rows.to("cpu", torch.float32, copy=True).numpy()

        return listen

    handles = []
    try:
        for point in points:
            handles.append(point.module.register_forward_hook(hook(point)))
        yield batch
    finally:
        for handle in handles:
            handle.remove()


def _refuse_channels_last(output: Tensor, spatial: str, layer: str) -> None:
    if spatial != "flatten" and not spatial.startswith("project"):
        raise UserError(
            f"{layer} gives an array {tuple(output.shape)}, whose channels seem to come last; allowed for spatial "
            f"{spatial}: maps (n, c, h, w), or take flatten or projectN, which ask for no order"
        )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _rows(seen: Register) -> tuple[np.ndarray | None, np.ndarray]:
    labelled = all(label is not None for label in seen.labels)
    labels = np.array(seen.labels, dtype=np.int64) if labelled else None
    return labels, np.array(seen.indices, dtype=np.int64)


def _at_least_one(seen: Register) -> None:
    if not seen.indices:
        raise UserError("there are no images to show: none were given, or none could be read")
