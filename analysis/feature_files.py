"""Features as one file that other programs read: `.npz` for numpy, `.nc` (NetCDF) for xarray, and back, exactly."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from localsim.analysis.feature_store import Features
from localsim.errors import UserError
from localsim.files import write_atomically

FORMATS = (".npz", ".nc")
ENGINES = {"h5netcdf": "h5netcdf", "netcdf4": "netCDF4"}
"""xarray's names of what reads and writes NetCDF 4, and the packages; NetCDF 3 has no 64-bit integers."""
_STORED = {"bool": "int8", "float16": "float32"}
"""Types that NetCDF lacks, and one that holds all their values."""


def save_features(features: Features, path: str | Path) -> Path:
    """Write features, their labels, indices and record to a new file, and return its path.

    `.npz` holds an array per layer under its name, `__labels__`, `__indices__`, and `__record__` as JSON text.

    `.nc` holds a variable per layer with dimensions `presentation` (the images) and `<layer>_feature`, variables
    `label` and `index` along `presentation`, and in the attributes of the file the record: as JSON text under `record`,
    and its plain entries one by one. A `/`, which NetCDF takes for a folder, is `%2F` in the name of a variable.

    Args:
        features: what `localsim.analysis.features` gave, or `Features.of_arrays`.
        path: the file; its suffix chooses the format.

    Raises:
        UserError: the file exists already or cannot be written, the format is unknown, or `.nc` is asked for and
            xarray is not installed.
    """
    path = _known(path)
    if path.exists():
        raise UserError(f"{path} exists already; choose another name, or move it away")
    if path.suffix == ".npz":
        features.save(path)
        return path
    engine = _engine()
    try:
        dataset = _as_dataset(features)
        write_atomically(path, lambda temporary: dataset.to_netcdf(temporary, engine=engine))
    except (OSError, ValueError) as error:  # a name of a layer that NetCDF cannot hold is a ValueError
        raise UserError(f"features could not be written to {path}: {error}") from error
    return path


def load_features(path: str | Path) -> Features:
    """Read the file `path` of `save_features`, or map the folder of `features(..., to=folder)`; nothing is executed.

    Raises:
        UserError: there are no features, they are damaged, the format is unknown, or `.nc` is given
            and xarray is not installed.
    """
    path = Path(path)
    if path.is_dir() or _known(path).suffix == ".npz":
        return Features.load(path)
    engine = _engine()
    import xarray

    try:
        # undecoded: types come back as this module wrote them
        with xarray.open_dataset(path, engine=engine, decode_cf=False) as dataset:
            rows = {
                name: values.to_numpy() for name, values in dataset.data_vars.items() if "layer" not in values.attrs
            }
            arrays = {
                values.attrs["layer"]: values.to_numpy().astype(values.attrs["type"], copy=False)
                for values in dataset.data_vars.values()
                if "layer" in values.attrs
            }
            record = json.loads(dataset.attrs["record"])
        return Features(arrays, rows.get("label"), rows["index"], record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no features that can be read: {error}") from None


def _as_dataset(features: Features) -> Any:
    import xarray

    layers = {}
    for name, array in features.items():
        key = quote(name, safe=" :,+=()[]")
        kind = array.dtype.name
        stored = np.asarray(array).astype(_STORED.get(kind, kind), copy=False)
        layers[key] = (("presentation", f"{key}_feature"), stored, {"layer": name, "type": kind})
    rows = {"index": features.indices} | ({} if features.labels is None else {"label": features.labels})
    if taken := {"presentation", *rows, *(f"{key}_feature" for key in layers)} & layers.keys():
        raise ValueError(f"a layer is called {min(taken)}, as something else in the file")
    plain = {
        name: int(value) if isinstance(value, bool) else value  # NetCDF has no truth values
        for name, value in features.record.items()
        if isinstance(value, str | int | float)
    }
    return xarray.Dataset(
        layers | {name: ("presentation", values) for name, values in rows.items()},
        attrs={**plain, "record": json.dumps(features.record, allow_nan=False)},
    )


def _known(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in FORMATS:
        raise UserError(f"features cannot be kept in {path.name!r}; allowed: names that end in {', '.join(FORMATS)}")
    return path


def _engine() -> str:
    found = [engine for engine, package in ENGINES.items() if importlib.util.find_spec(package)]
    if importlib.util.find_spec("xarray") is None or not found:
        raise UserError("a .nc file needs xarray and h5netcdf; install them with `pip install xarray h5netcdf`")
    return found[0]
