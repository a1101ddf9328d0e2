"""Features survive a file of either format bit for bit, and other programs read them."""

from __future__ import annotations

import importlib.util
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shown import network, pixels, source

from localsim.analysis import features
from localsim.analysis.feature_files import ENGINES, load_features, save_features
from localsim.analysis.feature_store import Features
from localsim.errors import UserError

HAS_NETCDF = all(importlib.util.find_spec(name) for name in ("xarray", "h5netcdf"))
needs_netcdf = pytest.mark.skipif(not HAS_NETCDF, reason="xarray and h5netcdf are not installed")
FORMATS = [".npz", pytest.param(".nc", marks=needs_netcdf)]


def some(n: int = 6, labels: bool = True) -> Features:
    draw = np.random.default_rng(0)
    arrays = {
        "stage2": draw.normal(size=(n, 3)).astype(np.float32),
        "stage1": draw.normal(size=(n, 4)),
        "layer1/0 é.conv": draw.normal(size=(n, 2)).astype(np.float16),
        "spikes": draw.integers(-(2**40), 2**40, (n, 2)),
        "on": draw.random((n, 2)) > 0.5,
    }
    return Features.of_arrays(arrays, name="mine", labels=draw.integers(0, 2**40, n) if labels else None)


def assert_same(here: Features, there: Features) -> None:
    assert here.names == there.names and here.record == json.loads(json.dumps(there.record))
    for name in here:
        assert here[name].dtype == there[name].dtype and here[name].tobytes() == there[name].tobytes()
    assert (here.labels is None) == (there.labels is None)
    assert here.labels is None or (here.labels.dtype, here.labels.tolist()) == (np.int64, there.labels.tolist())
    assert (here.indices.dtype, here.indices.tolist()) == (np.int64, there.indices.tolist())


@pytest.mark.parametrize("suffix", FORMATS)
def test_features_come_back_bit_for_bit(suffix, tmp_path):
    for number, made in enumerate((some(), some(labels=False), features(source(network()), pixels(), stages="all"))):
        path = save_features(made, tmp_path / f"{number}{suffix}")
        assert_same(load_features(path), made)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("suffix", FORMATS)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_layers_of_any_printable_name_come_back(suffix, data, tmp_path_factory):
    printable = st.characters(codec="utf-8", exclude_categories=("C",))
    names = data.draw(st.lists(st.text(printable, min_size=1, max_size=8), min_size=1, max_size=4, unique=True))
    widths = data.draw(st.lists(st.integers(1, 3), min_size=len(names), max_size=len(names)))
    numbers = np.random.default_rng(0)
    arrays = {name: numbers.normal(size=(4, width)) for name, width in zip(names, widths, strict=True)}
    made = Features.of_arrays(arrays, name="mine")
    assert_same(load_features(save_features(made, tmp_path_factory.mktemp("any") / f"file{suffix}")), made)


@pytest.mark.parametrize("suffix", FORMATS)
def test_nothing_is_overwritten_and_nothing_half_written_stays(suffix, tmp_path, monkeypatch):
    path = save_features(some(), tmp_path / f"kept{suffix}")
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists already; choose another name"):
        save_features(some(4), path)
    monkeypatch.setattr("os.fsync", lambda _file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"could not be written to .*No space left"):
        save_features(some(), tmp_path / f"other{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


class Told(Exception):
    """What unpickling the object below would raise."""


class Bomb:
    def __reduce__(self):
        return (exec, ("raise __import__('test_feature_files').Told",))


@pytest.mark.parametrize("suffix", FORMATS)
def test_loading_never_executes_code(suffix, tmp_path):
    bomb = np.array([Bomb()], dtype=object)
    (tmp_path / f"raw{suffix}").write_bytes(pickle.dumps(Bomb()))
    with (tmp_path / f"arrays{suffix}").open("wb") as file:
        np.savez(file, stage1=bomb, __record__=bomb)
    for name in ("raw", "arrays"):
        with pytest.raises(UserError, match="holds no features that can be read"):
            load_features(tmp_path / f"{name}{suffix}")


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_damaged_or_missing_file_is_said_so(suffix, tmp_path):
    path = save_features(some(), tmp_path / f"file{suffix}")
    path.write_bytes(path.read_bytes()[:300])
    for file in (path, tmp_path / f"nowhere{suffix}"):
        with pytest.raises(UserError, match=rf"{file.name} holds no features that can be read"):
            load_features(file)


def test_other_formats_and_missing_libraries_are_named(tmp_path, monkeypatch):
    for what in (lambda path: save_features(some(), path), load_features):
        with pytest.raises(UserError, match=r"'a\.mat'; allowed: names that end in \.npz, \.nc"):
            what(tmp_path / "a.mat")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ENGINES.values() else True)
    for what in (lambda path: save_features(some(), path), load_features):
        with pytest.raises(UserError, match=r"needs xarray and h5netcdf; install them with `pip install xarray"):
            what(tmp_path / "a.nc")


def test_a_folder_of_features_is_loaded_too(tmp_path):
    made = features(source(network()), pixels(), to=tmp_path / "folder")
    assert_same(load_features(tmp_path / "folder"), made)


def test_numpy_reads_the_arrays_without_localsim(tmp_path):
    made = some()
    with np.load(save_features(made, tmp_path / "a.npz"), allow_pickle=False) as file:
        assert np.array_equal(file["stage1"], made["stage1"]) and np.array_equal(file["__labels__"], made.labels)
        assert json.loads(str(file["__record__"])) == made.record


@needs_netcdf
def test_xarray_reads_the_arrays_without_localsim(tmp_path):
    import xarray

    made = some()
    with xarray.open_dataset(save_features(made, tmp_path / "a.nc"), engine="h5netcdf") as file:
        assert file["stage1"].dims == ("presentation", "stage1_feature")
        assert np.array_equal(file["stage1"], made["stage1"]) and np.array_equal(file["label"], made.labels)
        assert np.array_equal(file["on"], made["on"]) and np.array_equal(
            file["layer1%2F0 %C3%A9.conv"], made.arrays["layer1/0 é.conv"]
        )
        assert (file.attrs["source"], int(file.attrs["n"]), json.loads(file.attrs["record"])) == (
            "mine",
            6,
            made.record,
        )


@needs_netcdf
@pytest.mark.parametrize("names", [["label"], ["presentation"], ["a", "a_feature"]])
def test_names_that_netcdf_has_for_something_else_are_refused(names, tmp_path):
    made = Features.of_arrays({name: np.ones((4, 2)) for name in names}, name="mine", labels=[0, 1, 0, 1])
    with pytest.raises(UserError, match=rf"a layer is called {names[-1]}, as something else in the file"):
        save_features(made, tmp_path / "a.nc")
    assert not list(tmp_path.iterdir())
