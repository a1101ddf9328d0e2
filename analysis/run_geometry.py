"""The geometry of every stage of a run, on its test images and their augmented views."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from localsim.analysis import geometry
from localsim.analysis.extract import RAW, batch_features
from localsim.analysis.extraction import features
from localsim.analysis.geometry import GeometryRow
from localsim.analysis.regimes import common_images
from localsim.analysis.sources import Source
from localsim.data import AUGMENTATIONS, ImageSet, ViewLoader
from localsim.errors import UserError
from localsim.network import LocalNetwork
from localsim.runs import Run

BATCH = 128


def stage_geometry(
    run: Run,
    *,
    which: str | int = "trained",
    images: int | None = 1000,
    views: int = 2,
    resamples: int = 200,
    seed: int = 0,
    cache: str | Path | None = None,
) -> dict[str, list[GeometryRow]]:
    """Return `geometry.describe` of every stage of a run, lowest first: features are maps averaged over positions.

    Args:
        run: with test images.
        which: `trained`, `untrained`, or the step of a snapshot.
        images: how many test images, balanced over classes; None: all. Most quantities depend on their number.
        views: augmented views of each image, as in training, for alignment and uniformity of views; 0 for none.
        resamples, seed: of the intervals; `seed` is that of the views too.
        cache: see `features`; for the images themselves, not their views.

    Raises:
        UserError: there are no test images, one view only, or as `geometry.describe` says.
    """
    if views == 1:
        raise UserError("views is 1; allowed: 0 (none), or 2 or more, which can be compared")
    source, shown = Source.of(run, which=which), common_images([run], images)
    plain = features(source, shown, stages="all", cache=cache)
    assert isinstance(source.network, LocalNetwork)
    seen = _views(source.network, run, source, shown, views, seed) if views else {}
    return {
        name: geometry.describe(plain[name], plain.labels, seen.get(stage), resamples=resamples, seed=seed)
        for stage, name in enumerate(plain)
    }


def _views(
    net: LocalNetwork, run: Run, source: Source, images: ImageSet, number: int, seed: int
) -> dict[int, np.ndarray]:
    """Return the features `(views, n, d)` of augmented views of all images, by stage."""
    config = run.config
    assert source.mean is not None and source.std is not None
    loader = ViewLoader(
        images, AUGMENTATIONS[config.augmentation], size=config.image_size, batch_size=min(BATCH, len(images)),
        seed=seed, mean=source.mean, std=source.std, num_views=number, workers=config.workers, device=source.device,
    )  # fmt: skip
    parts: dict[int, list[np.ndarray]] = {}
    for batch in loader.all_views(0):
        found = [batch_features(net, view, precision=config.precision) for view in batch.views]
        for stage in range(len(net.stages)):
            parts.setdefault(stage, []).append(np.stack([one[stage, RAW].cpu().numpy() for one in found]))
    return {stage: np.concatenate(rows, axis=1) for stage, rows in parts.items()}
