"""The number of classes is the one that `load_data` finds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localsim.data import count_classes, load_data
from localsim.errors import UserError


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(path)
    return path


def classes_in(folder: Path, *names: str) -> Path:
    for name in names:
        for i in range(2):
            save(folder / name / f"{i}.png")
    return folder


def loaded(folder: Path) -> int:
    return len(load_data(str(folder), image_size=8).classes)


@pytest.mark.parametrize(("name", "number"), [("cifar10", 10), ("cifar100", 100), ("stl10", 10), ("imagenet", 1000)])
def test_named_data_sets_need_not_be_there(name, number, tmp_path):
    assert count_classes(name, tmp_path) == number


def test_the_embedded_set_has_as_many_as_it_renders():
    assert count_classes("embedded") == len(load_data("embedded", image_size=8, train_images=10).classes) == 10


def test_the_part_of_imagenet_that_is_there_counts(tmp_path, monkeypatch):
    for split in ("train", "val"):
        classes_in(tmp_path / "imagenet" / split, "n01", "n02", "n03")
    assert count_classes("imagenet", tmp_path) == count_classes("imagenet", tmp_path / "imagenet") == 3
    monkeypatch.setenv("LOCALSIM_DATA", str(tmp_path))
    assert count_classes("imagenet") == 3


def test_class_folders_count_and_empty_or_hidden_ones_do_not(tmp_path):
    folder = classes_in(tmp_path, "cat", "dog", "val", ".hidden")
    (folder / "empty").mkdir()
    assert count_classes(str(folder)) == loaded(folder) == 3


def test_classes_of_a_train_folder_count(tmp_path):
    classes_in(tmp_path / "train", "cat", "dog")
    classes_in(tmp_path / "val", "cat")
    classes_in(tmp_path / "else", "horse")
    assert count_classes(str(tmp_path)) == loaded(tmp_path) == 2


def test_fewer_than_two_class_folders_are_none(tmp_path):
    flat, single = tmp_path / "flat", classes_in(tmp_path / "single", "cat")
    save(flat / "a.png")
    for folder in (flat, single):
        assert count_classes(str(folder)) is None and loaded(folder) == 0


def test_images_are_not_opened(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name / "0.png").write_bytes(b"no image")
    assert count_classes(str(tmp_path)) == 2


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^unknown data set 'cifar11'.*embedded, cifar10, cifar100, stl10, imagenet"):
        count_classes("cifar11")
    with pytest.raises(UserError, match="holds no images"):
        count_classes(str(tmp_path))
