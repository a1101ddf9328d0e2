"""Image files: finding them in a folder, and decoding them whole or not at all."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
"""File names that count as images, in any case."""

# what PIL raises for files that are missing, truncated or no images
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class UnreadableImageError(Exception):
    """A file cannot be decoded as an image; the message names the file and the reason."""


def find_images(folder: Path) -> list[Path]:
    """Return the image files below `folder`, sorted; links are followed, hidden files and folders left out."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        found += [
            Path(parent, name) for name in files if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found)


def image_shape(path: Path) -> tuple[int, int] | None:
    """Return height and width from the file's head, without decoding; None if it has none."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except _DECODING_ERRORS:
        return None


def decode(path: Path) -> Tensor:
    """Decode a file to `(3, H, W)` uint8 RGB; grey becomes three equal channels, 16-bit grey keeps its upper bits.

    In memory the three values of a pixel lie together, as PIL has them and as torch resamples bytes fastest.
    Not for several threads at once: strictness is a switch of PIL's that holds for the whole process.

    Raises:
        UnreadableImageError: if the file is missing, truncated or no image, or holds floats (whose range is unknown).
    """
    lenient = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        # other libraries set this switch, and a truncated image would then come out grey below the break
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        with Image.open(path) as image:
            image.load()
            pixels = _rgb(image)
    except _DECODING_ERRORS as error:
        raise UnreadableImageError(f"{path}: {error}") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
    return torch.from_numpy(pixels).permute(2, 0, 1)


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
