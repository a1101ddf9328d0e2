"""Recordings as Brain-Score's assemblies, stimulus sets and benchmarks, and back."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from localsim.analysis.brain.assemblies import benchmark, from_assembly, stimulus_set, to_assembly
from localsim.analysis.brain.brainscore import prepare, quiet
from localsim.analysis.brain.recordings import Recording
from localsim.data import ImageSet
from localsim.data.images import decode
from localsim.errors import UserError

prepare()
pytest.importorskip("brainscore_vision", reason="needs the extra [brain]")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of old xarray, pandas

N, NEURONS, TRIALS = 12, 3, 4


def made(*, missing: float = 0.0, bins: int = 1, **fields) -> Recording:
    """Return a recording of images in memory, with a part of its trials missing."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (N, 3, 6, 8), dtype=np.uint8))
    responses = rng.normal(size=(N, NEURONS, TRIALS, bins)) + rng.normal(size=(N, NEURONS, 1, 1))
    if missing:
        gone = rng.uniform(size=(N, TRIALS)) < missing
        gone[:, 0] = False
        responses[np.nonzero(gone)[0], :, np.nonzero(gone)[1]] = np.nan
    given = {
        "regions": ("V4", "V4", "IT"),
        "subjects": ("A", "B", "B"),
        "names": ("one", "two", "three"),
        "stimuli": tuple(f"im{number:02d}" for number in range(N)),
        "groups": tuple("cat" if number % 2 else "ape" for number in range(N)),
        **fields,
    }
    return Recording("made up", ImageSet(pixels, None, None), responses, **given)


def same(here: Recording, there: Recording) -> bool:
    words = ("regions", "subjects", "names", "stimuli", "groups", "bins", "degrees")
    return all(getattr(here, word) == getattr(there, word) for word in words) and np.array_equal(
        here.responses, there.responses, equal_nan=True
    )


@pytest.mark.parametrize(
    "recording",
    [
        made(),
        made(missing=0.4),
        made(groups=None, degrees=5.5),
        replace(made(bins=2), bins=((70, 120), (120, 170))),
        made(bins=2, missing=0.3),
        replace(made(), bins=((70, 170),)),
    ],
)
def test_round_trip(recording, tmp_path):
    back = from_assembly(to_assembly(recording, tmp_path), "again")
    assert same(recording, back) and back.name == "again"
    for path, image in zip(back.images.paths, recording.images.images, strict=True):
        assert torch.equal(decode(path), image)


def test_a_squeezed_time_bin_is_known_still(tmp_path):
    for bins in (((70.0, 170.0),), None):
        recording = replace(made(), bins=bins)
        assert same(recording, from_assembly(to_assembly(recording, tmp_path).squeeze("time_bin")))


def test_missing_trials_are_no_presentations(tmp_path):
    recording = made(missing=0.4)
    assembly = to_assembly(recording, tmp_path)
    assert assembly.sizes["presentation"] == (~np.isnan(recording.responses[:, 0, :, 0])).sum() < N * TRIALS
    assert not np.isnan(assembly.values).any()


def test_images_come_in_the_order_of_brainscores_averaging(tmp_path):
    from brainscore_core.supported_data_standards.brainio.assemblies import NeuroidAssembly
    from brainscore_vision.benchmark_helpers.neural_common import average_repetition

    recording = made()
    stimuli = stimulus_set(recording, tmp_path)
    order = np.random.default_rng(1).permutation(N * TRIALS)
    for levels in (("object_name", "stimulus_id"), ("stimulus_id", "object_name")):
        columns = {"stimulus_id": recording.stimuli * TRIALS, "object_name": recording.groups * TRIALS}
        coords = {name: ("presentation", np.array(columns[name])[order]) for name in levels}
        coords["repetition"] = ("presentation", np.repeat(np.arange(TRIALS), N)[order])
        values = recording.responses[:, :, :, 0].transpose(2, 0, 1).reshape(-1, NEURONS)[order]
        neuroids = {"neuroid_id": ("neuroid", list("abc")), "region": ("neuroid", list("VVV"))}
        assembly = NeuroidAssembly(values, coords={**coords, **neuroids}, dims=["presentation", "neuroid"])
        assembly.attrs["stimulus_set"] = stimuli
        averaged, ours = average_repetition(assembly), from_assembly(assembly)
        assert ours.stimuli == tuple(averaged["stimulus_id"].values)
        assert ours.groups == tuple(averaged["object_name"].values)
        np.testing.assert_allclose(ours.means(), averaged.transpose("presentation", "neuroid").values, atol=1e-12)
        number = [recording.stimuli.index(one) for one in ours.stimuli]
        assert np.array_equal(ours.responses, recording.responses[number]), "trials keep their numbers"
        once = from_assembly(averaged.isel(presentation=slice(None, None, -1)))
        assert once.stimuli == ours.stimuli[::-1], "what is averaged stays in its order"


def test_a_plain_array_of_xarray_will_do(tmp_path):
    import xarray

    recording = made()
    ids = [stimulus for stimulus in recording.stimuli for _ in range(2)]
    values = np.arange(2 * N * NEURONS, dtype=np.int16).reshape(NEURONS, 2 * N)
    coords = {"stimulus_id": ("presentation", ids), "region": "IT"}
    array = xarray.DataArray(values, dims=("neuroid", "presentation"), coords=coords)
    with pytest.raises(UserError, match=r"set assembly\.attrs\['stimulus_set'\]"):
        from_assembly(array)
    array.attrs["stimulus_set"] = stimulus_set(recording, tmp_path)
    found = from_assembly(array, "plain")
    assert found.regions == ("IT",) * NEURONS and found.groups is None and found.bins is None
    assert np.array_equal(found.responses[..., 0], values.reshape(NEURONS, N, 2).transpose(1, 0, 2))


def test_numbers_of_repetition_that_run_through_a_session_leave_no_gaps(tmp_path):
    recording = made()
    assembly = to_assembly(recording, tmp_path)
    ran = assembly.reset_index("presentation")
    ran["repetition"] = "presentation", np.arange(N * TRIALS)
    assert np.array_equal(from_assembly(ran).responses, recording.responses)


def test_what_is_no_assembly_gets_a_sentence(tmp_path):
    assembly = to_assembly(made(), tmp_path)
    with pytest.raises(UserError, match="this is an object of type list"):
        from_assembly([1])
    with pytest.raises(UserError, match=r"this is presentation x time_bin$"):
        from_assembly(assembly.isel(neuroid=0, drop=True))
    bare = assembly.reset_index("presentation").reset_coords("stimulus_id", drop=True)
    with pytest.raises(UserError, match=r"no coordinate stimulus_id, only .*object_name"):
        from_assembly(bare)
    two = assembly.reset_index("presentation")
    two["object_name"] = "presentation", ["dog", *assembly["object_name"].values[1:]]
    with pytest.raises(UserError, match="image im00 of the assembly has more than one object_name"):
        from_assembly(two)
    stimuli = assembly.attrs["stimulus_set"]
    first = stimuli.stimulus_paths["im00"]
    stimuli.stimulus_paths["im00"] = str(tmp_path / "gone.png")
    with pytest.raises(
        UserError, match=re.escape(f"image im00 of the assembly's stimulus set is not there: {tmp_path}")
    ):
        from_assembly(assembly)
    del stimuli.stimulus_paths["im00"]
    with pytest.raises(UserError, match="has no file for image im00; it has 11 images"):
        from_assembly(assembly)
    stimuli.stimulus_paths["im00"] = first
    assert same(from_assembly(assembly), made())


def test_identifiers_follow_the_content(tmp_path):
    recording = made()
    identifier = stimulus_set(recording, tmp_path).identifier
    assert re.fullmatch(r"made_up-[0-9a-f]{12}", identifier)
    assert identifier == stimulus_set(recording, tmp_path / "elsewhere").identifier
    pixels = recording.images.images.clone()
    pixels[0, 0, 0, 0] ^= 1
    changed = replace(recording, images=ImageSet(pixels, None, None))
    assert stimulus_set(changed, tmp_path).identifier != identifier
    names = {
        to_assembly(one, tmp_path).attrs["identifier"]
        for one in (recording, changed, recording.shuffled(), replace(recording, names=("a", "b", "c")))
    }
    assert len(names) == 4 and to_assembly(made(), tmp_path).attrs["identifier"] in names


def test_files_are_used_where_they_lie_unless_two_share_a_name(tmp_path):
    memory = made()
    files = stimulus_set(memory, tmp_path / "written").stimulus_paths
    assert len(list((tmp_path / "written").iterdir())) == N, "no partial files stay"
    where = []
    for number, path in enumerate(files.values()):
        where.append(tmp_path / f"class{number % 2}" / f"{number // 2}.png")
        where[-1].parent.mkdir(exist_ok=True)
        where[-1].write_bytes(Path(path).read_bytes())
    twice = replace(memory, images=ImageSet(None, tuple(where), None))
    links = stimulus_set(twice, tmp_path / "links").stimulus_paths
    assert len({path.rpartition("/")[2] for path in links.values()}) == N
    assert all(
        torch.equal(decode(path), image) for path, image in zip(links.values(), memory.images.images, strict=True)
    )
    assert stimulus_set(twice, tmp_path / "links").stimulus_paths == links
    once = twice.take(range(0, N, 2))
    assert list(stimulus_set(once, tmp_path / "none").stimulus_paths.values()) == [str(one) for one in where[::2]]
    assert not (tmp_path / "none").exists()
    where[0].unlink()
    with pytest.raises(UserError, match=r"image im00 of made up is not there: .*class0/0.png"):
        stimulus_set(once, tmp_path)


def test_a_benchmark_averages_trials_and_keeps_its_ceiling(tmp_path):
    from brainscore_vision import load_ceiling

    recording = made()
    made_of = benchmark(recording, "V4", "pls", folder=tmp_path)
    assert made_of.region == "V4" and re.fullmatch(r"made_up-[0-9a-f]{12}\.V4-pls", made_of.identifier)
    np.testing.assert_allclose(made_of._assembly.values, recording.of("V4").means(), atol=1e-12)
    with quiet():
        expected = load_ceiling("internal_consistency")(to_assembly(recording.of("V4"), tmp_path).squeeze("time_bin"))
    assert float(made_of.ceiling) == float(expected) and made_of.ceiling is made_of.ceiling
    averaged = replace(recording, responses=recording.means())
    assert float(benchmark(averaged, "IT", "rdm", folder=tmp_path).ceiling) == 1
    assert made_of.identifier != benchmark(recording.shuffled(), "V4", "pls", folder=tmp_path).identifier


def test_what_cannot_be_a_benchmark_gets_a_sentence(tmp_path):
    with pytest.raises(UserError, match="unknown metric 'plss'; allowed: pls, ridge, ridgecv, rdm, cka"):
        benchmark(made(), "V4", "plss", folder=tmp_path)
    with pytest.raises(UserError, match="unknown region of made up 'V1'"):
        benchmark(made(), "V1", "pls", folder=tmp_path)
    with pytest.raises(UserError, match="has 2 time bins"):
        benchmark(made(bins=2), "V4", "pls", folder=tmp_path)
    only = Recording("monkeys", made().images, rdms=np.zeros((1, N, N)), regions=("IT",))
    with pytest.raises(UserError, match="monkeys has RDMs only"):
        benchmark(only, "IT", "rdm", folder=tmp_path)
