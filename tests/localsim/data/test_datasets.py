"""Data sets by name and from folders."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from localsim.data import datasets as module
from localsim.data import embedded, load_data
from localsim.data.datasets import ImageSet
from localsim.data.images import UnreadableImageError, decode
from localsim.errors import UserError


def load(name, **options):
    return load_data(str(name), image_size=32, **options)


def save(path: Path, value: int | np.ndarray = 0, size: tuple[int, int] = (6, 8)) -> Path:
    """Write a PNG of one value, or of the pixels given."""
    pixels = np.full((*size, 3), value, dtype=np.uint8) if isinstance(value, int) else value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def class_folder(folder: Path, num: int = 10, **options) -> Path:
    """Two classes of `num` images; the values 0, 1, ... (cat) and 100, 101, ... (dog) name them."""
    for label, name in enumerate(("cat", "dog")):
        for i in range(num):
            save(folder / name / f"{i:03}.png", 100 * label + i, **options)
    return folder


def names(images: ImageSet) -> list[int]:
    assert images.images is not None
    return images.images[:, 0, 0, 0].tolist()


# --- the embedded set


def test_embedded_is_the_same_whatever_the_seed_and_its_splits_differ():
    first = load_data("embedded", image_size=16, train_images=20, test_images=20, seed=0)
    other = load_data("embedded", image_size=16, train_images=20, test_images=20, seed=1)
    assert first.classes == embedded.CLASSES
    assert first.train.images is not None and other.train.images is not None
    assert first.test is not None and first.test.images is not None
    assert torch.equal(first.train.images, other.train.images)
    assert not torch.equal(first.train.images, first.test.images)
    assert first.train.images.shape == (20, 3, 16, 16) and first.probe_train is first.train


def test_embedded_default_sizes(monkeypatch):
    asked = []

    def render(num_images, size, seed):
        asked.append((num_images, size))
        return torch.zeros(num_images, 3, size, size, dtype=torch.uint8), torch.zeros(num_images, dtype=torch.int64)

    monkeypatch.setattr(embedded, "render", render)
    data = load_data("embedded", image_size=8)
    assert asked == [(module.EMBEDDED_TRAIN_IMAGES, 8), (module.EMBEDDED_TEST_IMAGES, 8)]
    assert data.mean == (0, 0, 0) and data.std == (1 / 255,) * 3  # a channel without contrast is not divided by zero


# --- folders


def test_class_folders_are_split_by_class_and_file_name(tmp_path):
    here = load(class_folder(tmp_path / "a"))
    moved = load(class_folder(tmp_path / "b"))
    other = load(tmp_path / "a", seed=1)
    assert here.classes == ("cat", "dog")
    assert here.test is not None and here.test.labels is not None and here.train.labels is not None
    assert here.test.labels.tolist() == [0, 0, 1, 1] and here.train.labels.tolist() == [0] * 8 + [1] * 8
    assert sorted(names(here.train) + names(here.test)) == [*range(10), *range(100, 110)]
    assert moved.test is not None and names(here.test) == names(moved.test)
    assert other.test is not None and names(here.test) != names(other.test)
    assert here.probe_train is here.train and here.num_skipped == 0


def test_train_and_val_folders_are_recognised(tmp_path):
    class_folder(tmp_path / "train", 4)
    save(tmp_path / "val" / "dog" / "x.png", 200)
    data = load(tmp_path)
    assert data.test is not None and data.test.labels is not None
    assert len(data.train) == 8 and data.test.labels.tolist() == [1] and names(data.test) == [200]


def test_a_test_class_without_training_images_is_refused(tmp_path):
    class_folder(tmp_path / "train", 2)
    save(tmp_path / "test" / "horse" / "x.png")
    with pytest.raises(UserError, match=r"has classes that .* lacks: horse"):
        load(tmp_path)


def test_a_flat_folder_is_unlabelled(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", i)
    save(tmp_path / ".hidden.png", 9)
    (tmp_path / "notes.txt").write_text("no image")
    data = load(tmp_path)
    assert names(data.train) == [0, 1, 2]
    assert data.train.labels is None and data.test is None and data.probe_train is None and data.classes == ()
    with pytest.raises(UserError, match=r"no labelled images"):
        load(tmp_path, test_images=1)


def test_images_beside_class_folders_are_refused(tmp_path):
    save(class_folder(tmp_path, 2) / "loose.png")
    with pytest.raises(UserError, match=r"1 images beside 2 class folders"):
        load(tmp_path)


def test_folders_without_readable_images_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no images"):
        load(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no image")
    with (
        pytest.warns(UserWarning, match=r"a\.png"),
        pytest.raises(UserError, match=r"none of the 1 images .* can be read"),
    ):
        load(tmp_path)
    for i, size in enumerate([(6, 8), (8, 6)]):
        truncate(save(tmp_path / f"{i}.png", np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)))
    with pytest.raises(UserError, match=r"none of the images .* can be read"):
        load(tmp_path)


@pytest.mark.parametrize("lenient", [False, True])
def test_a_truncated_image_is_left_out_named_and_counted(tmp_path, monkeypatch, lenient):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)  # as other libraries leave it
    class_folder(tmp_path / "train", 3)
    class_folder(tmp_path / "val", 1)
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    truncate(save(tmp_path / "train" / "cat" / "001.png", noise))
    with pytest.warns(UserWarning, match=r"cat.001\.png") as caught:
        data = load(tmp_path)
    assert len(caught) == 1 and data.num_skipped == 1
    assert names(data.train) == [0, 2, 100, 101, 102]
    assert data.train.labels is not None and data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES


def test_images_of_several_sizes_or_too_many_are_streamed(tmp_path, monkeypatch):
    class_folder(tmp_path, 3)
    in_memory = load(tmp_path)
    assert in_memory.train.paths is None
    monkeypatch.setattr(module, "MAX_BYTES_IN_MEMORY", 6 * 8 * 3 * 6 - 1)
    streamed = load(tmp_path)
    assert streamed.train.images is None and streamed.train.paths is not None
    assert [decode(path)[0, 0, 0].item() for path in streamed.train.paths] == names(in_memory.train)
    monkeypatch.undo()
    save(tmp_path / "dog" / "large.png", size=(9, 9))
    assert load(tmp_path).train.paths is not None


def test_statistics_are_those_of_the_training_images(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        save(tmp_path / f"{i}.png", image)
    data = load(tmp_path)
    np.testing.assert_allclose(data.mean, (pixels / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.std, (pixels / 255).std((0, 1, 2)), rtol=1e-12)


# --- fewer images


def test_fewer_training_images_are_balanced_nested_and_the_same_for_every_seed(tmp_path):
    class_folder(tmp_path / "train", 10)
    class_folder(tmp_path / "val", 4)
    chosen = {n: load(tmp_path, train_images=n, test_images=3) for n in (6, 7, 20)}
    small, larger = chosen[6].train, chosen[7].train
    assert small.labels is not None and small.labels.bincount().tolist() == [3, 3]
    assert set(names(small)) < set(names(larger)) and names(small) != [0, 1, 2, 100, 101, 102]
    assert names(load(tmp_path, train_images=6, seed=5).train) == names(small)
    assert len(chosen[20].train) == 20 and chosen[20].test is not None and len(chosen[20].test) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_images": 17}, "train_images is 17, but there are only 16"),
        ({"test_images": 5}, "test_images is 5, but there are only 4"),
        ({"train_images": 0}, "train_images is 0; it must be at least 1"),
    ],
)
def test_impossible_numbers_of_images_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        load(class_folder(tmp_path), **options)


def test_a_choice_of_less_than_one_image_is_refused():
    images = ImageSet(torch.zeros(6, 3, 2, 2, dtype=torch.uint8), None, torch.arange(6) % 2)
    assert len(module.class_balanced(images, 1, "test")) == 1
    for limit in (0, -5):
        with pytest.raises(UserError, match=f"number of images is {limit}; allowed: 1 or more"):
            module.class_balanced(images, limit, "test")


# --- named sets


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        UserError, match=r"'cifar11': it is neither one of embedded, cifar10, .* nor a folder that exists"
    ):
        load("cifar11")


def cifar10_files(root: Path) -> np.ndarray:
    """Write a data set of 12 images in CIFAR-10's layout; the image with value v has label v % 10."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.repeat(np.arange(12, dtype=np.uint8)[:, None], 3072, axis=1)
    pixels[:, :1024] += 100  # red comes first
    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, batch in enumerate(batches):
        part = slice(2 * i, 2 * i + 2)
        content = {"data": pixels[part], "labels": [v % 10 for v in range(12)][part]}
        (folder / batch).write_bytes(pickle.dumps(content))
    label_names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": label_names}))
    return pixels.reshape(12, 3, 32, 32)


def test_cifar10_is_read_from_its_batches(tmp_path, monkeypatch):
    from torchvision.datasets import cifar

    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    pixels = cifar10_files(tmp_path)
    data = load("cifar10", root=tmp_path)
    assert data.train.images is not None and data.train.labels is not None and data.test is not None
    assert np.array_equal(data.train.images.numpy(), pixels[:10])
    assert data.train.labels.tolist() == list(range(10)) and len(data.test) == 2
    assert data.classes[9] == "truck" and data.mean[0] == 0.4914
    monkeypatch.setenv("LOCALSIM_DATA", str(tmp_path))
    assert len(load("cifar10", train_images=3).train) == 3


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_a_download_that_fails_says_where_files_were_looked_for(tmp_path, monkeypatch, name):
    from torchvision.datasets import cifar, stl10

    def offline(*_, **__):
        raise URLError("no network")

    for source in (cifar, stl10):
        monkeypatch.setattr(source, "download_and_extract_archive", offline)
    with pytest.raises(UserError, match=f"{name} is not in .*{tmp_path.name} and could not be downloaded.*no network"):
        load(name, root=tmp_path)


def test_stl10_learns_from_the_unlabelled_images_and_probes_on_the_labelled(tmp_path, monkeypatch):
    from torchvision.datasets import stl10

    monkeypatch.setattr(stl10, "check_integrity", lambda *_: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for split, num in (("unlabeled", 5), ("train", 4), ("test", 3)):
        np.repeat(np.arange(num, dtype=np.uint8), 3 * 96 * 96).tofile(folder / f"{split}_X.bin")
        np.arange(1, num + 1, dtype=np.uint8).tofile(folder / f"{split}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    (folder / "fold_indices.txt").write_text("0")
    data = load("stl10", root=tmp_path)
    assert data.probe_train is not None and data.probe_train.labels is not None and data.test is not None
    assert names(data.train) == [0, 1, 2, 3, 4] and data.train.labels is None
    assert data.probe_train.labels.tolist() == [0, 1, 2, 3] and len(data.test) == 3
    assert data.classes == tuple("abcdefghij")


@pytest.mark.parametrize("inside", ["", "imagenet"])
def test_imagenet_is_streamed_from_its_folders(tmp_path, inside):
    with pytest.raises(UserError, match="imagenet was looked for in"):
        load("imagenet", root=tmp_path)
    class_folder(tmp_path / inside / "train", 2)
    class_folder(tmp_path / inside / "val", 1)
    data = load("imagenet", root=tmp_path)
    assert data.train.paths is not None and len(data.train) == 4
    assert data.test is not None and len(data.test) == 2 and data.mean == (0.485, 0.456, 0.406)


# --- files


def test_grey_palette_and_16_bit_images_become_rgb(tmp_path):
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    for name in ("grey.png", "grey16.png"):
        assert np.array_equal(decode(tmp_path / name).numpy(), np.stack([grey] * 3))
    palette = Image.fromarray(grey).convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decode(tmp_path / "palette.png").numpy(), np.stack([grey] * 3))


def test_floats_and_missing_files_are_unreadable(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UnreadableImageError, match=r"float\.tif: floating-point"):
        decode(tmp_path / "float.tif")
    with pytest.raises(UnreadableImageError, match=r"gone\.png"):
        decode(tmp_path / "gone.png")


def test_an_image_set_holds_images_or_paths():
    with pytest.raises(ValueError, match="either"):
        ImageSet(None, None, None)
    with pytest.raises(ValueError, match=r"1 images have 2 labels"):
        ImageSet(None, (Path("a"),), torch.tensor([0, 1]))
    chosen = ImageSet(None, (Path("a"), Path("b")), torch.tensor([5, 6])).subset([1])
    assert chosen.paths == (Path("b"),) and chosen.labels is not None and chosen.labels.tolist() == [6]


# --- real images

SHARED = Path(os.environ.get("LOCALSIM_SHARED_DATA") or Path(__file__).parents[4] / "shared" / "data")
TINY = SHARED / "images" / "tinyimagenet" / "tin10.zip"


@pytest.mark.skipif(not TINY.is_file(), reason="Tiny ImageNet is not beside the repository")
def test_tiny_imagenet(tmp_path):
    wanted = ("n01443537", "n02056570", "n04146614")
    with zipfile.ZipFile(TINY) as archive:
        members = [name for name in archive.namelist() if name.split("/")[1:2] and name.split("/")[1] in wanted]
        archive.extractall(tmp_path, members)
        member = sorted(m for m in members if m.startswith("val/"))[0]
        expected = np.array(Image.open(io.BytesIO(archive.read(member))).convert("RGB"))
    data = load(tmp_path, train_images=300)
    assert data.classes == wanted and data.train.labels is not None and data.test is not None
    assert data.train.labels.bincount().tolist() == [100] * 3 and len(data.test) == 150
    assert data.test.images is not None and np.array_equal(data.test.images[0].permute(1, 2, 0).numpy(), expected)
