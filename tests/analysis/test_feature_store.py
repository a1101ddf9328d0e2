from __future__ import annotations

import subprocess
import sys
import zipfile

import numpy as np
import pytest

from localsim.analysis.feature_store import Features, cached, copy_folder, new_folder, read_folder
from localsim.errors import UserError

RNG = np.random.default_rng(0)
ARRAYS = {"stage1": RNG.normal(size=(6, 3)).astype(np.float32), "a/b c.é": RNG.normal(size=(6, 2)).astype(np.float32)}


def some(labels: list[int] | None = None) -> Features:
    return Features.of_arrays(ARRAYS, name="mine", labels=labels)


def fill(writer) -> None:
    for part in (slice(0, 4), slice(4, 6)):
        for name, array in ARRAYS.items():
            writer.add(name, array[part])
    writer.finish({"source": "mine"}, None, np.arange(6))


def assert_same(here: Features, there: Features) -> None:
    assert here.names == there.names and all(np.array_equal(here[name], there[name]) for name in here)
    assert here.record == there.record and np.array_equal(here.indices, there.indices)
    assert (here.labels is None) == (there.labels is None)
    assert here.labels is None or np.array_equal(here.labels, there.labels)


def left_over(folder) -> list[str]:
    return [path.name for path in folder.rglob("*.partial")]


# -- the mapping ------------------------------------------------------------------------------------------------------


def test_features_are_a_mapping_that_shows_itself():
    made = some([0, 1, 2, 0, 1, 2])
    assert dict(made) == {name: made[name] for name in ARRAYS} and len(made) == 2 and "stage1" in made
    assert repr(made).splitlines() == ["Features of mine: n = 6", "  stage1   (6, 3)", "  a/b c.é  (6, 2)"]
    assert made != some() and made == made and len({made, made}) == 1
    chosen = made.select(["a/b c.é"])
    assert chosen.names == chosen.record["layers"] == ["a/b c.é"] and chosen.labels is made.labels
    with pytest.raises(UserError, match=r"no features of layer 'stage2'; there are: stage1$"):
        made.select(["stage2"])


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"x": np.zeros(3)}, r"layer x is an array float64 \(3,\); allowed: numbers \(n, d\)"),
        ({"x": np.zeros((3, 0))}, "layer x is an array"),
        ({"x": np.array([["a"]])}, "layer x is an array <U1"),
        ({"x": np.array([[object()]])}, "layer x is an array object"),
        ({"x": [[1.0], [np.nan]]}, "layer x holds values that are not finite"),
        ({"x": np.zeros((3, 1)), "y": np.zeros((2, 1))}, r"layers of it have \[2, 3\] rows"),
        ({}, "layers of it have no rows"),
    ],
)
def test_arrays_that_are_no_features_are_refused(arrays, told):
    with pytest.raises(UserError, match=told):
        Features.of_arrays(arrays, name="it")


def test_labels_have_one_entry_per_row():
    with pytest.raises(UserError, match=r"labels of mine have shape \(2,\); allowed: \(6,\)"):
        some([1, 2])


# -- one file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [None, [0, 1, 2, 0, 1, 2]])
def test_a_saved_file_gives_the_same_back_and_numpy_reads_it(tmp_path, labels):
    made = some(labels)
    made.save(tmp_path / "mine.npz")
    assert_same(Features.load(tmp_path / "mine.npz"), made)
    with np.load(tmp_path / "mine.npz", allow_pickle=False) as file:
        assert np.array_equal(file["stage1"], ARRAYS["stage1"])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.npz"]


def test_a_file_that_holds_no_features_is_one_sentence(tmp_path):
    damaged = tmp_path / "damaged.npz"
    some().save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:-30])
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "pickled.npz", "w") as archive:
        archive.writestr("x.npy", b"\x80\x04N.")
    for name in ("damaged.npz", "text.npz", "other.npz", "array.npy", "pickled.npz", "absent.npz"):
        with pytest.raises(UserError, match=f"{name} holds no features that can be read: "):
            Features.load(tmp_path / name)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_holds_ordinary_npy_files_mapped_when_read(tmp_path):
    with new_folder(tmp_path / "deep" / "here") as writer:
        fill(writer)
    made = Features.load(tmp_path / "deep" / "here")
    assert all(isinstance(array, np.memmap) and np.array_equal(array, ARRAYS[name]) for name, array in made.items())
    assert np.array_equal(np.load(tmp_path / "deep/here/stage1.npy"), ARRAYS["stage1"])
    assert_same(read_folder(tmp_path / "deep/here", verify=True), made)
    assert_same(copy_folder(made, tmp_path / "copy"), made)


def test_a_folder_that_is_not_finished_does_not_appear(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "here") as writer:
        writer.add("stage1", ARRAYS["stage1"])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "empty").mkdir()
    copy_folder(some(), tmp_path / "empty")
    with pytest.raises(UserError, match="empty exists already"), new_folder(tmp_path / "empty"):
        raise AssertionError("not entered")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(UserError, match=r"features could not be written to .*here: "),
        new_folder(tmp_path / "file/here"),
    ):
        raise AssertionError("not entered")


# -- the cache --------------------------------------------------------------------------------------------------------


def test_an_entry_is_made_once(tmp_path):
    made = []

    def make(writer) -> None:
        made.append(1)
        fill(writer)

    first, second = cached(tmp_path, "key", make), cached(tmp_path, "key", make)
    assert_same(first, second)
    cached(tmp_path, "other", make)
    assert len(made) == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["key", "other"]


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def another_format(path) -> None:
    path.write_text(path.read_text().replace('"format": 1', '"format": 0'))


@pytest.mark.parametrize("file", ["stage1.npy", "rows.npz", "features.json"])
@pytest.mark.parametrize("damage", [cut, lengthen, flip, lambda path: path.unlink(), another_format])
def test_a_damaged_entry_is_made_again(tmp_path, file, damage):
    if damage is another_format and file != "features.json":
        pytest.skip("only the record tells the format")
    if damage in (lengthen, flip, cut) and file == "features.json":
        damage = lambda path: path.write_text('{"format": 1}')  # noqa: E731
    cached(tmp_path, "key", fill)
    damage(tmp_path / "key" / file)
    made = []

    def make(writer) -> None:
        made.append(1)
        fill(writer)

    again = cached(tmp_path, "key", make)
    assert made == [1] and all(np.array_equal(again[name], ARRAYS[name]) for name in ARRAYS)
    assert left_over(tmp_path) == []


def test_the_faster_of_two_writers_is_believed(tmp_path):
    def make(writer) -> None:
        fill(writer)
        with new_folder(tmp_path / "key") as other:  # another process, in between
            fill(other)

    assert np.array_equal(cached(tmp_path, "key", make)["stage1"], ARRAYS["stage1"])
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_an_error_while_an_entry_is_made_leaves_nothing(tmp_path):
    def make(writer) -> None:
        writer.add("stage1", ARRAYS["stage1"])
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        cached(tmp_path, "key", make)
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys
from pathlib import Path
import numpy as np
from localsim.analysis.feature_store import cached
array = np.arange(3000.0).reshape(1000, 3)
def fill(writer):
    writer.add("stage1", array)
    writer.finish({}, None, np.arange(1000))
for turn in range(10):
    assert np.array_equal(cached(Path(sys.argv[1]), f"key{turn}", fill)["stage1"], array)
"""


def test_several_processes_share_a_cache(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    told = [writer.communicate()[0] for writer in writers]
    assert told == ["", ""] and [writer.returncode for writer in writers] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 10 and left_over(tmp_path) == []
