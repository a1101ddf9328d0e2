"""Any network as Brain-Score's BrainModel: features are taken our way, regions are stood for by layers."""

from __future__ import annotations

import atexit
import difflib
import hashlib
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from localsim.analysis.brain.preparing import brainscore_at_hand, quiet
from localsim.analysis.extraction import feature_batches
from localsim.analysis.sources import Source
from localsim.analysis.spatial import POOLED, Reducer
from localsim.analysis.stimuli import shown
from localsim.data.images import UnreadableImageError, decode
from localsim.errors import UserError
from localsim.runs import Run

if TYPE_CHECKING:
    from brainscore_vision.model_helpers.brain_transformation import ModelCommitment  # type: ignore[import-not-found]


def brain_model(
    source: Source | Run | str | Path | nn.Module,
    region_layers: Mapping[str, str],
    *,
    degrees: float = 8,
    spatial: str = POOLED,
    which: str | int = "trained",
    batch_size: int = 64,
    seed: int = 0,
    identifier: str | None = None,
) -> ModelCommitment:
    """Return a network as Brain-Score's `BrainModel`, whose neuroids are the features that `features` gives.

    Of the same image files with the same `spatial`, `batch_size` and `seed` they are equal bit for bit. Its identifier
    holds the hash of the weights and of all else on which activations depend: caches are kept by identifier. Responses
    that vary from trial to trial come from Brain-Score's own tiny shifts of the images.

    Args:
        source: see `Source.of`. Networks are shown images whole, a `Source` as it says.
        region_layers: the layer that stands for each region: a stage (`stage2`), readout (`readout2`), unit block or
            module.
        degrees: width of the network's field of view in degrees of visual angle. Brain-Score crops images that were
            shown larger, and pads smaller ones with grey.
        spatial: see `localsim.analysis.spatial`; `flatten` keeps every number and may take hundreds of gigabytes.
        which: of a run: `trained`, `untrained`, or the step of a snapshot.
        batch_size: images per forward pass.
        seed: of random projections, and of untrained networks by name.
        identifier: another than `identifier_of` gives; two networks must not share one.

    Raises:
        UserError: no such source or layer, or Brain-Score is not at hand.
    """
    return brain_models(
        source,
        [region_layers],
        degrees=degrees,
        spatial=spatial,
        which=which,
        batch_size=batch_size,
        seed=seed,
        identifier=identifier,
    )[0]


def brain_models(
    source: Source | Run | str | Path | nn.Module,
    commitments: Sequence[Mapping[str, str]],
    *,
    degrees: float = 8,
    spatial: str = POOLED,
    which: str | int = "trained",
    batch_size: int = 64,
    seed: int = 0,
    identifier: str | None = None,
) -> list[ModelCommitment]:
    """Return a network as several of Brain-Score's BrainModels, one for each choice of layers for regions.

    They give what `brain_model` gives for each choice. The first that sees a set of images takes the features of the
    layers of all choices in one pass and keeps them in memory for the others, unless half of the memory that is left
    would not hold them; sets of images are told apart by their files' names and contents.

    Args:
        commitments: what `brain_model` takes as `region_layers`, several times.
        source, degrees, spatial, which, batch_size, seed, identifier: see `brain_model`.

    Raises:
        UserError: as `brain_model` says.
    """
    brainscore_at_hand()
    reducer = Reducer(spatial, seed)
    opened = Source.of(source, which=which, seed=seed)
    opened = opened if isinstance(source, Source) else opened.whole()
    if not commitments or not all(commitments):
        raise UserError("no region has a layer; name some, such as V4=stage2 IT=stage3")
    if not 0 < degrees < 180:
        raise UserError(f"degrees is {degrees!r}; allowed: above 0 and below 180 degrees of visual angle")
    if type(batch_size) is not int or batch_size < 1:
        raise UserError(f"batch_size is {batch_size!r}; allowed: whole numbers from 1")
    layers = list(dict.fromkeys(layer for one in commitments for layer in one.values()))
    requests_for(opened, layers)
    with quiet():
        from brainscore_vision.model_helpers.brain_transformation import ModelCommitment  # type: ignore[import-not-found]

        identifier = identifier or identifier_of(opened, reducer)
        activations = _activations(opened, reducer, batch_size, identifier, layers if len(commitments) > 1 else [])
        return [
            ModelCommitment(
                identifier=identifier,
                activations_model=activations,
                layers=list(dict.fromkeys(one.values())),
                region_layer_map=dict(one),
                visual_degrees=degrees,
            )
            for one in commitments
        ]


def identifier_of(source: Source, reducer: Reducer) -> str:
    """Return a name that two networks share only if they give the same activations: `NAME-WEIGHTS-4x4-32px-LOOK`.

    WEIGHTS are 12 hexadecimal digits of the weights' hash, LOOK 6 of how images are shown and features projected.
    """
    seed = reducer.seed if reducer.spatial.startswith("project") else None
    look = repr((source.size, source.mean, source.std, source.grey, source.crop, seed))
    size = "any" if source.size is None else source.size
    digest = hashlib.sha256(look.encode()).hexdigest()[:6]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", source.name)  # it becomes part of file names
    return f"{name}-{source.weights_hash()[:12]}-{reducer.spatial}-{size}px-{digest}"


def requests_for(source: Source, layers: Sequence[str]) -> dict[str, Any]:
    """Return how `features` is asked for layers by their keys: its arguments `stages`, `readouts`, `units`, `modules`.

    Raises:
        UserError: the network has no such layer.
    """
    points = source.points
    stages = {point.key: place for place, point in enumerate(points.stages)}
    readouts = {point.key: place for place, point in points.readouts.items()}
    asked: dict[str, Any] = {}
    for layer in layers:
        if layer in stages:
            asked.setdefault("stages", []).append(stages[layer])
        elif layer in readouts:
            asked.setdefault("readouts", []).append(readouts[layer])
        elif layer in points.units or layer in points.modules:
            asked.setdefault("units" if layer in points.units else "modules", []).append(layer)
        else:
            known = [*stages, *readouts, *points.units, *points.modules]
            close = difflib.get_close_matches(layer, known, n=5, cutoff=0.5) or known[:5]
            raise UserError(f"{source.name} has no layer {layer!r}; close: {', '.join(close)}")
    return asked


def _activations(
    source: Source, reducer: Reducer, batch_size: int, identifier: str, together: Sequence[str] = ()
) -> Any:
    """Return what Brain-Score asks for activations: its own extractor, which shows images and runs layers our way.

    The layers named by `together` are taken in one pass and kept, see `brain_models`.
    """
    from brainscore_vision.benchmark_helpers.memory import available_memory_gb  # type: ignore[import-not-found]
    from brainscore_vision.model_helpers.activations import core  # type: ignore[import-not-found]

    look = {"size": source.size, "mean": source.mean, "std": source.std, "grey": source.grey, "crop": source.crop}
    # images come to it as the network is shown them
    as_shown = replace(source, size=None, mean=None, std=None, grey=False, crop=None)
    kept: dict[bytes, OrderedDict[str, np.ndarray]] = {}

    class Activations(core.ActivationsExtractorHelper):
        @property
        def _extractor(self) -> Any:  # as wrappers of modules have
            return self

        def _pad(self, batch_images: Any, batch_size: int) -> tuple[Any, int]:
            return batch_images, 0  # a longer last batch could change its last bits

        def _get_activations_batched(
            self, paths: Sequence[str], layers: Sequence[str], batch_size: int, require_variance: bool
        ) -> OrderedDict[str, np.ndarray]:
            take = super()._get_activations_batched
            if not together or require_variance:
                return take(paths, layers, batch_size, require_variance)
            if (content := _content_of(paths)) not in kept:
                # Brain-Score tries every model with one image first, to ask for memory: how large rows are is known
                row = sum(one[0].nbytes for one in next(iter(kept.values()), {}).values())
                if row * len(paths) > available_memory_gb() * 2**30 / 2:
                    return take(paths, layers, batch_size, require_variance)
                kept[content] = take(paths, together, batch_size, require_variance)
            # copied: a metric may work in place
            return OrderedDict((layer, kept[content][layer].copy()) for layer in layers)

    def show(paths: Sequence[str]) -> np.ndarray:
        try:
            images = [decode(Path(path)) for path in paths]
        except UnreadableImageError as error:
            raise UserError(f"a stimulus cannot be read: {error}") from None
        return shown(images, **look, device=source.device).cpu().numpy()

    def run(images: np.ndarray, layers: Sequence[str]) -> OrderedDict[str, np.ndarray]:
        asked = requests_for(as_shown, layers)
        (batch,) = feature_batches(
            as_shown,
            torch.as_tensor(images),
            **asked,
            spatial=reducer.spatial,
            batch_size=len(images),
            seed=reducer.seed,
        )
        return OrderedDict((layer, batch[layer]) for layer in layers)

    made = Activations(get_activations=run, preprocessing=show, identifier=identifier, batch_size=batch_size)
    if core._probe_image_path is not None:
        _removed_at_the_end(Path(core._probe_image_path).parent)
    return made


def _content_of(paths: Sequence[str]) -> bytes:
    """Return the SHA-256 of names and contents of files, in order: Brain-Score remembers by name what it shifted."""
    try:
        parts = ((os.fsencode(path), Path(path).read_bytes()) for path in paths)
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for both in parts for part in both)).digest()
    except OSError as error:
        raise UserError(f"a stimulus cannot be read: {error.filename}: {error.strerror}") from None


@cache
def _removed_at_the_end(folder: Path) -> None:
    """Remove the folder of the image with which Brain-Score tries every model, and which it leaves behind."""
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def region_layers_from(scores: Mapping[tuple[str, str], float]) -> dict[str, str]:
    """Return the best layer of each region, of a matrix of scores by (layer, region); the first of equal ones.

    A model that is committed this way must be scored on other data than those that chose its layers.
    """
    best: dict[str, tuple[float, str]] = {}
    for (layer, region), value in scores.items():
        if region not in best or value > best[region][0]:
            best[region] = value, layer
    return {region: layer for region, (_, layer) in best.items()}
