from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localsim.data.embedded import CLASSES, render
from localsim.errors import UserError


def test_shapes_types_and_range():
    images, labels = render(30, 24, seed=0)
    assert images.shape == (30, 3, 24, 24) and images.dtype == torch.uint8
    assert labels.shape == (30,) and labels.dtype == torch.int64
    assert images.amin() < 40 and images.amax() > 215


@settings(deadline=None, max_examples=10)
@given(few=st.integers(1, 40), more=st.integers(1, 300), seed=st.integers(0, 2**31), size=st.sampled_from([8, 15, 32]))
def test_a_larger_set_begins_with_the_smaller_one(few, more, seed, size):
    images, labels = render(few, size, seed)
    larger, larger_labels = render(few + more, size, seed)
    assert torch.equal(larger[:few], images)
    assert torch.equal(larger_labels[:few], labels)


def test_every_run_holds_each_class_once_in_a_changing_order():
    _, labels = render(20 * len(CLASSES), 8, seed=3)
    runs = labels.reshape(20, len(CLASSES))
    assert torch.equal(runs.sort(dim=1).values, torch.arange(len(CLASSES)).expand(20, -1))
    assert len({tuple(run.tolist()) for run in runs}) > 15


def test_no_picture_comes_twice_within_or_between_seeds():
    pictures = torch.cat([render(200, 16, seed)[0] for seed in (0, 1)]).flatten(1)
    assert len({picture.numpy().tobytes() for picture in pictures}) == 400


def test_nuisances_say_nothing_of_the_class():
    """The mean colour of a picture follows its nuisances; between classes it differs no more than chance lets it."""
    images, labels = render(2000, 16, seed=0)
    colour = images.double().mean(dim=(2, 3))
    groups = torch.stack([colour[labels == label].mean(dim=0) for label in range(len(CLASSES))])
    per_class = 2000 / len(CLASSES)
    f_ratio = per_class * groups.var(dim=0) / colour.var(dim=0)
    assert f_ratio.amax() < 4  # F(9, 1990) exceeds 4 once in 20,000


def _nearest_centroid(train, train_labels, test, test_labels) -> float:
    scale = train.std(axis=0) + 1e-9
    centroids = np.stack([train[train_labels == label].mean(axis=0) for label in range(len(CLASSES))])
    distance = (((test[:, None] - centroids) / scale) ** 2).sum(axis=2)
    return float((distance.argmin(axis=1) == test_labels).mean())


def _spectrum(grey: np.ndarray) -> np.ndarray:
    """Return the log amplitude of each picture's coarsely pooled frequencies: blind to position."""
    amplitude = np.abs(np.fft.rfft2(grey - grey.mean(axis=(1, 2), keepdims=True)))[:, :32, :16]
    pooled = amplitude.reshape(len(grey), 16, 2, 8, 2).mean(axis=(2, 4)).reshape(len(grey), -1)
    return np.log(pooled + 1)


def test_the_class_is_in_the_texture_and_not_in_the_pixels():
    images, labels = render(1500, 32, seed=0)
    grey, labels = images.double().mean(dim=1).numpy(), labels.numpy()
    scores = {}
    for name, data in (("pixels", grey.reshape(1500, -1)), ("spectrum", _spectrum(grey))):
        scores[name] = _nearest_centroid(data[:1000], labels[:1000], data[1000:], labels[1000:])
    assert scores["pixels"] < 0.25
    assert scores["spectrum"] > 0.4


@pytest.mark.parametrize(("num_images", "size", "value"), [(0, 32, "0"), (-3, 32, "-3"), (5, 7, "7")])
def test_impossible_requests_name_the_value(num_images, size, value):
    with pytest.raises(UserError, match=f"{value} (images|pixels)"):
        render(num_images, size, seed=0)
