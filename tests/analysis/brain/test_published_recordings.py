"""The published sets: facts of the data where they lie, and what is said of incomplete ones."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat, savemat
from scipy.spatial.distance import squareform
from scipy.stats import spearmanr
from torch.nn.functional import avg_pool2d

from localsim.analysis.brain.loading import load_recordings
from localsim.analysis.brain.recordings import Recording
from localsim.errors import UserError

SHARED = Path(os.environ.get("LOCALSIM_SHARED_DATA") or Path(__file__).parents[4] / "shared" / "data") / "neural"
V4, IMAGES92 = SHARED / "cowley2026_v4", SHARED / "kriegeskorte2008_92"
with_v4 = pytest.mark.skipif(not V4.is_dir(), reason="the V4 data are not beside the repository")
with_92 = pytest.mark.skipif(not IMAGES92.is_dir(), reason="the data of 92 images are not beside the repository")


def upper(rdm: np.ndarray) -> np.ndarray:
    return rdm[np.triu_indices(len(rdm), 1)]


# -- Cowley et al. 2026, the data themselves --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sessions() -> dict[str, Recording]:
    return {recording.name: recording for recording in load_recordings(V4)}


@with_v4
@pytest.mark.parametrize(
    ("session", "subject", "neurons", "images", "trials", "repeats"),
    [
        ("210325", "PE", 50, 640, 10, "6-10"),
        ("201025", "PE", 89, 1200, 1, "12"),
        ("190923", "WE", 33, 1200, 1, "14"),
        ("210621", "RA", 51, 1200, 1, "16"),
    ],
)
def test_v4_sessions(sessions, session, subject, neurons, images, trials, repeats):
    assert len(sessions) == 4
    one = sessions[f"cowley2026 {session}"]
    assert one.responses.shape == (images, neurons, trials, 1) and one.images.images.shape == (images, 3, 112, 112)
    assert one.regions == ("V4",) * neurons and one.subjects == (subject,) * neurons and one.repeats == repeats
    assert one.degrees == 11.2 and one.bins == ((50.0, 150.0),) and one.unit == "spikes in 100 ms"
    assert one.stimuli[0] == "image0001" and one.stimuli[-1] == f"image{images:04d}" and one.groups is None
    assert "Nature 652" in one.citation and ("Bashivan" in one.citation) == (session == "210325")
    assert np.isfinite(one.means()).all()


@with_v4
def test_v4_single_trials_are_whole_numbers_of_spikes_of_six_to_ten_trials(sessions):
    one = sessions["cowley2026 210325"]
    given = ~np.isnan(one.responses)
    counts = one.responses[given]
    assert given.sum(2).min() == 6 and given.sum(2).max() == 10
    assert counts.min() == 0 and counts.max() == 20 and np.array_equal(counts, np.round(counts))
    raw = np.load(V4 / "responses_raw_210325.npy")
    assert np.array_equal(one.means(), np.nanmean(raw, 2).T)
    assert np.array_equal(one.responses[17, 4, :, 0], raw[4, 17], equal_nan=True)


@with_v4
@pytest.mark.parametrize(("session", "inside"), [("210325", ""), ("190923", "images_190923/")])
def test_v4_images_are_those_of_the_archive_in_order(sessions, session, inside):
    one = sessions[f"cowley2026 {session}"]
    with zipfile.ZipFile(V4 / f"images_{session}.zip") as archive:
        for place in (0, 41, 639):
            jpeg = Image.open(io.BytesIO(archive.read(f"{inside}image{place + 1:04d}.jpg"))).convert("RGB")
            assert np.array_equal(one.images.images[place].permute(1, 2, 0).numpy(), np.array(jpeg))


@with_v4
def test_v4_averages_are_those_of_the_file(sessions):
    for session in ("201025", "190923", "210621"):
        averaged = np.load(V4 / f"responses_avg_{session}.npy")
        assert np.array_equal(sessions[f"cowley2026 {session}"].means(), averaged.T)


@with_v4
def test_v4_images_and_responses_belong_together(sessions):
    """Coarse pixels predict the responses to every second image from the others, about as well as is known of them."""
    for one in sessions.values():
        pixels = avg_pool2d(one.images.images.double(), 14).flatten(1).numpy()
        pixels = (pixels - pixels.mean(0)) / pixels.std(0)
        assert 0.18 < held_out_r(pixels, one.means()) < 0.28, one.name
        assert abs(held_out_r(pixels, one.shuffled().means())) < 0.05, one.name


def held_out_r(x: np.ndarray, y: np.ndarray) -> float:
    """Ridge from the even rows to the odd ones: the median over neurons of Pearson's r."""
    fit, fitted = x[::2], y[::2] - y[::2].mean(0)
    predicted = x[1::2] @ np.linalg.solve(fit.T @ fit + 3000 * np.eye(x.shape[1]), fit.T @ fitted)
    return float(np.median([np.corrcoef(*pair)[0, 1] for pair in zip(predicted.T, y[1::2].T, strict=True)]))


# -- Kriegeskorte et al. 2008, the data themselves --------------------------------------------------------------------


@pytest.fixture(scope="module")
def it() -> Recording:
    (one,) = load_recordings(IMAGES92)
    return one


@with_92
def test_92_images(it):
    assert it.responses is None and it.rdms.shape == (9, 92, 92) and it.areas == ["monkey IT", "human IT"]
    assert it.of("monkey IT").rdms.shape == (1, 92, 92) and "674 neurons" in it.names[0]
    assert it.of("human IT").subjects == ("BE", "BE", "KO", "KO", "SN", "SN", "TI", "TI")
    assert it.of("human IT").names[:3] == ("BE session 1", "BE session 2", "KO session 1")
    assert it.images.images.shape == (92, 3, 175, 175) and it.images.images.dtype == torch.uint8
    assert it.unit == "1 - Pearson r" and "Neuron 60" in it.citation
    assert [it.groups.count(kind) for kind in ("human face", "nonhuman face")] == [12, 12]


@with_92
def test_monkeys_and_people_agree_as_published(it):
    monkeys, people = it.of("monkey IT").rdms[0], it.of("human IT").rdms.mean(0)
    assert spearmanr(upper(monkeys), upper(people))[0] == pytest.approx(0.439, abs=5e-4)
    shuffled = it.shuffled().of("monkey IT").rdms[0]
    assert abs(spearmanr(upper(shuffled), upper(people))[0]) < 0.1


@with_92
def test_the_published_mean_is_that_of_the_eight_matrices(it):
    main = loadmat(IMAGES92 / "Kriegeskorte_Neuron2008_supplementalData.mat", squeeze_me=True, struct_as_record=False)
    published = next(one.RDM for one in main["RDMs_mIT_hIT_fig1"] if one.name.startswith("hIT"))
    assert np.abs(squareform(published) - it.of("human IT").rdms.mean(0)).max() < 2e-7
    twice = it.of("human IT").rdms.reshape(4, 2, 92, 92)
    found = [spearmanr(upper(first), upper(second))[0] for first, second in twice]
    assert found == pytest.approx([0.28, 0.10, 0.38, 0.12], abs=5e-3)


@with_92
def test_dissimilarities_belong_to_their_images(it):
    """Animate and inanimate things are told apart, as much as is known of these data."""
    animate = np.array(["inanimate" not in kind for kind in it.groups])
    assert animate.sum() == 48
    model = animate[:, None] != animate[None]
    people = it.of("human IT").rdms.mean(0)
    for rdm, published in ((it.of("monkey IT").rdms[0], 0.453), (people, 0.588)):
        assert spearmanr(upper(model.astype(float)), upper(rdm))[0] == pytest.approx(published, abs=5e-4)


@with_v4
@with_92
def test_a_folder_of_both_sets():
    assert [one.name for one in load_recordings(SHARED)] == [
        "cowley2026 190923",
        "cowley2026 201025",
        "cowley2026 210325",
        "cowley2026 210621",
        "kriegeskorte2008",
    ]


# -- sets that are there in part, made here ---------------------------------------------------------------------------


def archive(folder: Path, session: str, num: int, inside: str = "", size: int = 8) -> None:
    with zipfile.ZipFile(folder / f"images_{session}.zip", "w") as file:
        for number in reversed(range(num)):
            jpeg = io.BytesIO()
            Image.new("L", (size, size), 20 * number).save(jpeg, format="jpeg")
            file.writestr(f"{inside}image{number + 1:04d}.jpg", jpeg.getvalue())


@pytest.fixture
def v4(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "responses_raw_210325.npy", rng.random((3, 5, 4)))
    archive(tmp_path, "210325", 5)
    np.save(tmp_path / "responses_avg_220101.npy", rng.random((2, 6)))
    archive(tmp_path, "220101", 6, inside="images_220101/")
    return tmp_path


def test_sessions_of_which_nothing_else_is_known(v4):
    known, other = load_recordings(v4)
    assert known.responses.shape == (5, 3, 4, 1) and other.responses.shape == (6, 2, 1, 1)
    assert (other.name, other.subjects, other.repeats) == ("cowley2026 220101", ("unknown", "unknown"), "")
    # sorted by name, whatever their order in the archive
    assert other.stimuli[1] == "image0002" and other.images.images[:, 0, 0, 0].tolist() == [0, 20, 40, 60, 80, 100]


def test_single_trials_before_means(v4):
    np.save(v4 / "responses_avg_210325.npy", np.zeros((3, 5)))
    assert [one.trials for one in load_recordings(v4)] == [4, 1]


def wrong_shape(folder: Path) -> None:
    np.save(folder / "responses_avg_220101.npy", np.zeros((2, 6, 3)))


def pickled(folder: Path) -> None:
    np.save(folder / "responses_avg_220101.npy", np.array([[None] * 6]), allow_pickle=True)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda v4: (v4 / "images_220101.zip").unlink(), r"no images_220101\.zip"),
        (
            lambda v4: (v4 / "responses_avg_220101.npy").unlink(),
            r"no responses_raw_220101\.npy or responses_avg_220101\.npy",
        ),
        (lambda v4: archive(v4, "220101", 4), r"images_220101\.zip holds 4 images, responses_avg_220101\.npy 6"),
        (lambda v4: archive(v4, "220101", 0), r"images_220101\.zip holds no images"),
        (lambda v4: (v4 / "images_220101.zip").write_bytes(b"PK"), r"images_220101\.zip cannot be read"),
        (lambda v4: (v4 / "responses_avg_220101.npy").write_bytes(b"x"), r"responses_avg_220101\.npy cannot be read"),
        (wrong_shape, r"is float64 of shape \(2, 6, 3\); allowed: numbers \(neurons, images\)"),
        (pickled, r"responses_avg_220101\.npy cannot be read"),
    ],
)
def test_incomplete_sessions_are_left_out_with_a_reason(v4, harm, why):
    harm(v4)
    with pytest.warns(UserWarning, match=rf"left out sessions of Cowley et al\. 2026 in .*: 220101 \(.*{why}\)"):
        (one,) = load_recordings(v4)
    assert one.name == "cowley2026 210325"
    (v4 / "images_210325.zip").unlink()
    with pytest.raises(UserError, match=r"no complete session.*: 210325 \(no images_210325\.zip\), 220101 \(.*" + why):
        load_recordings(v4)


def images_of_two_sizes(folder: Path) -> None:
    archive(folder, "220101", 5)
    jpeg = io.BytesIO()
    Image.new("RGB", (9, 9)).save(jpeg, format="jpeg")
    with zipfile.ZipFile(folder / "images_220101.zip", "a") as file:
        file.writestr("image0006.jpg", jpeg.getvalue())


def test_images_of_two_sizes_are_said_to_be(v4):
    images_of_two_sizes(v4)
    with pytest.warns(UserWarning, match="holds images of 2 sizes"):
        assert len(load_recordings(v4)) == 1


def test_a_damaged_image_of_an_archive(v4):
    with zipfile.ZipFile(v4 / "images_220101.zip", "a") as file:
        file.writestr("image0007.jpg", b"\xff\xd8\xff\xe0 nothing more")
    with pytest.warns(UserWarning, match=r"220101 \(image0007\.jpg in images_220101\.zip cannot be read"):
        assert len(load_recordings(v4)) == 1


@pytest.fixture
def few(tmp_path) -> Path:
    """Four images in the layout of the 92."""
    rng = np.random.default_rng(0)
    shown = np.array(
        [(f"kind {i // 2}", rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for i in range(4)],
        dtype=[("category", object), ("image", object)],
    )
    rdms = np.array([("mIT_674neurons", rng.random(6)), ("hITvisStim_316vx", rng.random(6))], dtype="O,O")
    rdms.dtype.names = ("name", "RDM")
    savemat(
        tmp_path / "Kriegeskorte_Neuron2008_supplementalData.mat", {"stimuli_92objs": shown, "RDMs_mIT_hIT_fig1": rdms}
    )
    human = squareform(rng.random(6)).astype(np.float32)
    people = np.array(
        [[(f"hIT | {who} | Session: {session}", human) for session in (1, 2)] for who in ("BE", "KO")], dtype="O,O"
    )
    people.dtype.names = ("name", "RDM")
    savemat(tmp_path / "92_brainRDMs.mat", {"RDMs": people})
    return tmp_path


def test_matlab_structs_become_matrices(few):
    (one,) = load_recordings(few)
    assert one.regions == ("monkey IT",) + ("human IT",) * 4 and one.subjects[1:] == ("BE", "BE", "KO", "KO")
    assert one.groups == ("kind 0", "kind 0", "kind 1", "kind 1") and one.images.images.shape == (4, 3, 6, 6)


def test_92_images_in_part(few):
    main, people = few / "Kriegeskorte_Neuron2008_supplementalData.mat", few / "92_brainRDMs.mat"
    whole = people.read_bytes()
    people.unlink()
    with pytest.warns(
        UserWarning, match=r"left out human IT of Kriegeskorte et al\. 2008: .* has no 92_brainRDMs\.mat"
    ):
        (one,) = load_recordings(few)
    assert one.areas == ["monkey IT"]
    people.write_bytes(whole[:200])
    with pytest.raises(UserError, match=r"92_brainRDMs\.mat cannot be read"):
        load_recordings(few)
    savemat(people, {"other": 1})
    with pytest.raises(UserError, match=r"does not hold the files of Kriegeskorte et al\. 2008 as published"):
        load_recordings(few)
    people.write_bytes(whole)
    main.unlink()
    with pytest.raises(UserError, match=r"has no Kriegeskorte_Neuron2008_supplementalData\.mat, which holds the 92 im"):
        load_recordings(few)
