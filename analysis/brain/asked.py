"""What is asked for, opened and checked before any network runs."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from localsim.analysis.brain.loading import load_recordings
from localsim.analysis.brain.metrics import NeuralMetric, get_metric
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.brain.stage_choice import check_folds
from localsim.analysis.statistics import check_resamples
from localsim.data.images import image_shape
from localsim.errors import UserError, one_of

BINS = ("mean", "each")


def open_recordings(
    given: str | Path | Recording | Sequence[str | Path | Recording],
    *,
    bins: str = "mean",
    regions: Sequence[str] | None = None,
) -> list[Recording]:
    """Return recordings, of some regions only, and with `bins="each"` one for each time bin.

    Raises:
        UserError: as `score` says.
    """
    if bins not in BINS:
        raise one_of("handling of time bins", bins, BINS)
    several = [given] if isinstance(given, str | Path | Recording) else list(given)
    found = [one for item in several for one in ([item] if isinstance(item, Recording) else load_recordings(item))]
    if not found:
        raise UserError("there are no recordings to compare with: none were given")
    found = [part for one in found for part in (one.by_bin() if bins == "each" else [one])]
    names = [one.name for one in found]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"two recordings are called {twice[0]!r}; give them different names")
    if regions is None:
        return found
    present = list(dict.fromkeys(region for one in found for region in one.areas))
    for region in regions:
        if region not in present:
            raise one_of("region", region, present)
    kept = [[place for place, region in enumerate(one.regions) if region in regions] for one in found]
    return [one.pick(places) for one, places in zip(found, kept, strict=True) if places]


def metric_for(recorded: Sequence[Recording], metric: str | NeuralMetric | None) -> NeuralMetric:
    """Return the metric, by default one that suits all recordings; UserError where it does not suit one."""
    matrices = [one.name for one in recorded if one.rdms is not None]
    if metric is None:
        metric = "rdm" if matrices else "ridgecv"
    chosen = get_metric(metric) if isinstance(metric, str) else metric
    if matrices and chosen.takes == "responses":
        raise UserError(f"{matrices[0]} holds RDMs only, which {chosen.name} cannot take; allowed: rdm, rsa")
    return chosen


def check_recordings(
    recorded: Sequence[Recording], metric: NeuralMetric, *, resamples: int | None, choose_stage: bool, seed: int
) -> None:
    """Raise UserError for a region that does not fit the metric, before any network has run."""
    for one in recorded:
        _warn_of_cut(one)
        try:
            check_resamples(len(one), metric.resamples if resamples is None else resamples)
            for region in one.areas:
                metric.target(one.of(region))
                if choose_stage:
                    check_folds(metric, one.of(region), seed)
        except UserError as error:
            told = any(f"{before}{one.name}" in f". {error}" for before in (". ", "recording ", "of "))
            raise error if told else UserError(f"recording {one.name}: {error}") from None


def _warn_of_cut(recording: Recording) -> None:
    """Warn where networks, which see squares, are not shown all of an image."""
    shown = recording.images
    if shown.images is not None:
        shape = tuple(shown.images.shape[2:])
    else:
        assert shown.paths
        shape = image_shape(shown.paths[0])
    if shape is not None and shape[0] != shape[1]:
        warnings.warn(
            f"images of {recording.name} have {shape[0]} x {shape[1]} pixels, of which networks are shown the central "
            "square; pad them to squares to show all",
            stacklevel=2,
        )
