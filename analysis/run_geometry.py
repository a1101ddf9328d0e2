"""The geometry of the layers of a run, on its test images and their augmented views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from localsim.analysis import geometry
from localsim.analysis.extraction import features
from localsim.analysis.geometry import GeometryRow
from localsim.analysis.regimes import Layer, common_images, layers_of, layers_to_read
from localsim.analysis.sources import Source
from localsim.analysis.statistics import check_resamples
from localsim.data import AUGMENTATIONS, ImageSet, ViewLoader
from localsim.errors import UserError
from localsim.runs import Run, opened_run

BATCH = 128


def stage_geometry(
    run: Run | str | Path,
    *,
    which: str | int = "trained",
    layers: str | Mapping[str, Any] = "stages",
    images: int | None = 1000,
    views: int = 2,
    resamples: int = 200,
    seed: int = 0,
    cache: str | Path | None = None,
) -> dict[Layer, list[GeometryRow]]:
    """Return `geometry.describe` of every stage of a run, lowest first: features are maps averaged over positions.

    Images and views are shown in the run's precision. What is not defined for a stage, such as one that has collapsed,
    is left out of its rows, see `geometry.describe`.

    Args:
        run: with test images, or its folder.
        which: `trained`, `untrained`, or the step of a snapshot.
        layers: `stages`, or other layers, see `compare`; `ends` are the same places however a backbone is cut.
        images: how many test images, balanced over classes; None: all. Most quantities depend on their number.
        views: augmented views of each image, as in training, for alignment and uniformity of views; 0 for none.
        resamples, seed: of the intervals; `seed` is that of the views too.
        cache: see `features`.

    Raises:
        UserError: there are no test images, one view only, or as `geometry.describe` says, with the layer's name.
    """
    if views == 1:
        raise UserError("views is 1; allowed: 0 (none), or 2 or more, which can be compared")
    run = opened_run(run)
    source, shown = Source.of(run, which=which), common_images([run], images)
    check_resamples(len(shown), resamples)
    read = partial(features, precision=run.config.precision, cache=cache, **layers_to_read(run, layers))
    plain = read(source, shown)
    seen = [read(_as_it_is(source), view) for view in _views(run, source, shown, views, seed)]
    step = {"trained": None, "untrained": 0}.get(str(which), which)
    named = layers_of(source, plain.names, run.config.rule, run.config.seed, step if step is None else int(step))
    found = {}
    for layer in named:
        stacked = np.stack([view[layer.name] for view in seen]) if seen else None
        try:
            found[layer] = geometry.describe(plain[layer.name], plain.labels, stacked, resamples=resamples, seed=seed)
        except UserError as error:
            raise UserError(f"{layer.name}: {error}") from error
    return found


def _as_it_is(source: Source) -> Source:
    """Return the source for images that are cropped, coloured and normalised already."""
    return replace(source, size=None, mean=None, std=None, grey=False, crop=None)


def _views(run: Run, source: Source, images: ImageSet, number: int, seed: int) -> list[np.ndarray]:
    """Return the augmented views of all images, normalised: `number` arrays `(n, 3, H, W)`."""
    if not number:
        return []
    config = run.config
    assert source.mean is not None and source.std is not None
    loader = ViewLoader(
        images, AUGMENTATIONS[config.augmentation], size=config.image_size, batch_size=min(BATCH, len(images)),
        seed=seed, mean=source.mean, std=source.std, num_views=number, workers=config.workers,
    )  # fmt: skip
    batches = list(loader.all_views(0))
    return [np.concatenate([batch.views[view].numpy() for batch in batches]) for view in range(number)]
