"""Image files: finding them in a folder, and decoding them whole or not at all."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from localsim.files import cause

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
"""File names that count as images, in any case."""


class UnreadableImageError(Exception):
    """A file cannot be decoded as an image; the message names the file and the reason."""


def find_images(folder: Path) -> list[Path]:
    """Return the image files below `folder`, sorted; links are followed, hidden files and folders left out."""
    found = []
    above = {os.fspath(folder): (os.path.realpath(folder),)}
    for parent, folders, files in os.walk(folder, onerror=_warn_of_folder, followlinks=True):
        places = above.pop(parent)
        inner = {name: os.path.realpath(Path(parent, name)) for name in folders}
        # a link to a folder above itself has no end
        folders[:] = [n for n in folders if not n.startswith((".", "__MACOSX")) and inner[n] not in places]
        above |= {os.path.join(parent, name): (*places, inner[name]) for name in folders}  # noqa: PTH118 - as os.walk
        found += [
            Path(parent, name) for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found)


def _warn_of_folder(error: OSError) -> None:
    warnings.warn(f"skipped a folder that cannot be read, {error.filename}: {error.strerror}", stacklevel=2)


def image_shape(path: Path) -> tuple[int, int] | None:
    """Return height and width from the file's head, without decoding; None if it has none."""
    try:
        with _opened(path) as image:
            return image.height, image.width
    except Exception:  # see `decode`
        return None


def decode(path: Path) -> Tensor:
    """Decode a file to `(3, H, W)` uint8 RGB; grey becomes three equal channels, 16-bit grey keeps its upper bits.

    In memory the three values of a pixel lie together, as PIL has them and as torch resamples bytes fastest.
    Not for several threads at once: strictness is a switch of PIL's that holds for the whole process.

    Raises:
        UnreadableImageError: if the file is missing, truncated or no image, has more pixels than PIL holds to be
            harmless, or holds floats (whose range is unknown).
    """
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        # other libraries set this switch, and a truncated image would then come out grey below the break
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        with _opened(path) as image:
            image.load()
            pixels = _rgb(image)
    except Exception as error:  # of a damaged file PIL's readers raise whatever their arithmetic ends in
        raise UnreadableImageError(f"{path}: {cause(error)}") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
    return torch.from_numpy(pixels).permute(2, 0, 1)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    # an open file may stand for a path, as to PIL
    if isinstance(path, Path) and not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no file")  # a pipe would be waited for
    with warnings.catch_warnings():
        # a small file can claim gigabytes; PIL itself only warns of up to twice as many pixels
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            yield image


def _rgb(image: Image.Image) -> np.ndarray:
    """Return `(H, W, 3)` uint8, converting the modes that PIL itself would clip or warn about."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))
