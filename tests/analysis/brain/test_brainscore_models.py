"""Networks and benchmarks through Brain-Score's own objects: equal features and scores, and sentences."""

from __future__ import annotations

import socket
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import train_in
from torch import nn

from localsim.analysis import features
from localsim.analysis.brain.assemblies import benchmark, stimulus_set
from localsim.analysis.brain.brainscore import (
    open_benchmark,
    prepare,
    quiet,
    registered_benchmarks,
    score_benchmark,
)
from localsim.analysis.brain.models import brain_model, identifier_of, region_layers_from
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.sources import Source
from localsim.analysis.spatial import POOLED, Reducer
from localsim.data import ImageSet
from localsim.errors import UserError

prepare()
pytest.importorskip("brainscore_vision", reason="needs the extra [brain]")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of old xarray, pandas

N, NEURONS, TRIALS = 40, 6, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "blockwise-s0"
    train_in(path, epochs=1, train_images=16, warmup_epochs=0)
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Let every attempt to reach another machine fail the test."""

    def refuse(*arguments):
        pytest.fail(f"the network was tried: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def recording(run) -> Recording:
    """Return noisy responses made from the run's second stage, of images that must be resized."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (N, 3, 5, 6), dtype=np.uint8)).repeat_interleave(4, 2)
    images = ImageSet(pixels.repeat_interleave(4, 3), None, None)
    x = features(run, images, stages=[1], spatial="2x2")["stage2"].astype(np.float64)
    tuned = (x - x.mean(0)) @ rng.normal(size=(x.shape[1], NEURONS))
    responses = tuned[:, :, None] / tuned.std() + rng.normal(scale=0.3, size=(N, NEURONS, TRIALS))
    groups = tuple("abcd"[number % 4] for number in range(N))
    return Recording("made", images, responses, regions=("V4",) * 4 + ("IT",) * 2, groups=groups, degrees=8)


@pytest.mark.parametrize("spatial", ["2x2", "mean", "flatten", "project16"])
def test_features_are_ours_bit_for_bit(run, recording, tmp_path, spatial):
    model = brain_model(run, {"V4": "stage2", "IT": "layer2.0"}, spatial=spatial, batch_size=16)
    stimuli = stimulus_set(recording, tmp_path)
    paths = tuple(map(Path, stimuli.stimulus_paths.values()))
    expected = features(
        Source.of(run).whole(),
        ImageSet(None, paths, None),
        stages=[1],
        units=["layer2.0"],
        spatial=spatial,
        batch_size=16,
    )  # 40 images: the last batch is shorter
    for region, layer in {"V4": "stage2", "IT": "layer2.0"}.items():
        with quiet():
            model.start_recording(region, time_bins=[(70, 170)])
            found = model.look_at(stimuli).transpose("presentation", "neuroid")
        assert found.values.dtype == np.float32 and np.array_equal(found.values, expected[layer])
        assert list(found["stimulus_id"].values) == list(recording.stimuli)
        assert set(found["layer"].values) == {layer} and len(set(found["neuroid_id"].values)) == found.shape[1]


def test_an_image_shown_twice_has_its_features_twice(run, recording, tmp_path):
    pixels = recording.images.images[[0, 1, 0, 2]]
    twice = replace(recording.take([0, 1, 2, 3]), images=ImageSet(pixels, None, None))
    with quiet():
        found = brain_model(run, {"IT": "stage1"}, spatial="mean").activations_model(
            stimulus_set(twice, tmp_path), layers=["stage1"]
        )
    assert np.array_equal(found.values[0], found.values[2]) and not np.array_equal(found.values[0], found.values[1])


def test_readouts_modules_and_layers_of_any_network_can_be_read(run, recording, tmp_path):
    stimuli = stimulus_set(recording, tmp_path)
    images = ImageSet(None, tuple(map(Path, stimuli.stimulus_paths.values())), None)
    plain = Source("plain", nn.Sequential(OrderedDict(a=nn.Conv2d(3, 4, 3), b=nn.ReLU(inplace=True))), size=12)
    for source, layer, asked in (
        (run, "readout1", {"readouts": [0]}),
        (run, "layer1.0.conv1", {"modules": ["layer1.0.conv1"]}),
        (plain, "a", {"modules": ["a"]}),  # before the rectification in place
    ):
        with quiet():
            found = brain_model(source, {"IT": layer}, spatial="mean").activations_model(stimuli, layers=[layer])
        as_shown = source if isinstance(source, Source) else Source.of(source).whole()
        expected = features(as_shown, images, spatial="mean", batch_size=64, **asked)[layer]
        assert np.array_equal(found.values, expected)


def test_small_shifts_vary_the_responses_where_a_benchmark_asks(run, recording, tmp_path):
    model, stimuli = brain_model(run, {"IT": "stage1"}, degrees=0.1), stimulus_set(recording, tmp_path)
    with quiet():
        found = model.activations_model(stimuli, layers=["stage1"], number_of_trials=2, require_variance=True)
    assert len(found) == 2 * N and not np.array_equal(found.values[0], found.values[1])


@pytest.mark.parametrize("metric", ["pls", "rdm"])
def test_a_benchmark_scores_what_its_metric_gives_our_features(run, recording, tmp_path, metric):
    from brainscore_core.supported_data_standards.brainio.assemblies import NeuroidAssembly

    made = benchmark(recording, "V4", metric, folder=tmp_path)
    model = brain_model(run, {"V4": "stage2", "IT": "stage3"}, spatial="2x2")
    found = score_benchmark(made, model)
    paths = tuple(Path(made._assembly.stimulus_set.stimulus_paths[one]) for one in recording.stimuli)
    x = features(Source.of(run).whole(), ImageSet(None, paths, None), stages=[1], spatial="2x2", batch_size=64)[
        "stage2"
    ]
    coords = {"stimulus_id": list(recording.stimuli), "object_name": list(recording.groups)}
    neuroids = {"neuroid_id": ("neuroid", np.arange(x.shape[1])), "layer": ("neuroid", ["stage2"] * x.shape[1])}
    with quiet():
        source = NeuroidAssembly(
            x,
            coords={**{name: ("presentation", values) for name, values in coords.items()}, **neuroids},
            dims=["presentation", "neuroid"],
        )
        expected = float(made._similarity_metric(source, made._assembly))
    # not a comparison of two zeros; how far from 0, is the network's chance: it was hardly trained
    assert found.raw == pytest.approx(expected, abs=1e-10) and abs(found.raw) > 0.02
    assert found.ceiling == float(made.ceiling) < 1
    assert found.value == pytest.approx(expected**2 / found.ceiling, abs=1e-10)
    assert (found.region, found.layer, found.model) == ("V4", "stage2", model.identifier)
    assert found.benchmark == made.identifier and f"V4 as stage2; model {model.identifier}" in str(found)


def test_the_raw_score_keeps_the_sign(run, recording, tmp_path):
    class Opposite:
        def __call__(self, source, target):
            from brainscore_core.metrics import Score

            return Score(-0.5)

    made = benchmark(replace(recording, responses=recording.means()), "IT", Opposite(), folder=tmp_path)
    found = score_benchmark(made, brain_model(run, {"IT": "stage3"}, spatial="mean"))
    assert (found.value, found.raw, found.ceiling) == (0.25, -0.5, 1)


def test_nothing_is_printed_and_tqdm_stays_what_it_was(run, recording, tmp_path, capfd):
    from tqdm import std

    before = vars(std.tqdm)["__init__"]
    made = benchmark(recording, "IT", "ridge", folder=tmp_path)
    score_benchmark(made, brain_model(run, {"IT": "stage1"}, spatial="mean"))
    assert capfd.readouterr() == ("", "")
    assert vars(std.tqdm)["__init__"] is before


def test_identifiers_tell_networks_and_how_they_are_read_apart(run, recording, tmp_path):
    train_in(tmp_path / "blockwise-s0", epochs=1, train_images=16, warmup_epochs=0, seed=1)
    source = Source.of(run).whole()
    names = [
        brain_model(run, {"IT": "stage1"}).identifier,
        brain_model(tmp_path / "blockwise-s0", {"IT": "stage1"}).identifier,
        brain_model(run, {"IT": "stage1"}, which="untrained").identifier,
        *(brain_model(run, {"IT": "stage1"}, spatial=spatial).identifier for spatial in ("mean", "project9")),
        brain_model(run, {"IT": "stage1"}, spatial="project9", seed=1).identifier,
        *(
            identifier_of(replace(source, **look), Reducer(POOLED))
            for look in ({"size": 20}, {"grey": True}, {"crop": 0.5}, {"mean": (0, 0, 0), "std": (1, 1, 1)})
        ),
    ]
    assert len(set(names)) == len(names)
    assert names[0].startswith(f"blockwise-s0-{source.weights_hash()[:12]}-upto4x4-16px-")
    assert brain_model(run, {"V4": "stage2"}, seed=3).identifier == names[0], "no projection, no seed"
    odd = replace(source, name="torchvision:resnet18:../a b")
    assert identifier_of(odd, Reducer("mean")).startswith("torchvision_resnet18_.._a_b-")


def test_what_cannot_be_a_model_gets_a_sentence(run, recording, tmp_path):
    with pytest.raises(UserError, match=r"has no layer 'stage9'; close: .*stage3"):
        brain_model(run, {"IT": "stage9"})
    with pytest.raises(UserError, match="no region has a layer"):
        brain_model(run, {})
    with pytest.raises(UserError, match="degrees is 0; allowed: above 0"):
        brain_model(run, {"IT": "stage1"}, degrees=0)
    with pytest.raises(UserError, match="batch_size is 0"):
        brain_model(run, {"IT": "stage1"}, batch_size=0)
    with pytest.raises(UserError, match="unknown spatial handling '4x5'"):
        brain_model(run, {"IT": "stage1"}, spatial="4x5")
    made = benchmark(recording, "V4", "rdm", folder=tmp_path)
    with pytest.raises(
        UserError, match=r"is of region V4, for which the model has no layer; it has layers for IT, V1$"
    ):
        score_benchmark(made, brain_model(run, {"IT": "stage1", "V1": "stage1"}, spatial="mean"))
    with pytest.raises(UserError, match=r"spatial 64x64 is finer than the map of stage1"):
        score_benchmark(made, brain_model(run, {"V4": "stage1"}, spatial="64x64"))


def test_more_than_memory_holds_gets_a_sentence(run, recording, tmp_path, monkeypatch):
    made = benchmark(recording, "V4", "rdm", folder=tmp_path)
    import psutil

    one_byte = psutil.virtual_memory()._replace(available=1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: one_byte)
    with pytest.raises(
        UserError, match=r"V4-rdm does not fit into memory \(0.0 GB needed, 0.0 GB available\); take a "
    ):
        score_benchmark(made, brain_model(run, {"V4": "stage1"}, spatial="mean"))


# -- benchmarks by name, without a network -----------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Let connections fail as they do without a network, and no cache be filled."""
    from brainscore_core.supported_data_standards.brainio import fetch

    def unreachable(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(fetch, "_local_data_path", str(tmp_path))


@pytest.mark.parametrize(
    "name", ["MajajHong2015public.IT-pls", "Allen2022_fmri.IT-rdm"]
)  # the second loads without data, and fails at its first use
def test_data_that_cannot_be_fetched_get_a_sentence(run, offline, name):
    model = brain_model(run, {"IT": "stage3"}, spatial="mean")
    with pytest.raises(UserError) as told:
        score_benchmark(name, model)
    text = str(told.value)
    assert text.startswith(f"benchmark {name} needs data that are not here and could not be fetched (")
    assert 'endpoint URL: "https://brainscore-storage' in text and "\n" not in text
    assert "set BRAINIO_HOME to a folder that Brain-Score filled elsewhere (now " in text


def test_an_unknown_benchmark_gets_close_names(run):
    model = brain_model(run, {"IT": "stage3"}, spatial="mean")
    for use in (open_benchmark, lambda name: score_benchmark(name, model)):
        with pytest.raises(UserError, match=r"no benchmark 'MajajHong2015.IT'; close: MajajHong2015.IT-pls, "):
            use("MajajHong2015.IT")
    names = registered_benchmarks()
    assert "Cadena2017-pls" in names and len(names) > 100 and not [name for name in names if "<" in name]


def test_a_benchmark_that_is_opened_computes_its_ceiling_once(recording, tmp_path, monkeypatch):
    import brainscore_vision

    made, computed = benchmark(recording, "IT", "rdm", folder=tmp_path), []
    made._ceiling_func = lambda: computed.append(1) or 0.5
    monkeypatch.setattr(brainscore_vision, "load_benchmark", lambda name: made)
    opened = open_benchmark("Cadena2017-pls")
    assert opened.ceiling == opened.ceiling == 0.5 and computed == [1]


def test_errors_of_programs_stay_what_they_are(run, recording, tmp_path):
    made = benchmark(recording, "IT", "rdm", folder=tmp_path)
    model = brain_model(run, {"IT": "stage1"}, spatial="mean")
    for error in (KeyError("region"), Exception("any"), Exception([ValueError("no")]), FileNotFoundError("x.nc")):

        def fail(*_, error=error):
            raise error

        made._similarity_metric = fail
        with pytest.raises(type(error)) as raised:
            score_benchmark(made, model)
        assert raised.value is error


def test_a_damaged_cache_and_scores_that_are_no_numbers_get_a_sentence(run, recording, tmp_path):
    made = benchmark(recording, "IT", "rdm", folder=tmp_path)
    model = brain_model(run, {"IT": "stage1"}, spatial="mean")

    def damaged(*_):
        raise ValueError("SHA1 mismatch. Expected: a, Actual: b")

    made._similarity_metric = damaged
    with pytest.raises(UserError, match="a file of theirs is damaged: SHA1 mismatch"):
        score_benchmark(made, model)
    from brainscore_core.metrics import Score

    made._similarity_metric = lambda *_: Score(float("nan"))
    with pytest.raises(UserError, match=f"gives {model.identifier} the score nan: "):
        score_benchmark(made, model)


def test_region_layers_are_the_best_ones():
    scores = {("a", "V4"): 0.1, ("b", "V4"): 0.3, ("c", "V4"): 0.3, ("a", "IT"): -0.1, ("b", "IT"): -0.2}
    assert region_layers_from(scores) == {"V4": "b", "IT": "a"}
