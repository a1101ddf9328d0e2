"""Recordings as Brain-Score's objects, and back: assemblies, stimulus sets, benchmarks.

| Recording | assembly: coordinate |
|---|---|
| `stimuli`, `groups` | presentation: `stimulus_id`, `object_name` |
| trials | presentation: `repetition` |
| `names`, `regions`, `subjects` | neuroid: `neuroid_id`, `region`, `subject` |
| `bins` | time_bin: `time_bin_start`, `time_bin_end`; both 0, 1, ... where unknown |
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from localsim.analysis.brain.preparing import brainscore_at_hand, prepare, quiet
from localsim.analysis.brain.recordings import Recording
from localsim.data import ImageSet
from localsim.errors import UserError, one_of
from localsim.files import write_atomically

if TYPE_CHECKING:
    from brainscore_core.supported_data_standards.brainio.assemblies import (  # type: ignore[import-not-found]
        NeuroidAssembly,
    )
    from brainscore_core.supported_data_standards.brainio.stimuli import StimulusSet  # type: ignore[import-not-found]
    from brainscore_vision.benchmark_helpers.neural_common import NeuralBenchmark  # type: ignore[import-not-found]

METRICS = ("pls", "ridge", "ridgecv", "rdm", "cka")
DEGREES = 8.0
"""Brain-Score's usual field of view in degrees of visual angle, for recordings that do not say theirs."""


def from_assembly(assembly: Any, name: str | None = None) -> Recording:
    """Return the recording that an assembly `presentation x neuroid [x time_bin]` holds.

    Presentations of one image become its trials: by `repetition` where that tells them apart, in their order
    otherwise. Images that were presented several times are sorted as Brain-Score's `average_repetition` sorts them, by
    all coordinates of the presentations in turn, since its splits depend on the order; others stay as they are.

    Args:
        assembly: a NeuroidAssembly, or an xarray.DataArray with these dimensions and coordinates, whose attribute
            `stimulus_set` knows the images' files.
        name: of the recording; by default the assembly's `identifier`.

    Raises:
        UserError: it is no such assembly, or says nothing of its images or of where their files are.
    """
    dims = tuple(getattr(assembly, "dims", ()))
    if not {"presentation", "neuroid"} <= set(dims) <= {"presentation", "neuroid", "time_bin"}:
        found = " x ".join(map(str, dims)) or f"an object of type {type(assembly).__name__}"
        raise UserError(f"an assembly is presentation x neuroid, perhaps x time_bin; this is {found}")
    shown, neuroids = _along(assembly, "presentation"), _along(assembly, "neuroid")
    ids = shown.get("stimulus_id", shown.get("image_id"))
    if ids is None:
        raise UserError(
            f"the assembly has no coordinate stimulus_id, only {', '.join(shown) or 'none'} for its presentations"
        )
    order, image = _images(ids.tolist(), shown)
    trial = _trials(image, shown.get("repetition"))
    values = assembly.transpose("presentation", "neuroid", *(["time_bin"] if "time_bin" in dims else [])).values
    values = values.astype(np.float64).reshape(*values.shape[:2], -1)
    responses = np.full((len(order), values.shape[1], trial.max() + 1, values.shape[2]), np.nan)
    responses[image, :, trial] = values
    groups = None
    if "object_name" in shown:
        groups = tuple(str(shown["object_name"][place]) for place in order)
        if len(differing := set(zip(image.tolist(), map(str, shown["object_name"]), strict=True))) > len(order):
            places = [place for place, _ in differing]
            twice = next(place for place in places if places.count(place) > 1)
            raise UserError(f"image {ids[order[twice]]} of the assembly has more than one object_name")
    chosen = [ids[place] for place in order]
    stimuli = assembly.attrs.get("stimulus_set")
    return Recording(
        name=str(name or assembly.attrs.get("identifier") or assembly.name or "assembly"),
        images=ImageSet(images=None, paths=tuple(_path(stimuli, one) for one in chosen), labels=None),
        responses=responses,
        regions=_words(assembly, neuroids, "region"),
        subjects=_words(assembly, neuroids, "subject", "animal"),
        names=_words(assembly, neuroids, "neuroid_id"),
        stimuli=tuple(map(str, chosen)),
        groups=groups,
        bins=_bins(assembly),
        unit="response",
        degrees=_degrees(assembly, stimuli),
    )


def to_assembly(recording: Recording, folder: str | Path) -> NeuroidAssembly:
    """Return a recording's responses as a NeuroidAssembly, trial after trial, those left out that nobody was given.

    Its attribute `stimulus_set` is `stimulus_set(recording, folder)`; `identifier` holds a hash of all of it.

    Raises:
        UserError: the recording has RDMs only, or Brain-Score is not at hand.
    """
    brainscore_at_hand()
    if recording.responses is None:
        raise UserError(f"recording {recording.name} has RDMs only, and an assembly holds responses")
    from brainscore_core.supported_data_standards.brainio.assemblies import NeuroidAssembly  # type: ignore[import-not-found]

    stimuli = stimulus_set(recording, folder)
    given = ~np.isnan(recording.responses).all((1, 3))
    repetition, image = np.argwhere(given.T).T
    bins = recording.bins or tuple((number, number) for number in range(recording.responses.shape[3]))
    presentations = {
        "stimulus_id": np.array(recording.stimuli)[image],
        # a second coordinate keeps the first one's name where there is no other
        "stimulus_number": image,
        **({} if recording.groups is None else {"object_name": np.array(recording.groups)[image]}),
        **({} if recording.trials == 1 else {"repetition": repetition}),
    }
    neuroids = {"neuroid_id": recording.names, "region": recording.regions, "subject": recording.subjects}
    with quiet():
        made = NeuroidAssembly(
            recording.responses[image, :, repetition],
            coords={
                **{key: ("presentation", values) for key, values in presentations.items()},
                **{key: ("neuroid", list(values)) for key, values in neuroids.items()},
                "time_bin_start": ("time_bin", [start for start, _ in bins]),
                "time_bin_end": ("time_bin", [end for _, end in bins]),
            },
            dims=["presentation", "neuroid", "time_bin"],
        )
    digest = hashlib.sha256(repr((stimuli.identifier, recording.groups, neuroids, bins)).encode())
    digest.update(np.ascontiguousarray(recording.responses).data)
    made.attrs["stimulus_set"] = stimuli
    made.attrs["stimulus_set_identifier"] = stimuli.identifier
    made.attrs["identifier"] = f"{_plain(recording.name)}-{digest.hexdigest()[:12]}"
    if recording.degrees is not None:
        made.attrs["degrees"] = recording.degrees
    return made


def stimulus_set(recording: Recording, folder: str | Path) -> StimulusSet:
    """Return a recording's images as a StimulusSet whose `identifier` holds a hash of them.

    Images in memory are written into `folder` as PNG files named by their content. Files are used where they lie,
    unless two have the same name: Brain-Score keeps copies by file name, so those get links in `folder`.

    Raises:
        UserError: a file is not there, or Brain-Score is not at hand.
    """
    brainscore_at_hand()
    from brainscore_core.supported_data_standards.brainio.stimuli import StimulusSet  # type: ignore[import-not-found]

    paths, digest = _files(recording.images, Path(folder)), hashlib.sha256()
    for stimulus, path in zip(recording.stimuli, paths, strict=True):
        if not path.is_file():
            raise UserError(f"image {stimulus} of {recording.name} is not there: {path}")
        digest.update(repr((stimulus, hashlib.sha256(path.read_bytes()).hexdigest())).encode())
    columns: dict[str, Sequence[Any]] = {"stimulus_id": recording.stimuli, "stimulus_number": range(len(recording))}
    if recording.groups is not None:
        columns["object_name"] = recording.groups
    made = StimulusSet({column: list(values) for column, values in columns.items()})
    made.stimulus_paths = {stimulus: str(path) for stimulus, path in zip(recording.stimuli, paths, strict=True)}
    made.identifier = f"{_plain(recording.name)}-{digest.hexdigest()[:12]}"
    return made


def benchmark(
    recording: Recording, region: str, metric: str | Any, *, folder: str | Path | None = None
) -> NeuralBenchmark:
    """Return Brain-Score's own `NeuralBenchmark` of one region of a recording, for its models and tools.

    Trials are averaged and the ceiling is their internal consistency, computed once; a recording of averaged trials
    has the ceiling 1. Splits are stratified by the images' groups where there are any.

    Args:
        recording: of one time bin.
        region: one of its regions.
        metric: `pls`, `ridge`, `ridgecv` (dual), `rdm` or `cka`, or any metric object of Brain-Score's.
        folder: where images in memory are written; by default where Brain-Score writes, see `prepare`.

    Raises:
        UserError: there is no such region or metric, the recording has RDMs only or several time bins, or Brain-Score
            is not at hand.
    """
    brainscore_at_hand()
    chosen = recording.of(region)
    if chosen.responses is not None and chosen.responses.shape[3] > 1:
        raise UserError(f"recording {chosen.name} has {chosen.responses.shape[3]} time bins; take one, see by_bin()")
    trials = to_assembly(chosen, prepare() / "stimuli" if folder is None else folder)
    with quiet():
        from brainscore_core.metrics import Score  # type: ignore[import-not-found]
        from brainscore_vision import load_ceiling  # type: ignore[import-not-found]
        from brainscore_vision.benchmark_helpers.neural_common import NeuralBenchmark, average_repetition  # type: ignore[import-not-found]

        label, measure = (metric, _metric(metric, chosen.groups)) if isinstance(metric, str) else ("own", metric)
        trials = trials.squeeze("time_bin")
        averaged = trials if chosen.trials == 1 else average_repetition(trials)

    @lru_cache(1)  # without Brain-Score's cache, which goes by name, it would be computed for every model
    def ceiling() -> Any:
        with quiet():
            return Score(1.0) if chosen.trials == 1 else load_ceiling("internal_consistency")(trials)

    return NeuralBenchmark(
        identifier=f"{trials.attrs['identifier']}.{region}-{label}",
        version=1,
        parent=region,
        bibtex=chosen.citation,
        assembly=averaged,
        similarity_metric=measure,
        visual_degrees=chosen.degrees or DEGREES,
        number_of_trials=1,
        ceiling_func=ceiling,
    )


def _metric(name: str, groups: tuple[str, ...] | None) -> Any:
    from brainscore_vision import load_metric  # type: ignore[import-not-found]

    if name not in METRICS:
        raise one_of("metric", name, METRICS)
    if name in ("rdm", "cka"):
        return load_metric(name)
    splits = {"crossvalidation_kwargs": {"stratification_coord": None if groups is None else "object_name"}}
    if name != "ridgecv":
        return load_metric(name, **splits)
    from brainscore_vision.metrics.regression_correlation import metric  # type: ignore[import-not-found]

    return metric.CrossRegressedCorrelation(metric.dual_ridge_cv_regression(), metric.pearsonr_correlation(), **splits)


def _along(assembly: Any, dim: str) -> dict[str, np.ndarray]:
    """Return the coordinates of a dimension, in the order in which Brain-Score walks through them."""
    index = assembly.indexes.get(dim)
    levels = [] if index is None or index.nlevels == 1 else list(index.names)
    plain = [name for name in assembly.coords if name not in (dim, *levels) and assembly.coords[name].dims == (dim,)]
    return {str(name): assembly.coords[name].values for name in [*levels, *plain]}


def _images(ids: list[Any], shown: dict[str, np.ndarray]) -> tuple[list[int], np.ndarray]:
    """Return the first presentation of every image in their order, and the place in it of every presentation's."""
    first: dict[Any, int] = {}
    for place, one in enumerate(ids):
        first.setdefault(one, place)
    order = list(first.values())
    if len(order) < len(ids):
        keys = [values.tolist() for coordinate, values in shown.items() if coordinate != "repetition"]
        order.sort(key=lambda place: tuple(values[place] for values in keys))
    place_of = {ids[place]: number for number, place in enumerate(order)}
    return order, np.array([place_of[one] for one in ids])


def _trials(image: np.ndarray, repetition: np.ndarray | None) -> np.ndarray:
    """Return the number of each presentation's trial, from 0."""
    order = np.argsort(image, kind="stable")
    starts = np.searchsorted(image[order], image[order])
    counted = np.empty_like(image)
    counted[order] = np.arange(len(image)) - starts
    if repetition is None:
        return counted
    labels, number = np.unique(repetition, return_inverse=True)
    told_apart = len(set(zip(image.tolist(), number.tolist(), strict=True))) == len(image)
    # numbers that run through a whole session would make a table of gaps
    return number if told_apart and len(labels) <= 2 * (counted.max() + 1) else counted


def _words(assembly: Any, neuroids: dict[str, np.ndarray], *names: str) -> tuple[str, ...]:
    """Return the first of some coordinates that there is, of every neuroid; none if there is none."""
    for name in names:
        if name in neuroids:
            return tuple(map(str, neuroids[name]))
        if name in assembly.coords:  # one for all
            return (str(assembly.coords[name].item()),) * assembly.sizes["neuroid"]
    return ()


def _bins(assembly: Any) -> tuple[tuple[float, float], ...] | None:
    if "time_bin" in assembly.dims:
        known = _along(assembly, "time_bin")
        if not {"time_bin_start", "time_bin_end"} <= known.keys():
            return None
        bins = list(zip(known["time_bin_start"].tolist(), known["time_bin_end"].tolist(), strict=True))
    elif "time_bin" in assembly.coords:  # squeezed
        bins = [assembly.coords["time_bin"].item()]
    else:
        return None
    return (
        None if all(start == end for start, end in bins) else tuple((float(start), float(end)) for start, end in bins)
    )


def _degrees(assembly: Any, stimuli: Any) -> float | None:
    """Return the width that all images have."""
    known: Iterable[Any] = stimuli["degrees"] if "degrees" in stimuli else [assembly.attrs.get("degrees")]
    widths = {float(width) for width in known if width is not None}
    return widths.pop() if len(widths) == 1 else None


def _path(stimuli: Any, stimulus: Any) -> Path:
    if stimuli is None:
        raise UserError(
            "the assembly does not say where its images are; set assembly.attrs['stimulus_set'] to a StimulusSet"
        )
    paths = getattr(stimuli, "stimulus_paths", {})
    if stimulus not in paths:
        raise UserError(f"the assembly's stimulus set has no file for image {stimulus}; it has {len(paths)} images")
    if not Path(paths[stimulus]).is_file():
        raise UserError(f"image {stimulus} of the assembly's stimulus set is not there: {paths[stimulus]}")
    return Path(paths[stimulus])


def _files(images: ImageSet, folder: Path) -> list[Path]:
    if images.paths is not None and len({path.name for path in images.paths}) == len(images):
        return [Path(path).absolute() for path in images.paths]
    folder.mkdir(parents=True, exist_ok=True)
    if images.paths is not None:
        return [_linked(Path(path).absolute(), folder) for path in images.paths]
    assert images.images is not None
    made = []
    for image in images.images.permute(0, 2, 3, 1).numpy():
        content = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()[:16]
        path = folder / f"{content}.png"
        if not path.exists():
            write_atomically(path, Image.fromarray(image).save)
        made.append(path.absolute())
    return made


def _linked(path: Path, folder: Path) -> Path:
    link = folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}-{path.name}"
    if not link.is_symlink():
        link.symlink_to(path)
    return link.absolute()


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)  # it becomes the name of a folder
