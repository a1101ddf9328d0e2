"""The parts of a recording folder (docs/recordings.md): all of them written, its images and its words read."""

from __future__ import annotations

import difflib
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from localsim.analysis.brain.recordings import Recording
from localsim.analysis.feature_store import refuse_existing, whole_folder
from localsim.data import ImageSet
from localsim.data.datasets import MAX_BYTES_IN_MEMORY
from localsim.data.images import EXTENSIONS, UnreadableImageError, decode, find_images
from localsim.errors import UserError
from localsim.files import write_json

ABOUT, IMAGES = "recording.json", "images"
# what numpy, zipfile and scipy raise for files that are not what their names say; RuntimeError for encrypted ones
DAMAGED = (OSError, ValueError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)
# what recording.json says once for all neurons, or the arrays for each
ONE_FOR_ALL = {"region": "regions", "subject": "subjects"}
# of the file systems in use, the strictest
_FILE_NAME = re.compile(r'[^./\\:*?"<>|\x00-\x1f][^/\\:*?"<>|\x00-\x1f]{0,199}')


def save_recording(recording: Recording, folder: str | Path) -> None:
    """Write `recording` as a new `folder`, whole or not at all; `load_recordings` gives back equal numbers and words.

    Images in memory become PNG files, image files are copied; either is called as its stimulus is.

    Raises:
        UserError: the folder exists already, it cannot be written, or a stimulus cannot be a file's name.
    """
    folder = Path(folder).absolute()
    refuse_existing(folder)
    _check_file_names(recording)
    about: dict[str, Any] = {"name": recording.name, "unit": recording.unit}
    for key in ("degrees", "bins", "repeats", "citation"):
        if getattr(recording, key) not in (None, ""):
            about[key] = getattr(recording, key)
    arrays = {"stimuli": np.array(recording.stimuli), "names": np.array(recording.names)}
    for key, field in ONE_FOR_ALL.items():
        words = getattr(recording, field)
        if len(set(words)) == 1:
            about[key] = words[0]
        else:
            arrays[field] = np.array(words)
    if recording.groups is not None:
        arrays["groups"] = np.array(recording.groups)
    if recording.responses is not None:
        arrays["responses"] = recording.responses
    else:
        assert recording.rdms is not None
        arrays["rdms"] = recording.rdms
    # the file is called as the array that it must have
    file = f"{'rdms' if recording.responses is None else 'responses'}.npz"

    try:
        with whole_folder(folder) as partial:
            (partial / IMAGES).mkdir()
            _write_images(recording, partial / IMAGES)
            np.savez_compressed(partial / file, **arrays)  # type: ignore[arg-type]
            write_json(partial / ABOUT, about)
    except OSError as error:
        raise UserError(f"the recording could not be written to {folder}: {error.strerror or error}") from error


# -- recording.json ---------------------------------------------------------------------------------------------------


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_spans(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(span, list) and len(span) == 2 and all(map(_is_number, span)) for span in value
    )


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda value: _is_text(value) and bool(value.strip()), "a text in quotes, not empty"),
    "unit": (_is_text, "a text in quotes"),
    "degrees": (_is_number, "a number"),
    "bins": (_are_spans, "a list of pairs [start, end] in milliseconds"),
    "region": (_is_text, "a text in quotes"),
    "subject": (_is_text, "a text in quotes"),
    "repeats": (_is_text, "a text in quotes"),
    "citation": (_is_text, "a text in quotes"),
}


def read_about(file: Path) -> dict[str, Any]:
    """Return the fields of a `recording.json`; UserError if it cannot be read or says what it cannot mean."""
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is no valid JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    if not isinstance(about, dict):
        raise UserError(f'{file} holds {type(about).__name__}; allowed: fields in braces, such as {{"name": "V4"}}')
    for key, value in about.items():
        if key not in _FIELDS:
            raise unknown_word(f"{file} has the field", key, _FIELDS)
        valid, allowed = _FIELDS[key]
        if not valid(value):
            raise UserError(f"{file} says {key} is {json.dumps(value)}; allowed: {allowed}")
    if "name" not in about:
        raise UserError(f'{file} has no field "name", which tables need; the other fields may be left out')
    return about


def unknown_word(where: str, word: str, allowed: Iterable[str]) -> UserError:
    """Return the error for a word that is not among the allowed ones, with the one that looks most like it."""
    allowed = list(allowed)
    close = difflib.get_close_matches(word, allowed, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UserError(f"{where} {word!r}, which is not known; {hint}allowed: {', '.join(allowed)}")


# -- images -----------------------------------------------------------------------------------------------------------


def image_files(folder: Path) -> dict[str, Path]:
    """Return the images below a folder by the names of the stimuli: the files' without their endings, `faces/07`.

    Raises:
        UserError: there are none, or two of one name.
    """
    files: dict[str, Path] = {}
    for path in find_images(folder):
        called = path.relative_to(folder).with_suffix("").as_posix()
        if called in files:
            raise UserError(f"{folder} has two images called {called!r}: {files[called].name} and {path.name}")
        files[called] = path
    if not files:
        raise UserError(f"{folder} holds no images; allowed: files that end in {', '.join(EXTENSIONS)}")
    return files


def images_of_rows(
    folder: Path, file: Path, shape: tuple[int, ...], stimuli: Sequence[str] | None
) -> tuple[ImageSet, tuple[str, ...]]:
    """Return the images in the order of the rows, and what they are called.

    Args:
        folder: of the images.
        file: with the rows, for errors.
        shape: of the responses `(rows, neurons, ...)` or of one RDM.
        stimuli: the image of each row; without it, rows are in the order of the images' names.

    Raises:
        UserError: images and rows do not belong together, or an image cannot be read.
    """
    files = image_files(folder)
    if stimuli is not None:
        check_stimuli(file, files, stimuli, shape[0])
    if len(files) != shape[0]:
        turned = shape[1] == len(files)
        hint = "; its second axis has as many: is it transposed?" if turned else ""
        raise UserError(f"{folder} holds {len(files)} images, but {file.name} has {shape[0]} rows{hint}")
    if stimuli is None:
        stimuli = sorted(files)
        _check_order(folder, file, stimuli)
    return _image_set([files[one] for one in stimuli]), tuple(stimuli)


def check_stimuli(file: Path, files: Mapping[str, Path], stimuli: Sequence[str], rows: int) -> None:
    """Raise UserError unless the `rows` of a `file` have one stimulus each, all different, each with an image."""
    if len(stimuli) != rows:
        raise UserError(f"{file} names {len(stimuli)} stimuli for {rows} rows; allowed: one for each row")
    if len(set(stimuli)) != rows:
        twice = next(one for one in stimuli if stimuli.count(one) > 1)
        raise UserError(f"{file} has several rows of stimulus {twice!r}; allowed: one, with trials as third axis")
    absent = [one for one in stimuli if one not in files]
    if absent:
        close = difflib.get_close_matches(absent[0], files, n=3) or list(files)[:3]
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise UserError(
            f"{file} has stimuli without an image in {IMAGES}/: {', '.join(map(repr, absent[:3]))}{more}; images there "
            f"are called {', '.join(map(repr, close))}{' and so on' if len(files) > len(close) else ''}"
        )


def _check_order(folder: Path, file: Path, called: list[str]) -> None:
    """Refuse names that text and numbers would order differently: nothing else would show a mix-up of rows."""
    by_number = sorted(called, key=_by_number)
    for text, number in zip(called, by_number, strict=True):
        if text != number:
            raise UserError(
                f"the order of the images in {folder} is not clear ({text!r} or {number!r} first?); give the array "
                f"'stimuli' in {file.name}, or write the numbers with equally many digits"
            )


def _by_number(text: str) -> list[str | int]:
    # split gives text and digits in turn, so that equal places compare
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", text))]


def _image_set(paths: list[Path]) -> ImageSet:
    kept: list[Tensor] | None = []
    for path in paths:
        try:
            image = decode(path)
        except UnreadableImageError as error:
            raise UserError(f"an image of the recording cannot be read: {error}") from None
        if kept is not None:
            kept.append(image)
            if image.shape != kept[0].shape or len(paths) * image.numel() > MAX_BYTES_IN_MEMORY:
                kept = None
    if kept is None:
        return ImageSet(None, tuple(path.absolute() for path in paths), None)
    return ImageSet(torch.stack(kept), None, None)


def _check_file_names(recording: Recording) -> None:
    taken: set[str] = set()
    for one in recording.stimuli:
        if not _FILE_NAME.fullmatch(one) or one.casefold() in taken:
            raise UserError(
                f"stimulus {one!r} of {recording.name} cannot be the name of an image file; allowed: different names, "
                'also without regard to case, that have no / \\ : * ? " < > | and do not begin with a dot'
            )
        taken.add(one.casefold())


def _write_images(recording: Recording, folder: Path) -> None:
    images = recording.images
    if images.images is not None:
        if images.images.dtype != torch.uint8:
            raise UserError(f"images of {recording.name} hold {images.images.dtype}; allowed: uint8")
        for called, image in zip(recording.stimuli, images.images, strict=True):
            Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(folder / f"{called}.png")
        return
    for called, path in zip(recording.stimuli, images.paths or (), strict=True):
        if path.suffix.lower() not in EXTENSIONS:
            raise UserError(f"image {path} has an unknown ending; allowed: {', '.join(EXTENSIONS)}")
        shutil.copyfile(path, folder / f"{called}{path.suffix}")
