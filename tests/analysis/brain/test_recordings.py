"""What a recording promises, for any responses or matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localsim.analysis.brain.recordings import Recording
from localsim.data import ImageSet
from localsim.errors import UserError


def images(n: int) -> ImageSet:
    """Image i is all of the value i, so that it can be told where it went."""
    return ImageSet(torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 2, 2).clone(), None, None)


def shown(recording: Recording) -> list[int]:
    assert recording.images.images is not None
    return recording.images.images[:, 0, 0, 0].tolist()


def made(n=5, neurons=3, trials=2, num_bins=2, seed=0, **fields) -> Recording:
    rng = np.random.default_rng(seed)
    responses = rng.normal(size=(n, neurons, trials, num_bins))
    # any trial may be absent, but for one of each image
    absent = rng.random((n, neurons, trials, num_bins)) < 0.4
    absent[:, :, rng.integers(trials)] = False
    responses[absent] = np.nan
    fields = {"regions": [("V4", "IT")[i % 2] for i in range(neurons)], "subjects": list("ab") * neurons} | fields
    fields["subjects"] = fields["subjects"][:neurons]
    return Recording(name="made", images=images(n), responses=responses, **fields)


def matrices(n=6, count=3, seed=0, **fields) -> Recording:
    half = np.random.default_rng(seed).random((count, n, n))
    rdms = half + half.swapaxes(1, 2)
    rdms[:, range(n), range(n)] = 0
    return Recording(name="made", images=images(n), rdms=rdms, **fields)


sizes = st.tuples(st.integers(4, 9), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 999))


# -- properties -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(sizes)
def test_means_leave_out_the_trials_that_were_not_given(size):
    recording = made(*size)
    n, neurons, _, bins = recording.responses.shape
    means = recording.means()
    assert means.shape == (n, neurons) and means.dtype == np.float64
    for image in range(n):
        for neuron in range(neurons):
            cell = recording.responses[image, neuron]
            by_bin = [cell[~np.isnan(cell[:, b]), b].sum() / (~np.isnan(cell[:, b])).sum() for b in range(bins)]
            assert means[image, neuron] == pytest.approx(sum(by_bin) / bins, abs=1e-12)


@settings(deadline=None)
@given(sizes, st.data())
def test_taking_images_keeps_what_belongs_to_them_together(size, data):
    recording = made(*size, groups=[f"group {i}" for i in range(size[0])])
    chosen = data.draw(st.permutations(range(size[0]))).copy()[: data.draw(st.integers(4, size[0]))]
    taken = recording.take(chosen)
    assert shown(taken) == chosen
    assert taken.stimuli == tuple(recording.stimuli[i] for i in chosen)
    assert taken.groups == tuple(f"group {i}" for i in chosen)
    assert np.array_equal(taken.responses, recording.responses[chosen], equal_nan=True)
    assert np.array_equal(taken.means(), recording.means()[chosen])
    assert (taken.regions, taken.subjects, taken.names) == (recording.regions, recording.subjects, recording.names)
    back = taken.take(np.argsort(chosen))
    assert np.array_equal(back.responses, recording.responses[np.sort(chosen)], equal_nan=True)


@settings(deadline=None)
@given(sizes)
def test_regions_share_out_the_neurons(size):
    recording = made(*size)
    parts = [recording.of(area) for area in recording.areas]
    assert sum(part.responses.shape[1] for part in parts) == size[1]
    for area, part in zip(recording.areas, parts, strict=True):
        places = [i for i, region in enumerate(recording.regions) if region == area]
        assert set(part.regions) == {area} and part.areas == [area]
        assert part.names == tuple(recording.names[i] for i in places)
        assert part.subjects == tuple(recording.subjects[i] for i in places)
        assert np.array_equal(part.means(), recording.means()[:, places])
        assert part.images is recording.images


@settings(deadline=None)
@given(sizes)
def test_shuffling_moves_rows_and_nothing_else(size):
    recording = made(*size)
    moved = recording.shuffled(seed=size[-1])
    assert shown(moved) == shown(recording) and moved.stimuli == recording.stimuli
    rows = [row.tobytes() for row in recording.responses]
    assert sorted(row.tobytes() for row in moved.responses) == sorted(rows)
    assert np.array_equal(moved.responses, recording.shuffled(seed=size[-1]).responses, equal_nan=True)


@settings(deadline=None)
@given(sizes)
def test_the_mean_over_bins_is_that_of_the_bins_one_by_one(size):
    spans = tuple((50.0 * b, 50.0 * b + 50) for b in range(size[3]))
    recording = made(*size, bins=spans)
    parts = recording.by_bin()
    assert len(parts) == size[3] and all(part.responses.shape[3] == 1 for part in parts)
    assert [part.bins for part in parts] == [(span,) for span in spans]
    assert len({part.name for part in parts}) == size[3]
    assert np.allclose(np.mean([part.means() for part in parts], axis=0), recording.means(), atol=1e-12, rtol=0)


@settings(deadline=None)
@given(st.integers(4, 9), st.integers(1, 4), st.integers(0, 999), st.data())
def test_images_of_matrices_are_taken_on_both_sides(n, count, seed, data):
    recording = matrices(n, count, seed, subjects=[f"s{i}" for i in range(count)])
    chosen = data.draw(st.permutations(range(n))).copy()[: data.draw(st.integers(4, n))]
    taken = recording.take(chosen)
    assert shown(taken) == chosen
    for place, first in enumerate(chosen):
        for other, second in enumerate(chosen):
            assert np.array_equal(taken.rdms[:, place, other], recording.rdms[:, first, second])
    moved = recording.shuffled(seed)
    assert np.allclose(np.sort(moved.rdms.sum(2)), np.sort(recording.rdms.sum(2)), atol=1e-12, rtol=0)
    last = recording.pick([count - 1])
    assert np.array_equal(last.rdms, recording.rdms[-1:]) and last.subjects == (f"s{count - 1}",)


@settings(deadline=None)
@given(st.integers(4, 60), st.integers(0, 9999))
def test_shuffling_leaves_no_image_its_own(n, seed):
    """All are in one cycle; and matrices move as responses do."""
    rows = Recording(name="made", images=images(n), responses=np.arange(n)[:, None]).shuffled(seed).means()[:, 0]
    place, seen = 0, []
    for _ in range(n):
        seen.append(place)
        place = int(rows[place])
    assert sorted(seen) == list(range(n)) and place == 0
    recording = matrices(n, 1, seed)
    order = rows.astype(int)
    assert np.array_equal(recording.shuffled(seed).rdms[0], recording.rdms[0][np.ix_(order, order)])


def test_hashes_are_of_the_content(tmp_path):
    one, again = made(), made()
    assert one.images is not again.images
    assert (one.images_hash, one.answers_hash) == (again.images_hash, again.answers_hash)
    assert len(one.images_hash) == len(one.answers_hash) == 64
    assert one.take([1, 0, 2, 3, 4]).images_hash != one.images_hash, "in another order"
    assert one.of("V4").images_hash == one.images_hash and one.of("V4").answers_hash != one.answers_hash
    assert one.shuffled().images_hash == one.images_hash and one.shuffled().answers_hash != one.answers_hash
    other = again.images.images.clone()
    other[4, 2, 1, 1] += 1
    assert made(seed=1).images_hash == one.images_hash != Recording("x", other, again.responses).images_hash
    assert matrices().answers_hash == matrices().answers_hash != matrices(seed=1).answers_hash

    def files(folder: str, last: bytes) -> str:
        (tmp_path / folder).mkdir()
        paths = tuple(tmp_path / folder / f"{folder}{number}.png" for number in range(5))
        for number, path in enumerate(paths):
            path.write_bytes(last if number == 4 else bytes([number]))
        return Recording("files", ImageSet(None, paths, None), one.responses).images_hash

    assert files("a", b"end") == files("b", b"end") != files("c", b"END"), "the names of files do not matter"


def test_shuffling_differs_between_seeds():
    recording = made(n=9)
    orders = {recording.shuffled(seed).responses.tobytes() for seed in range(5)}
    assert len(orders) == 5 and recording.responses.tobytes() not in orders


# -- what is filled in ------------------------------------------------------------------------------------------------


def test_axes_words_and_numbers_that_are_not_given():
    recording = Recording(name="few", images=images(12), responses=np.ones((12, 2), dtype=np.float32))
    assert recording.responses.shape == (12, 2, 1, 1) and recording.responses.dtype == np.float64
    assert recording.regions == recording.subjects == ("unknown", "unknown") and recording.names == ("1", "2")
    assert recording.stimuli[0] == "01" and recording.stimuli[-1] == "12" and recording.groups is None
    assert recording.trials == 1 and len(recording) == 12 and recording.by_bin() == [recording]
    assert repr(recording) == "Recording few: 12 images, 2 neurons x 1 trials x 1 bins, unknown"


def test_one_matrix_is_a_stack_of_one():
    recording = Recording(name="one", images=images(4), rdms=1 - np.eye(4), regions=("IT",))
    assert recording.rdms.shape == (1, 4, 4) and recording.trials == 0 and recording.areas == ["IT"]
    assert recording.by_bin() == [recording]


def test_bins_without_times_are_numbered():
    assert [part.name for part in made(num_bins=2).by_bin()] == ["made bin 1", "made bin 2"]


def test_words_of_any_sequence_become_text():
    groups, spans = np.array([1, 1, 2, 2, 3]), np.array([[0, 50], [50, 100]])
    recording = Recording(name="a", images=images(5), responses=np.ones((5, 1, 1, 2)), groups=groups, bins=spans)
    assert recording.groups == ("1", "1", "2", "2", "3") and recording.bins == ((0.0, 50.0), (50.0, 100.0))
    assert [part.name for part in recording.by_bin()] == ["a 0-50 ms", "a 50-100 ms"]


# -- what cannot be ---------------------------------------------------------------------------------------------------


def responses(*shape, at=None, value=np.nan) -> np.ndarray:
    array = np.ones(shape)
    if at is not None:
        array[at] = value
    return array


def rdm(n=4, at=None, value=0.0) -> np.ndarray:
    array = 1 - np.eye(n)
    if at is not None:
        array[at] = value
    return array


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "needs either responses or rdms"),
        ({"responses": responses(4, 2), "rdms": rdm()}, "needs either responses or rdms"),
        ({"responses": responses(4, 2), "name": " "}, "has no name"),
        ({"responses": responses(4, 2), "degrees": 0}, "degrees of it is 0; allowed: above 0"),
        ({"responses": responses(4, 2), "degrees": float("nan")}, "degrees of it is nan"),
        ({"responses": responses(3, 2), "images": images(3)}, "has 3 images; allowed: 4 or more"),
        ({"responses": responses(4)}, r"have shape \(4,\); allowed: \(4 images, neurons\)"),
        ({"responses": responses(5, 2)}, r"have shape \(5, 2\)"),
        ({"responses": responses(4, 0)}, r"have shape \(4, 0\)"),
        ({"responses": responses(4, 2, 3, 1, 1)}, r"have shape \(4, 2, 3, 1, 1\)"),
        ({"responses": responses(4, 2, at=(1, 1), value=np.inf)}, "infinite"),
        ({"responses": responses(4, 2, 3, at=(2, 1))}, "no response of neuron 2 to image 3"),
        ({"responses": responses(4, 2), "bins": ((0, 50), (50, 100))}, "has 2 bins, but its responses 1"),
        ({"responses": responses(4, 2), "bins": ((50, 50),)}, "each ends after it starts"),
        ({"responses": responses(4, 2), "regions": ("V4",)}, "has 1 regions, but needs 2"),
        ({"responses": responses(4, 2), "subjects": tuple("abc")}, "has 3 subjects, but needs 2"),
        ({"responses": responses(4, 2), "groups": ()}, "has 0 groups, but needs 4"),
        ({"responses": responses(4, 2), "stimuli": "abca"}, "two images called 'a'"),
        ({"rdms": rdm(5)}, r"have shape \(1, 5, 5\); allowed: \(matrices, 4, 4\)"),
        ({"rdms": rdm(at=(0, 1), value=np.nan)}, "not finite"),
        ({"rdms": rdm(at=(0, 1), value=0.5)}, "not symmetric"),
        ({"rdms": rdm(at=(0, 0), value=0.5)}, "zeros on the diagonal"),
    ],
)
def test_what_cannot_be_a_recording(fields, why):
    with pytest.raises(UserError, match=why):
        Recording(**{"name": "it", "images": images(4), **fields})


def test_matrices_have_no_means_and_unknown_regions_are_named():
    with pytest.raises(UserError, match="made has RDMs only; allowed: metrics that compare RDMs"):
        matrices().means()
    with pytest.raises(UserError, match="unknown region of made 'V1'; allowed: V4, IT"):
        made().of("V1")
    with pytest.raises(UserError, match="has 2 images; allowed: 4 or more"):
        made().take([0, 1])
    with pytest.raises(UserError, match="two images called '1'"):
        made().take([0, 0, 1, 2])
