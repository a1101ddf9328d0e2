"""Recordings from folders: localsim's own layout (docs/recordings.md), several of them, or a published set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from localsim.analysis.brain.folders import (
    ABOUT,
    DAMAGED,
    IMAGES,
    ONE_FOR_ALL,
    check_stimuli,
    image_files,
    images_of_rows,
    read_about,
    unknown_word,
)
from localsim.analysis.brain.published import (
    is_cowley,
    is_kriegeskorte,
    load_cowley,
    load_kriegeskorte,
)
from localsim.analysis.brain.recordings import Recording
from localsim.errors import UserError

NPZ = {"responses.npz": "responses", "rdms.npz": "rdms"}
"""Files of arrays, and the array that each must have."""
NETCDF = "responses.nc"
_LAYOUT = (
    f"a recording folder holds {IMAGES}/, responses.npz (or {NETCDF}, or rdms.npz) and {ABOUT}, see docs/recordings.md"
)
_WORDS = ("regions", "subjects", "names", "stimuli", "groups")


def load_recordings(path: str | Path) -> list[Recording]:
    """Return the recordings in the folder `path`, which is recognised by the files it holds.

    | the folder holds | recordings |
    |---|---|
    | `images/`, `recording.json` and `responses.npz`, `responses.nc` or `rdms.npz` | one |
    | `responses_raw_*.npy` or `responses_avg_*.npy` with `images_*.zip` (Cowley et al. 2026) | one for each session |
    | `Kriegeskorte_Neuron2008_supplementalData.mat` and `92_brainRDMs.mat` (Kriegeskorte et al. 2008) | one |
    | folders of these kinds | all of theirs, in the order of the folders' names |

    Of a published set that is there in part, what is complete is loaded; a warning says what is not.

    Raises:
        UserError: it holds no recording, a part is missing or unreadable, or two recordings have one name.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{path} {what}; allowed: a folder with a recording, see docs/recordings.md")
    if read := _reader(folder):
        found = read(folder)
    else:
        inside = [one for one in sorted(folder.iterdir()) if one.is_dir() and not one.name.startswith(".")]
        found = [recording for one in inside if (read := _reader(one)) for recording in read(one)]
        if not found:
            raise UserError(_missing(folder))
    names = [recording.name for recording in found]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} holds two recordings called {twice!r}; give them different names in {ABOUT}")
    return found


def _reader(folder: Path) -> Callable[[Path], list[Recording]] | None:
    """Return what reads this folder; None where it holds nothing that is known."""
    if any((folder / name).is_file() for name in (ABOUT, NETCDF, *NPZ)):
        return _load_folder
    if is_cowley(folder):
        return load_cowley
    if is_kriegeskorte(folder):
        return load_kriegeskorte
    return None


def _missing(folder: Path) -> str:
    """Return the sentence that says which parts of a recording a folder lacks; empty if it has them all."""
    lacks = [] if (folder / IMAGES).is_dir() else [f"{IMAGES}/"]
    lacks += [] if any((folder / name).is_file() for name in (NETCDF, *NPZ)) else ["responses.npz"]
    lacks += [] if (folder / ABOUT).is_file() else [ABOUT]
    return f"{folder} is no recording: it has no {' and no '.join(lacks)}; {_LAYOUT}" if lacks else ""


def _load_folder(folder: Path) -> list[Recording]:
    if lacks := _missing(folder):
        raise UserError(lacks)
    present = [name for name in (*NPZ, NETCDF) if (folder / name).is_file()]
    if len(present) > 1:
        raise UserError(f"{folder} holds {' and '.join(present)}; allowed: one of them in a folder")
    file = folder / present[0]
    about = read_about(folder / ABOUT)
    fields = _read_netcdf(file) if file.name == NETCDF else _read_npz(file, NPZ[file.name])
    for key, field in {**ONE_FOR_ALL, "bins": "bins", "degrees": "degrees"}.items():
        if key in about and field in fields:
            raise UserError(f"{folder} says {key} in {ABOUT} and {field} in {file.name}; allowed: one of the two")
    num = len(fields["rdms"]) if "rdms" in fields else fields["responses"].shape[1]
    for key, field in ONE_FOR_ALL.items():
        if key in about:
            fields[field] = (about.pop(key),) * num
    values = fields["rdms"][0] if "rdms" in fields else fields["responses"]
    images, stimuli = images_of_rows(folder / IMAGES, file, values.shape, fields.pop("stimuli", None))
    return [Recording(**{**fields, **about, "images": images, "stimuli": stimuli})]


# -- responses.npz and rdms.npz ---------------------------------------------------------------------------------------


def _read_npz(file: Path, wanted: str) -> dict[str, Any]:
    """Return the arrays of a file by the names of Recording's fields; code that a file may hold is never run."""
    try:
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as archive:
            if wanted not in archive.files:
                there = ", ".join(map(repr, archive.files)) or "nothing"
                raise UserError(f"{file} has no array {wanted!r}; it has {there}")
            for name in archive.files:
                if name not in (wanted, *_WORDS):
                    raise unknown_word(f"{file} has an array", name, (wanted, *_WORDS))
            arrays = {name: _plain(archive, name, file) for name in archive.files}
    except UserError:
        raise
    except DAMAGED as error:  # a .npy file, too: it comes as an array, which is no context manager
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "damaged, or not from numpy.savez"
        raise UserError(f"{file} cannot be read as arrays: {reason}") from None
    values = arrays.pop(wanted)
    if values.dtype.kind not in "fiub":
        raise UserError(f"{wanted} in {file} are of type {values.dtype}; allowed: numbers")
    if wanted == "rdms":
        values = values[None] if values.ndim == 2 else values
        valid = values.ndim == 3 and values.shape[1] == values.shape[2] and 0 not in values.shape
        allowed = "(images, images) or (matrices, images, images)"
    else:
        valid = 2 <= values.ndim <= 4 and 0 not in values.shape
        allowed = "(images, neurons), with trials as third and time bins as fourth axis"
    if not valid:
        raise UserError(f"{wanted} in {file} have shape {values.shape}; allowed: {allowed}")
    return {wanted: values.astype(np.float64), **{name: tuple(map(str, array)) for name, array in arrays.items()}}


def _plain(archive: Any, name: str, file: Path) -> np.ndarray:
    try:
        array = archive[name]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise UserError(
            f"{name!r} in {file} is an array of Python objects, which is not read because that could run code; save "
            "numbers with dtype=float and words with dtype=str"
        ) from None
    if name in _WORDS and (array.ndim != 1 or array.dtype.kind not in "Uiu"):
        raise UserError(f"{name!r} in {file} is of type {array.dtype}, shape {array.shape}; allowed: a row of words")
    return array


# -- responses.nc -----------------------------------------------------------------------------------------------------


def _read_netcdf(file: Path) -> dict[str, Any]:
    """Return what an assembly on disk says, by the names of Recording's fields, as `from_assembly` reads it."""
    from localsim.analysis.brain.assemblies import from_assembly
    from localsim.analysis.brain.brainscore import INSTALL

    try:
        import xarray  # type: ignore[import-not-found]
    except ImportError:
        raise UserError(f"{file} is NetCDF, which needs xarray; do {INSTALL}, or write responses.npz") from None
    try:
        with xarray.open_dataset(file) as dataset:
            dataset.load()
    # whatever the libraries under xarray raise
    except Exception as error:
        raise UserError(f"{file} cannot be read as NetCDF: {str(error).splitlines()[0]}") from None
    if len(dataset.data_vars) != 1:
        there = ", ".join(map(repr, dataset.data_vars)) or "none"
        raise UserError(f"{file} has the variables {there}; allowed: one, the responses")
    (assembly,) = dataset.data_vars.values()
    if "stimulus_id" in assembly.coords:
        shown = assembly.coords["stimulus_id"]
        assembly = assembly.assign_coords(stimulus_id=(shown.dims, shown.values.astype(str)))
        files = image_files(file.parent / IMAGES)
        called = list(dict.fromkeys(assembly.coords["stimulus_id"].values.tolist()))
        check_stimuli(file, files, called, len(called))
        assembly.attrs["stimulus_set"] = _Files(files)
    ends = [name for name in ("time_bin_start", "time_bin_end") if name in assembly.coords]
    if len(ends) == 2 and all(assembly.coords[name].ndim == 0 for name in ends):
        # one time bin that was squeezed before writing: a file cannot hold the pair that an assembly keeps of it
        bins = {name: ("time_bin", [assembly.coords[name].item()]) for name in ends}
        assembly = assembly.drop_vars(ends).expand_dims("time_bin").assign_coords(bins)
    made = from_assembly(assembly, name=file.name)
    found = {field: getattr(made, field) for field in (*_WORDS, "responses", "bins", "degrees", "unit")}
    unknown = [field for field in ONE_FOR_ALL.values() if set(found[field]) == {"unknown"}]
    return {field: value for field, value in found.items() if value is not None and field not in unknown}


class _Files(dict):
    """What `from_assembly` asks of a stimulus set: files by stimulus, and no table beside them."""

    def __init__(self, files: dict[str, Path]) -> None:
        super().__init__()
        self.stimulus_paths = files
