"""Recordings on disk: what is written comes back, assemblies in NetCDF files are read, and the guide runs."""

import json
import re
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from recording_folders import by_hand, pixels, refused, responses

from localsim.analysis.brain import folders
from localsim.analysis.brain.folders import save_recording
from localsim.analysis.brain.loading import load_recordings
from localsim.analysis.brain.recordings import Recording
from localsim.cli import make_parser
from localsim.data import ImageSet
from localsim.data.images import decode
from localsim.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
GUIDE = (ROOT / "docs" / "recordings.md").read_text()


def recording(**given) -> Recording:
    given = {"name": "a", "images": ImageSet(pixels(), None, None), "responses": responses(), **given}
    return Recording(**given)


def same(one: Recording, other: Recording) -> bool:
    """Every field equal, to the last bit."""
    for name in (field.name for field in fields(Recording)):
        a, b = getattr(one, name), getattr(other, name)
        if name == "images":
            a, b = (
                [decode(path) for path in images.paths] if images.images is None else list(images.images)
                for images in (a, b)
            )
            equal = len(a) == len(b) and all(map(torch.equal, a, b))
        elif isinstance(a, np.ndarray):
            equal = isinstance(b, np.ndarray) and a.dtype == b.dtype and a.tobytes() == b.tobytes()
        else:
            equal = a == b and type(a) is type(b)
        if not equal:
            return False
    return True


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder by hand, as any program may have written it."""
    return by_hand(tmp_path / "mine")


# -- there and back ---------------------------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=("C",)), max_size=8)


@settings(deadline=None, max_examples=30)
@given(
    st.tuples(st.integers(4, 6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2)),
    st.fixed_dictionaries(
        {"name": words.filter(str.strip), "unit": words, "citation": words},
        optional={"repeats": words, "degrees": st.floats(0.1, 179)},
    ),
    st.data(),
)
def test_responses_come_back_to_the_last_bit(tmp_path_factory, shape, about, data):
    n, neurons, _, bins = shape
    values = responses(*shape, seed=n)
    values[:, :, 1:][responses(*shape, seed=1)[:, :, 1:] > 0] = np.nan
    per_neuron = {
        field: data.draw(st.lists(words, min_size=neurons, max_size=neurons))
        for field in ("regions", "subjects", "names")
    }
    groups = data.draw(st.none() | st.lists(words, min_size=n, max_size=n))
    spans = data.draw(st.none() | st.just(tuple((0.1 + b, 1.1 + b) for b in range(bins))))
    images = ImageSet(pixels(n), None, None)
    one = Recording(images=images, responses=values, groups=groups, bins=spans, **per_neuron, **about)
    to = tmp_path_factory.mktemp("round") / "saved"
    save_recording(one, to)
    (back,) = load_recordings(to)
    assert same(one, back)


def test_matrices_come_back_to_the_last_bit(tmp_path):
    halves = np.random.default_rng(0).random((2, 5, 5))
    rdms = halves + halves.swapaxes(1, 2)
    rdms[:, range(5), range(5)] = 0
    one = recording(responses=None, rdms=rdms, regions=("V4", "IT"), subjects=("A", "A"), unit="1 - Pearson r")
    save_recording(one, tmp_path / "rdms")
    (back,) = load_recordings(tmp_path / "rdms")
    assert same(one, back) and back.responses is None


def test_what_is_compared_would_differ(tmp_path):
    save_recording(recording(), tmp_path / "a")
    (back,) = load_recordings(tmp_path / "a")
    assert same(back, recording())
    for changed in (
        recording(responses=responses(seed=1)),
        recording(images=ImageSet(pixels(seed=1), None, None)),
        recording(regions=("V4",) * 3),
        recording(groups=("x",) * 5),
    ):
        assert not same(back, changed)


def test_image_files_are_copied_as_they_are(tmp_path):
    paths = []
    for number, image in enumerate(pixels(size=16)):
        paths.append(tmp_path / f"{number}.JPG")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1], format="jpeg")
    one = recording(images=ImageSet(None, tuple(paths), None), stimuli=("b", "a", "d", "c", "e.1"))
    save_recording(one, tmp_path / "copied")
    assert sorted(path.name for path in (tmp_path / "copied/images").iterdir()) == [
        "a.JPG",
        "b.JPG",
        "c.JPG",
        "d.JPG",
        "e.1.JPG",
    ]
    assert (tmp_path / "copied/images/b.JPG").read_bytes() == paths[0].read_bytes()
    (back,) = load_recordings(tmp_path / "copied")
    assert same(one, back) and back.images.images is not None


def test_images_of_several_sizes_stay_files(folder, monkeypatch):
    Image.new("L", (9, 7), 40).save(folder / "images" / "im3.png")
    (one,) = load_recordings(folder)
    assert one.images.paths is not None and one.stimuli == ("im0", "im1", "im2", "im3", "im4")
    assert all(path.is_absolute() for path in one.images.paths)
    assert decode(one.images.paths[3]).shape == (3, 7, 9)
    monkeypatch.chdir(folder.parent)
    save_recording(one, "again")
    assert same(one, load_recordings("again")[0])


def test_large_images_stay_files(folder, monkeypatch):
    monkeypatch.setattr(folders, "MAX_BYTES_IN_MEMORY", 5 * 3 * 36 - 1)
    assert load_recordings(folder)[0].images.paths is not None
    monkeypatch.setattr(folders, "MAX_BYTES_IN_MEMORY", 5 * 3 * 36)
    assert load_recordings(folder)[0].images.images is not None


def test_rows_are_in_the_order_of_names_or_as_the_stimuli_say(folder):
    (one,) = load_recordings(folder)
    assert torch.equal(one.images.images, pixels()) and np.array_equal(one.responses, responses())
    order = [3, 0, 4, 2, 1]
    np.savez(folder / "responses.npz", responses=responses()[order], stimuli=np.array([f"im{i}" for i in order]))
    (other,) = load_recordings(folder)
    assert torch.equal(other.images.images, pixels()[order]) and other.stimuli == ("im3", "im0", "im4", "im2", "im1")
    assert same(replace(other.take(np.argsort(order)), stimuli=one.stimuli), one)


def test_images_in_folders_of_their_own(folder):
    (folder / "images" / "faces").mkdir()
    (folder / "images" / "im0.png").rename(folder / "images" / "faces" / "im0.png")
    assert load_recordings(folder)[0].stimuli[0] == "faces/im0"


def test_words_for_all_and_for_each(folder):
    (folder / "recording.json").write_text(
        '{"name": "mine", "region": "V4", "subject": "A", "degrees": 8, "bins": [[70, 170]], "repeats": "2"}'
    )
    np.savez(folder / "responses.npz", responses=responses(), names=np.array([7, 8, 9]))
    (one,) = load_recordings(folder)
    assert one.regions == ("V4",) * 3 and one.subjects == ("A",) * 3 and one.names == ("7", "8", "9")
    assert (one.degrees, one.bins, one.repeats, one.unit) == (8, ((70.0, 170.0),), "2", "spikes")


def test_a_folder_of_recordings(tmp_path):
    for name in ("b", "a"):
        save_recording(recording(name=f"recording {name}"), tmp_path / "all" / name)
    (tmp_path / "all" / "notes").mkdir()
    assert [one.name for one in load_recordings(tmp_path / "all")] == ["recording a", "recording b"]
    save_recording(recording(name="recording a"), tmp_path / "all" / "c")
    refused(tmp_path / "all", "two recordings called 'recording a'")
    (tmp_path / "all" / "c" / "recording.json").unlink()
    refused(tmp_path / "all", str(tmp_path / "all" / "c"), "it has no recording.json")


# -- writing ----------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "there").mkdir()
    save_recording(recording(), tmp_path / "there")  # an empty folder is as good as none
    before = {path: path.read_bytes() for path in (tmp_path / "there").rglob("*.*")}
    with pytest.raises(UserError, match="exists already"):
        save_recording(recording(responses=responses(seed=1)), tmp_path / "there")
    assert before == {path: path.read_bytes() for path in (tmp_path / "there").rglob("*.*")}


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*_args, **_arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(UserError, match=r"could not be written to .*: No space left on device"):
        save_recording(recording(), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a/b", "..", ".x", "", "a:b", "B", "a\n", "x" * 201])
def test_stimuli_that_cannot_be_files(tmp_path, name):
    with pytest.raises(UserError, match="cannot be the name of an image file"):
        save_recording(recording(stimuli=("b", "c", name, "d", "e")), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_images_that_cannot_be_files(tmp_path):
    with pytest.raises(UserError, match=r"images of a are float32 of shape .* allowed: uint8"):
        save_recording(recording(images=ImageSet(pixels() / 255, None, None)), tmp_path / "new")
    unknown = ImageSet(None, tuple(tmp_path / f"{i}.xyz" for i in range(5)), None)
    with pytest.raises(UserError, match=r"0.xyz has an unknown ending; allowed: .jpg"):
        save_recording(recording(images=unknown), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


# -- NetCDF -----------------------------------------------------------------------------------------------------------


def test_netcdf_needs_xarray(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    (folder / "responses.npz").unlink()
    (folder / "responses.nc").write_bytes(b"CDF")
    refused(folder, "responses.nc is NetCDF, which needs xarray; do pip install", "localsim[brain]")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of old xarray with newer pandas
def test_netcdf(folder):
    xarray = pytest.importorskip("xarray", reason="NetCDF needs the extra [brain]")
    (folder / "responses.npz").unlink()
    values = responses(trials=2)[..., 0]
    presented = [(image, trial) for trial in (1, 0) for image in (2, 0, 1, 4, 3) if (image, trial) != (3, 1)]
    assembly = xarray.DataArray(
        np.stack([values[image, :, trial] for image, trial in presented]),
        coords={
            "stimulus_id": ("presentation", [f"im{image}" for image, _ in presented]),
            "repetition": ("presentation", [trial for _, trial in presented]),
            "object_name": ("presentation", [f"object {image}" for image, _ in presented]),
            "neuroid_id": ("neuroid", ["x", "y", "z"]),
            "region": ("neuroid", ["V4", "V4", "IT"]),
            "subject": ("neuroid", ["A", "B", "A"]),
            "time_bin_start": 70,
            "time_bin_end": 170,
        },
        dims=("presentation", "neuroid"),
    )
    assembly.to_netcdf(folder / "responses.nc")
    (one,) = load_recordings(folder)
    expected = values.copy()
    expected[3, :, 1] = np.nan
    order = [int(name[2:]) for name in one.stimuli]
    assert sorted(order) == [0, 1, 2, 3, 4] and torch.equal(one.images.images, pixels()[order])
    assert np.array_equal(one.responses[..., 0], expected[order], equal_nan=True)
    assert one.groups == tuple(f"object {image}" for image in order)
    assert (one.regions, one.subjects, one.names) == (("V4", "V4", "IT"), ("A", "B", "A"), ("x", "y", "z"))
    assert one.bins == ((70.0, 170.0),) and one.name == "mine"

    (folder / "recording.json").write_text('{"name": "mine", "region": "V4"}')
    refused(folder, "says region in recording.json and regions in responses.nc")
    (folder / "recording.json").write_text('{"name": "mine", "unit": "spikes in 100 ms"}')
    assert load_recordings(folder)[0].unit == "spikes in 100 ms"
    for wrong, said in (
        (assembly.assign_coords(stimulus_id=("presentation", ["zebra"] * 9)), "without an image in images/: 'zebra'"),
        (assembly[[0, 1, 2, 3]], "images holds 5 images, but responses.nc has 4 rows"),
        (assembly.rename(neuroid="cell"), "an assembly is presentation x neuroid"),
        (assembly.drop_vars("stimulus_id"), "no coordinate stimulus_id"),
        (xarray.Dataset({"a": assembly, "b": assembly}), "has the variables 'a', 'b'; allowed: one"),
    ):
        wrong.to_netcdf(folder / "responses.nc")
        refused(folder, said)
    (folder / "responses.nc").write_bytes(b"nothing of the kind")
    refused(folder, "responses.nc cannot be read as NetCDF")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("squeezed", [False, True])
def test_the_guide_writes_assemblies(folder, monkeypatch, squeezed):
    """An assembly's dimensions have indices of several levels, which no NetCDF file holds."""
    xarray = pytest.importorskip("xarray", reason="NetCDF needs the extra [brain]")
    values = responses(trials=1)[:, :, 0]
    assembly = xarray.DataArray(
        values,
        coords={
            "stimulus_id": ("presentation", [f"im{image}" for image in range(5)]),
            "object_name": ("presentation", list("aabbc")),
            "neuroid_id": ("neuroid", [1, 2, 3]),
            "region": ("neuroid", ["V4", "V4", "IT"]),
            "time_bin_start": ("time_bin", [70]),
            "time_bin_end": ("time_bin", [170]),
        },
        dims=("presentation", "neuroid", "time_bin"),
        attrs={"stimulus_set": object()},
    ).set_index(
        presentation=["stimulus_id", "object_name"],
        neuroid=["neuroid_id", "region"],
        time_bin=["time_bin_start", "time_bin_end"],
    )
    assembly = assembly.squeeze("time_bin") if squeezed else assembly
    (code,) = re.findall(r"```py\n(.*?)```", GUIDE, flags=re.S)
    folder.rename(folder.parent / "my_recording")
    (folder.parent / "my_recording" / "responses.npz").unlink()
    monkeypatch.chdir(folder.parent)
    exec(code, {"assembly": assembly})
    (one,) = load_recordings("my_recording")
    assert np.array_equal(one.responses[:, :, 0], values) and one.regions == ("V4", "V4", "IT")
    assert one.groups == tuple("aabbc") and one.names == ("1", "2", "3")
    # older xarray forgets the bin that is squeezed
    assert one.bins == ((70.0, 170.0),) or (squeezed and one.bins is None)


# -- the guide --------------------------------------------------------------------------------------------------------


def test_the_python_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    said = re.search(r"# (Recording monkey A.*)", GUIDE)
    assert said and capsys.readouterr().out == f"{said[1]}\n"
    assert same(names["recording"], names["again"])
    assert names["again"].of("V4").means().shape == (40, 20)
    assert same(load_recordings("my_geometry")[0], names["geometry"])


def test_the_guide_names_what_there_is(folder):
    (text,) = re.findall(r"```json\n(.*?)```", GUIDE, flags=re.S)
    assert set(json.loads(text)) == set(folders._FIELDS)
    (folder / "recording.json").write_text(text)
    assert load_recordings(folder)[0].name == "monkey A"
    for command in re.findall(r"`(localsim [^`\n]+)`", GUIDE):
        make_parser().parse_args(shlex.split(command)[1:])
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", GUIDE):
        assert (ROOT / "docs" / target).exists(), target
