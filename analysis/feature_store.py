"""Features as they are held in memory, mapped from disk, saved and cached.

A folder of features holds one `.npy` file per layer (float32, a row per image), `rows.npz` (`labels`, `indices`) and
`features.json` (the record, and shape and checksum of every file). It appears under its name only when it is complete.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike

from localsim.errors import UserError
from localsim.files import write_atomically, write_json

FORMAT = 1
"""Of the folders, and of what the numbers in them are: part of every cache key."""
_ROWS = {"labels": "__labels__", "indices": "__indices__", "record": "__record__"}
_CHUNK = 64 * 2**20


@dataclass(frozen=True, eq=False, repr=False)
class Features(Mapping[str, np.ndarray]):
    """What layers gave for images: `{layer: (n, d)}`, float32, rows in the images' order.

    Attributes:
        arrays: by layer; in memory, or mapped from files.
        labels: `(n,)` int64, or None.
        indices: `(n,)` int64, the images' places in what they came from.
        record: how the features were made, as JSON holds it.
    """

    arrays: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    indices: np.ndarray
    record: Mapping[str, Any]

    def __eq__(self, other: object) -> bool:
        return self is other  # a mapping's would ask arrays whether they are true

    def __hash__(self) -> int:
        return id(self)

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, ArrayLike], *, name: str, labels: ArrayLike | None = None) -> Features:
        """Return arrays of one's own, `(n, d)` per layer with equal n, as features.

        Raises:
            UserError: arrays are not of this shape, not finite, or of different n.
        """
        made: dict[str, np.ndarray] = {}
        for layer, values in arrays.items():
            array = np.asarray(values)
            if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "fiub":
                raise UserError(f"layer {layer} is an array {array.dtype} {array.shape}; allowed: numbers (n, d)")
            if not np.isfinite(array).all():
                raise UserError(f"layer {layer} holds values that are not finite")
            made[str(layer)] = array
        sizes = {len(array) for array in made.values()}
        if len(sizes) != 1:
            raise UserError(f"layers of {name} have {sorted(sizes) or 'no'} rows; allowed: all the same number")
        num = sizes.pop()
        rows = None if labels is None else np.asarray(labels, dtype=np.int64)
        if rows is not None and rows.shape != (num,):
            raise UserError(f"labels of {name} have shape {rows.shape}; allowed: ({num},)")
        return cls(made, rows, np.arange(num), {"source": name, "n": num, "layers": list(made)})

    @property
    def names(self) -> list[str]:
        """The layers, in order."""
        return list(self.arrays)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __repr__(self) -> str:
        head = f"Features of {self.record.get('source')}: n = {len(self.indices)}"
        if "spatial" in self.record:
            head += f", spatial {self.record['spatial']}"
        width = max(map(len, self.arrays), default=0)
        return "\n".join([head, *(f"  {name:<{width}}  {array.shape}" for name, array in self.arrays.items())])

    def select(self, names: Sequence[str]) -> Features:
        """Return the features of these layers, in this order; UserError if one is not there."""
        for name in names:
            if name not in self.arrays:
                close = difflib.get_close_matches(name, self.names, n=5, cutoff=0.5) or self.names[:5]
                raise UserError(f"there are no features of layer {name!r}; there are: {', '.join(close)}")
        chosen = {name: self.arrays[name] for name in names}
        return Features(chosen, self.labels, self.indices, {**self.record, "layers": list(names)})

    def save(self, path: str | Path) -> None:
        """Write one `.npz` file that `numpy.load` reads without pickle; a file of that name is replaced."""
        entries = {**self.arrays, **_rows(self), _ROWS["record"]: np.array(json.dumps(self.record, allow_nan=False))}

        def write(temporary: Path) -> None:
            with zipfile.ZipFile(temporary, "w") as archive:
                for name, array in entries.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)

        with _told(Path(path)):
            write_atomically(Path(path), write)

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Read what `save` wrote, or map a folder that `features(..., to=folder)` wrote.

        Raises:
            UserError: there are no features, or they are damaged.
        """
        path = Path(path)
        if path.is_dir():
            return read_folder(path)
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                entries = {name: file[name] for name in file.files}
            record = json.loads(str(entries.pop(_ROWS["record"])))
            rows = {name: entries.pop(entry, None) for name, entry in _ROWS.items() if name != "record"}
        except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} holds no features that can be read: {_cause(error)}") from None
        return cls(entries, rows["labels"], rows["indices"], record)


class FolderWriter:
    """Appends rows to the files of a folder of features that is being made."""

    def __init__(self, folder: Path, final: Path, stack: ExitStack) -> None:
        self.folder, self.final, self._stack = folder, final, stack
        self._files: dict[str, tuple[BinaryIO, Any]] = {}
        self._shapes: dict[str, tuple[int, int]] = {}

    def add(self, name: str, rows: np.ndarray) -> None:
        """Append rows `(b, d)` to a layer."""
        num, width = self._shapes.setdefault(name, (0, rows.shape[1]))
        data = np.ascontiguousarray(rows, dtype="<f4")
        with _told(self.final):
            if name not in self._files:
                file = self._stack.enter_context((self.folder / _file_name(name)).open("wb"))
                _write_header(file, (0, width))
                self._files[name] = file, hashlib.sha256()
            file, digest = self._files[name]
            file.write(data)  # type: ignore[arg-type]
        digest.update(data)
        self._shapes[name] = num + len(rows), width

    def finish(self, record: Mapping[str, Any], labels: np.ndarray | None, indices: np.ndarray) -> None:
        """Write what the files' heads and the record need to know of all rows."""
        layers = []
        with _told(self.final):
            for name, (file, digest) in self._files.items():
                size = file.tell()
                file.seek(0)
                # as long as the first one: numpy leaves room for the number of rows to grow
                _write_header(file, self._shapes[name])
                file.flush()
                os.fsync(file.fileno())
                layers.append({"name": name, "shape": self._shapes[name], "bytes": size, "sha256": digest.hexdigest()})
            if labels is None:
                np.savez(self.folder / "rows.npz", indices=indices)
            else:
                np.savez(self.folder / "rows.npz", indices=indices, labels=labels)
            told = {"format": FORMAT, "record": dict(record), "layers": layers}
            write_json(self.folder / "features.json", {**told, "rows_sha256": _sha256(self.folder / "rows.npz")})


@contextmanager
def new_folder(path: Path) -> Iterator[FolderWriter]:
    """Make a folder of features that appears whole or not at all.

    Raises:
        UserError: it exists already, unless empty, or it cannot be written.
    """
    refuse_existing(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with _told(path):
            partial.mkdir(parents=True)
        with ExitStack() as files:
            yield FolderWriter(partial, path, files)
        with _told(path):
            if path.is_dir():
                path.rmdir()
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write to, which takes the place of `path`, if empty, as soon as all is written; OSError."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.is_dir():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(path: Path) -> None:
    """Raise UserError if there is something at `path` other than an empty folder."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} exists already; give a folder that does not")


def read_folder(path: Path, *, verify: bool = False) -> Features:
    """Map the files of a folder of features.

    Args:
        path: the folder.
        verify: read every file once and compare its checksum.

    Raises:
        UserError: a file is missing, damaged, or of another format.
    """
    try:
        told = json.loads((path / "features.json").read_text(encoding="utf-8"))
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']} instead of {FORMAT}")
        if verify and _sha256(path / "rows.npz") != told["rows_sha256"]:
            raise ValueError("rows.npz has another checksum")
        with (path / "rows.npz").open("rb") as raw, np.load(raw, allow_pickle=False) as rows:
            labels, indices = rows.get("labels"), rows["indices"]
        arrays: dict[str, np.ndarray] = {}
        for layer in told["layers"]:
            file, shape = path / _file_name(layer["name"]), tuple(layer["shape"])
            array = np.load(file, mmap_mode="r", allow_pickle=False)
            if array.shape != shape or array.dtype != np.float32 or file.stat().st_size != layer["bytes"]:
                raise ValueError(f"{file.name} is {array.dtype} {array.shape} instead of float32 {shape}")
            if verify and _sha256(file, skip=layer["bytes"] - array.nbytes) != layer["sha256"]:
                raise ValueError(f"{file.name} has another checksum")
            arrays[layer["name"]] = array
        return Features(arrays, labels, indices, told["record"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no features that can be read: {_cause(error)}") from None


def cached(cache: Path, key: str, make: Callable[[FolderWriter], None]) -> Features:
    """Map the entry `key` of a cache, which `make` fills if it is not there or damaged.

    Several processes may do so at once: each writes a folder of its own, and the first to finish names it.
    """
    entry = cache / key
    if entry.exists():
        try:
            return read_folder(entry, verify=True)
        except UserError:
            discard(entry)
    try:
        with new_folder(entry) as writer:
            make(writer)
    except UserError:
        # another process was faster; what it made is the same
        if not entry.exists():
            raise
    return read_folder(entry)


def discard(folder: Path) -> None:
    """Remove a folder that another process may be removing too."""
    doomed = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        with _told(folder):
            folder.rename(doomed)
    except UserError:
        if folder.exists():
            raise
    shutil.rmtree(doomed, ignore_errors=True)


def copy_folder(features: Features, path: Path) -> Features:
    """Write features to a folder, a part at a time, and return them mapped from there."""
    with new_folder(path) as writer:
        for name, array in features.items():
            step = max(1, _CHUNK // (4 * array.shape[1]))
            for start in range(0, len(array), step):
                writer.add(name, array[start : start + step])
        writer.finish(features.record, features.labels, features.indices)
    return read_folder(path)


def _rows(features: Features) -> dict[str, np.ndarray]:
    rows = {"labels": features.labels, "indices": features.indices}
    return {_ROWS[name]: values for name, values in rows.items() if values is not None}


def _file_name(layer: str) -> str:
    return f"{quote(layer, safe='')}.npy"


def _write_header(file: BinaryIO, shape: tuple[int, int]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


def _sha256(path: Path, skip: int = 0) -> str:
    with path.open("rb") as file:
        file.seek(skip)
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"features could not be written to {path}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
