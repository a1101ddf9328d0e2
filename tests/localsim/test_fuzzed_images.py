"""Fuzzed image files: decoded, or left out with a sentence that names them, whatever PIL makes of them."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import assert_sentence, fuzz, outcome
from hypothesis import strategies as st
from PIL import Image

from localsim.data import load_data, plain_batches
from localsim.data.datasets import Data, ImageSet
from localsim.data.images import EXTENSIONS, UnreadableImageError, decode, find_images, image_shape
from localsim.errors import UserError

SIZE = 12


def _encoded() -> list[bytes]:
    """Return small images in every format and mode that a folder may hold, 1 x 1 pixels too."""
    drawn = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    colour = Image.fromarray(drawn)
    deep = Image.fromarray(drawn[:, :, 0].astype(np.uint16) * 257)
    cases: list[tuple[Image.Image, str, dict]] = [
        *((colour, kind, {}) for kind in ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP", "GIF", "ICO")),
        *((colour.convert(mode), "PNG", {}) for mode in ("1", "L", "LA", "P", "RGBA")),
        *((colour.convert(mode), "TIFF", {}) for mode in ("1", "L", "CMYK", "P", "LAB", "F", "YCbCr")),
        *((colour, "TIFF", {"compression": kind}) for kind in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
        (deep, "PNG", {}),
        (deep, "TIFF", {}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour.convert("L"), "JPEG", {"progressive": True}),
        (colour.convert("P"), "PNG", {"transparency": b"\0\x80\xff"}),
        (colour.resize((1, 1)), "PNG", {}),
        (colour.resize((1, 1)), "JPEG", {}),
    ]
    encoded = []
    for image, kind, options in cases:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded.append(buffer.getvalue())
    return encoded


IMAGES = _encoded()


def damaged(data: bytes, kind: str, place: int, noise: bytes) -> bytes:
    place %= len(data)
    return {
        "whole": data,
        "cut": data[:place],
        "over": data[:place] + noise + data[place + len(noise) :],
        "between": data[:place] + noise + data[place:],
        "gone": data[:place] + data[place + len(noise) :],
        "alone": noise,
    }[kind]


# the heads of files decide what becomes of the rest: sizes, depths, offsets
PLACES = st.integers(0, 60) | st.integers(0, 2000)
NOISE = st.binary(max_size=8) | st.sampled_from(
    [b"\xff\xff\xff\x7f", b"\0\0\0\0", b"\xff" * 8, struct.pack(">I", 60000)]
)
KINDS = st.sampled_from(["whole", "cut", "over", "between", "gone", "alone"])
FILES = st.tuples(st.sampled_from(IMAGES), KINDS, PLACES, NOISE).map(lambda case: damaged(*case))


def decoded(path: Path) -> torch.Tensor | None:
    """Return what a file holds, after checking it, or None where it is refused with a sentence that names it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape = image_shape(path)
        try:
            image = decode(path)
        except UnreadableImageError as error:
            assert str(error).startswith(f"{path}: ")
            assert_sentence(str(error))
            return None
    assert image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3 and image.shape[1:] == shape
    return image


def test_any_bytes_are_an_image_or_not(tmp_path):
    both = [0, 0]

    def check(case: tuple[bytes, str]) -> None:
        data, extension = case
        file = tmp_path / f"image{extension}"
        file.write_bytes(data)
        both[decoded(file) is None] += 1

    fuzz(500, st.tuples(FILES, st.sampled_from(EXTENSIONS)), check)
    assert min(both) > 50  # images whose damage is in their pixels, and files that are none


@pytest.mark.parametrize("data", IMAGES, ids=range(len(IMAGES)))
def test_whole_images_are_decoded_where_their_range_is_known(data, tmp_path):
    (tmp_path / "image.png").write_bytes(data)
    is_float = Image.open(io.BytesIO(data)).mode == "F"
    assert (decoded(tmp_path / "image.png") is None) == is_float


# -- what claims to be larger than it is ------------------------------------------------------------------------------


def _png(width: int, height: int, rows: int = 1) -> bytes:
    """Return a black, grey PNG whose head claims a size, with the pixels of so many rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(1)
    pixels = b"".join([*(packer.compress(bytes(min(width, 10**5) + 1)) for _ in range(rows)), packer.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _ppm(width: int, height: int) -> bytes:
    return f"P6 {width} {height} 255\n".encode() + bytes(100)


def _bmp(width: int, height: int) -> bytes:
    return (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 200, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 1, 1, 0, 0) + bytes(100)
    )


def _whole_png(width: int, height: int) -> bytes:
    return _png(width, height, height if height == 12_000 else 1)


@pytest.mark.parametrize("make", [_png, _whole_png, _ppm, _bmp])
@pytest.mark.parametrize(
    "size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (12_000, 12_000), (2**31 - 1, 1), (1, 10**8)]
)
def test_a_small_file_that_claims_gigabytes_is_refused_before_they_are_taken(make, size, tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(make(*size))
    tracemalloc.start()
    try:
        before = _peak()
        assert decoded(file) is None
        assert tracemalloc.get_traced_memory()[1] < 2**24 and _peak() - before < 2**26
    finally:
        tracemalloc.stop()


def _peak() -> int:
    """Return the largest amount of memory that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# -- folders ----------------------------------------------------------------------------------------------------------


def _load(folder: Path) -> Data:
    return load_data(str(folder), image_size=SIZE)


def _folder(root: Path, files: list[bytes]) -> Path:
    """Make a folder of two classes, for training and for testing, whose files are `files`, and a good image each."""
    for number, data in enumerate([*IMAGES[:1] * 4, *files]):
        place = root / ("train", "val")[number // 2 % 2] / f"class{number % 2}" / f"image{number:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return root


def _total(data: Data) -> int:
    assert data.test is not None
    return len(data.train) + len(data.test) + data.num_skipped


def test_a_folder_of_any_files_is_a_data_set_or_refused(tmp_path):
    folders = iter(range(10**9))

    def check(files: list[bytes]) -> None:
        data = outcome(lambda: _load(_folder(tmp_path / str(next(folders)), files)))
        assert isinstance(data, Data)  # its four good images can be read
        assert data.train.images is None or _total(data) == 4 + len(files)

    fuzz(150, st.lists(FILES, max_size=6), check)


@pytest.mark.parametrize(("workers", "number"), [(0, 100), (1, 3)])
def test_any_files_are_streamed_or_left_out(workers, number, tmp_path):
    def check(files: list[bytes]) -> None:
        paths = []
        for place, data in enumerate([IMAGES[0], *files]):
            paths.append(tmp_path / f"{place:02}.jpg")
            paths[-1].write_bytes(data)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            images = ImageSet(None, tuple(paths), None)
            third = (0.5, 0.5, 0.5)
            batches = list(plain_batches(images, size=8, batch_size=3, mean=third, std=third, workers=workers))
        kept = torch.cat([batch.indices for batch in batches]).tolist()
        assert kept == [place for place, path in enumerate(paths) if decoded(path) is not None]
        left_out = [str(one.message) for one in told if str(one.message).startswith("skipped")]
        assert len(left_out) == len(paths) - len(kept)
        assert all(batch.views[0].isfinite().all() for batch in batches)

    fuzz(number, st.lists(FILES, max_size=8), check)


def test_what_is_no_file_is_left_out(tmp_path):
    folder = _folder(tmp_path / "images", [])
    one, other = (folder / "train" / name for name in ("class0", "class1"))
    (one / "folder.png").mkdir()
    (one / "nowhere.png").symlink_to(tmp_path / "nowhere")
    (one / "itself.png").symlink_to(one / "itself.png")
    os.mkfifo(other / "pipe.png")  # who opens it waits for a writer
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data = _load(folder)
    assert data.num_skipped == len(told) == 3
    assert sorted(Path(str(one.message).split(": ")[0].split(", ")[1]).name for one in told) == [
        "itself.png", "nowhere.png", "pipe.png"
    ]  # fmt: skip


def test_links_to_folders_above_have_no_end_and_are_left_out(tmp_path):
    folder = _folder(tmp_path / "images", []) / "train"
    plain = find_images(folder)
    for name in ("up", "again"):  # two: their combinations would be 2^40
        (folder / "class0" / name).symlink_to(folder)
    (folder / "class1" / "beside").symlink_to(folder / "class0")
    (folder / "class0" / "beside").symlink_to(folder / "class1")
    beside = [folder / a / "beside" / file.name for a, b in (("class0", "class1"), ("class1", "class0"))
              for file in (folder / b).glob("*.png")]  # fmt: skip
    assert find_images(folder) == sorted([*plain, *beside])


@pytest.mark.skipif(os.geteuid() == 0, reason="to root everything is readable")
def test_what_may_not_be_read_is_named(tmp_path):
    folder = _folder(tmp_path / "images", [])
    closed = folder / "train" / "class0" / "closed"
    closed.mkdir(mode=0)
    extra = folder / "train" / "class1" / "extra.png"
    extra.write_bytes(IMAGES[0])
    extra.chmod(0)
    with pytest.warns(UserWarning, match=r"skipped .*(closed|extra\.png): Permission denied") as told:
        assert _load(folder).num_skipped == 1
    assert len(told) == 2
    closed.chmod(0o700)


def test_a_folder_that_cannot_be_listed_is_told_of(tmp_path, monkeypatch):
    folder = _folder(tmp_path / "images", [])
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("class1"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.warns(UserWarning, match="skipped a folder that cannot be read, .*class1: Permission denied"):
        assert {path.parent.name for path in find_images(folder)} == {"class0"}


@pytest.mark.parametrize("name", ["\0", "x" * 9000, "x/" * 9000, "\ud800", "a\nb"])
def test_names_that_no_folder_has(name):
    error = outcome(lambda: load_data(name, image_size=SIZE))
    assert isinstance(error, UserError) and "unknown data set" in str(error)
