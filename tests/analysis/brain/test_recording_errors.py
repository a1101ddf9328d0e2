"""What is wrong with a recording folder is said in one sentence, and no code in a file is ever run."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recording_folders import by_hand, pixels, refused, responses

from localsim.analysis.brain.loading import load_recordings


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder by hand, as any program may have written it."""
    return by_hand(tmp_path / "mine")


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", "nowhere does not exist; allowed: a folder with a recording, see docs/recordings.md")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "file is a file; allowed: a folder")


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["recording.json"], "it has no recording.json;"),
        (["responses.npz"], "it has no responses.npz;"),
        (["images"], "it has no images/;"),
        (["images", "responses.npz"], "it has no images/ and no responses.npz;"),
        (["responses.npz", "recording.json"], "it has no responses.npz and no recording.json;"),
        (["images", "responses.npz", "recording.json"], "it has no images/ and no responses.npz and no recording.json"),
    ],
)
def test_parts_that_are_missing(folder, gone, said):
    for part in gone:
        (folder / part).rename(folder.parent / part)
    layout = "a recording folder holds images/, responses.npz (or responses.nc, or rdms.npz) and recording.json"
    refused(folder, f"{folder} is no recording: ", said, layout, "see docs/recordings.md")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "a",\n "unit" "spikes"}', "is no valid JSON: Expecting ':' delimiter in line 2, column 9"),
        ("", "is no valid JSON"),
        ("[1]", 'holds list; allowed: fields in braces, such as {"name": "V4"}'),
        ("{}", 'has no field "name"'),
        ('{"name": "a", "degree": 8}', "has the field 'degree', which is not known; did you mean 'degrees'? allowed: "),
        ('{"name": "a", "x": 8}', "has the field 'x', which is not known; allowed: name, unit, degrees"),
        ('{"name": ""}', 'says name is ""; allowed: a text in quotes, not empty'),
        ('{"name": "a", "unit": 3}', "says unit is 3; allowed: a text in quotes"),
        ('{"name": "a", "degrees": "8"}', 'says degrees is "8"; allowed: a number'),
        ('{"name": "a", "degrees": true}', "says degrees is true; allowed: a number"),
        ('{"name": "a", "degrees": -8}', "degrees of a is -8; allowed: above 0"),
        ('{"name": "a", "bins": [70, 170]}', "says bins is [70, 170]; allowed: a list of pairs [start, end]"),
        ('{"name": "a", "bins": [[0, 1], [1, 2]]}', "a has 2 bins, but its responses 1"),
        ('{"name": "a", "bins": [[2, 1]]}', "each ends after it starts"),
    ],
)
def test_recording_json_that_is_wrong(folder, text, said):
    (folder / "recording.json").write_text(text)
    refused(folder, said)


def test_recording_json_that_is_no_text(folder):
    (folder / "recording.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, "recording.json cannot be read")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"X": responses(), "y": np.ones(3)}, "has no array 'responses'; it has 'X', 'y'"),
        ({}, "has no array 'responses'; it has nothing"),
        (
            {"responses": responses(), "region": np.array(["a"])},
            "has an array 'region', which is not known; did you mean 'regions'? allowed: responses, regions",
        ),
        ({"responses": np.ones(5)}, "have shape (5,); allowed: (images, neurons), with trials as third"),
        ({"responses": np.ones((5, 0))}, "have shape (5, 0)"),
        ({"responses": np.ones((5, 2, 1, 1, 1))}, "have shape (5, 2, 1, 1, 1)"),
        ({"responses": np.full((5, 2), "x")}, "are of type <U1; allowed: numbers"),
        ({"responses": np.ones((5, 2), dtype=complex)}, "are of type complex128; allowed: numbers"),
        ({"responses": np.full((5, 2), np.nan)}, "no response of neuron 1 to image 1"),
        ({"responses": np.ones((4, 2))}, "images holds 5 images, but responses.npz has 4 rows"),
        ({"responses": np.ones((3, 5))}, "holds 5 images, but responses.npz has 3 rows; its second axis has as many"),
        (
            {"responses": np.ones((5, 2)), "regions": np.array("V4")},
            "is of type <U2, shape (); allowed: a row of words",
        ),
        (
            {"responses": np.ones((5, 2)), "names": np.ones(2)},
            "is of type float64, shape (2,); allowed: a row of words",
        ),
        ({"responses": np.ones((5, 2)), "regions": np.array(["V4"])}, "has 1 regions, but needs 2"),
        ({"responses": np.ones((5, 2)), "groups": np.array(["V4"])}, "has 1 groups, but needs 5"),
        ({"responses": np.ones((5, 2)), "stimuli": np.array(["im0"])}, "names 1 stimuli for 5 rows"),
        ({"responses": np.ones((5, 2)), "stimuli": np.array(["im0"] * 5)}, "several rows of stimulus 'im0'"),
        (
            {"responses": np.ones((5, 2)), "stimuli": np.array(["im0", "im1", "im2", "im3.png", "im4"])},
            "has stimuli without an image in images/: 'im3.png'; images there are called 'im3'",
        ),
        (
            {"responses": np.ones((5, 2)), "stimuli": np.array(list("abcde"))},
            "images/: 'a', 'b', 'c' and 2 more; images there are called 'im0', 'im1', 'im2' and so on",
        ),
        (
            {"responses": np.ones((4, 2)), "stimuli": np.array(["im0", "im1", "im2", "im3"])},
            "holds 5 images, but responses.npz has 4 rows",
        ),
    ],
)
def test_responses_that_are_wrong(folder, arrays, said):
    np.savez(folder / "responses.npz", **arrays)
    refused(folder, said)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"responses": np.eye(5)}, "has no array 'rdms'; it has 'responses'"),
        ({"rdms": np.ones((5, 4))}, "have shape (1, 5, 4); allowed: (images, images) or (matrices, images, images)"),
        ({"rdms": 1 - np.eye(4)}, "holds 5 images, but rdms.npz has 4 rows"),
        ({"rdms": np.eye(5)}, "rdms of mine are not symmetric with zeros on the diagonal"),
        ({"rdms": 1 - np.eye(5), "regions": np.array(["a", "b"])}, "has 2 regions, but needs 1"),
    ],
)
def test_matrices_that_are_wrong(folder, arrays, said):
    (folder / "responses.npz").unlink()
    np.savez(folder / "rdms.npz", **arrays)
    refused(folder, said)


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path(sys.argv[0]).parent / "never",))


def test_code_in_a_file_is_never_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "program")])
    np.savez(folder / "responses.npz", responses=responses(), regions=np.array([Bomb()] * 3, dtype=object))
    refused(folder, "'regions' in", "is an array of Python objects, which is not read because that could run code")
    np.savez(folder / "responses.npz", responses=np.array([[Bomb()]], dtype=object))
    refused(folder, "'responses' in", "could run code; save numbers with dtype=float and words with dtype=str")
    (folder / "responses.npz").write_bytes(pickle.dumps(Bomb()))
    refused(folder, "responses.npz cannot be read as arrays")
    assert not (tmp_path / "never").exists()
    pickle.loads(pickle.dumps(Bomb()))  # else the test could not fail
    assert (tmp_path / "never").exists()


def test_files_that_are_no_arrays(folder):
    whole = (folder / "responses.npz").read_bytes()
    encrypted = bytearray(whole)
    for place in (6, whole.index(b"PK\x01\x02") + 8):
        encrypted[place] |= 1
    for damaged in (
        b"",
        b"text",
        bytes(encrypted),
        whole[: len(whole) // 2],
        whole.replace(b"\x93NUMPY", b"\x93NUMBY"),
    ):
        (folder / "responses.npz").write_bytes(damaged)
        refused(folder, "responses.npz cannot be read as arrays")
    with (folder / "responses.npz").open("wb") as file:
        np.save(file, responses())
    refused(folder, "cannot be read as arrays: damaged, or not from numpy.savez")


def test_two_files_of_numbers(folder):
    np.savez(folder / "rdms.npz", rdms=1 - np.eye(5))
    refused(folder, "holds responses.npz and rdms.npz; allowed: one of them")


def test_what_is_said_twice(folder):
    np.savez(folder / "responses.npz", responses=responses(), regions=np.array(["V4"] * 3))
    (folder / "recording.json").write_text('{"name": "mine", "region": "V4"}')
    refused(folder, "says region in recording.json and regions in responses.npz; allowed: one of the two")


def test_images_that_are_wrong(folder):
    image = folder / "images" / "im2.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:40])
    refused(folder, "an image of the recording cannot be read", "im2.png")
    image.unlink()
    refused(folder, "images holds 4 images, but responses.npz has 5 rows")
    image.write_bytes(whole)
    Image.new("RGB", (6, 6)).save(folder / "images" / "im2.jpg")
    refused(folder, "has two images called 'im2': im2.jpg and im2.png")
    for path in (folder / "images").iterdir():
        path.unlink()
    refused(folder, "images holds no images; allowed: files that end in .jpg")


def test_an_order_that_is_not_clear(folder):
    """image10 stands before image2 in text, and after it in the mind of who wrote them."""
    (folder / "images" / "im4.png").rename(folder / "images" / "im10.png")
    refused(folder, "is not clear ('im10' or 'im2' first?); give the array 'stimuli' in responses.npz")
    np.savez(folder / "responses.npz", responses=responses(), stimuli=np.array(["im0", "im1", "im2", "im3", "im10"]))
    (one,) = load_recordings(folder)
    assert torch.equal(one.images.images, pixels())
