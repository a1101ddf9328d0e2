"""Random views: the same operations as torchvision's, but drawn for every image on its own."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as reference

from localsim.data import augment
from localsim.data.augment import AUGMENTATIONS, Augmentation, augment_batch, crop_image, recolour_
from localsim.errors import UserError

KEY = (0, "augment", 0)
NONE = AUGMENTATIONS["none"]


def noise(num: int, height: int, width: int | None = None) -> torch.Tensor:
    shape = (num, 3, height, width or height)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(num))


def smooth(num: int, height: int, width: int) -> torch.Tensor:
    coarse = noise(num, 5).float()
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear").round().to(torch.uint8)


def draws_of(indices: np.ndarray, view: int = 0) -> np.ndarray:
    return augment.rng.uniform(indices, augment._NUM_DRAWS, *KEY, view)


@pytest.mark.parametrize("name", ["barlow_twins", "small", "crop_flip"])
def test_identical_images_of_a_batch_get_different_views(name):
    images = noise(1, 32).expand(16, -1, -1, -1)
    views = augment_batch(images, np.arange(16), AUGMENTATIONS[name], size=32, view=0, key=KEY).flatten(1)
    assert torch.pdist(views, p=float("inf")).min() > 0.01


def test_identical_images_get_different_colours_without_a_crop():
    jitter = replace(NONE, jitter=1.0)
    views = augment_batch(noise(1, 8).expand(16, -1, -1, -1), np.arange(16), jitter, size=8, view=0, key=KEY)
    assert torch.pdist(views.flatten(1), p=float("inf")).min() > 0.01


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_view_depends_on_the_image_and_its_index_not_on_the_batch(name):
    images, indices = noise(12, 24), np.arange(100, 112)
    together = augment_batch(images, indices, AUGMENTATIONS[name], size=24, view=1, key=KEY)
    chosen = [7, 0, 3]
    apart = augment_batch(images[chosen], indices[chosen], AUGMENTATIONS[name], size=24, view=1, key=KEY)
    # the order of sums inside a batched matrix product may differ, the draws may not
    torch.testing.assert_close(apart, together[chosen], rtol=0, atol=1e-5)


def test_a_crop_has_the_same_bits_however_the_image_lies_in_memory():
    """Files are decoded with the values of a pixel side by side, which is several times faster to resample."""
    for index, image in enumerate(noise(8, 60, 47)):
        beside = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        crop, other = (
            crop_image(one, index, AUGMENTATIONS["barlow_twins"], size=32, view=0, key=KEY) for one in (image, beside)
        )
        assert beside.stride() != image.stride() and torch.equal(crop, other)


@pytest.mark.parametrize("change", [{"view": 1}, {"key": (1, "augment", 0)}, {"key": (0, "augment", 1)}])
def test_views_seeds_and_epochs_differ(change):
    call = {"size": 16, "view": 0, "key": KEY}
    first, again, other = (
        augment_batch(noise(4, 16), np.arange(4), AUGMENTATIONS["small"], **(call | extra))
        for extra in ({}, {}, change)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().amax((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (40, 60, 16), (20, 20, 48)])
def test_crop_is_torchvisions_resized_crop(height, width, size):
    images, indices = smooth(24, height, width), np.arange(24)
    crops = AUGMENTATIONS["crop_flip"]
    views = augment_batch(images, indices, crops, size=size, view=0, key=KEY)
    draws = draws_of(indices)
    boxes = augment._crop_boxes(draws, height, width, crops).tolist()
    flips = draws[:, augment._FLIP] < 0.5
    assert flips.any() and not flips.all()
    bicubic = v2.InterpolationMode.BICUBIC
    for image, view, (top, left, rows, columns), flip in zip(images, views, boxes, flips, strict=True):
        expected = reference.resized_crop(image / 255, top, left, rows, columns, [size, size], bicubic, antialias=True)
        expected = reference.horizontal_flip(expected) if flip else expected
        torch.testing.assert_close(view, expected.clamp(0, 1), rtol=0, atol=2e-5)


def test_streamed_crops_are_the_crops_of_the_batch_rounded_to_bytes():
    images, indices = smooth(8, 30, 40), np.arange(8)
    augmentation = AUGMENTATIONS["crop_flip"]
    views = augment_batch(images, indices, augmentation, size=20, view=1, key=KEY)
    for i in indices:
        crop = crop_image(images[i], int(i), augmentation, size=20, view=1, key=KEY)
        assert crop.dtype == torch.uint8
        torch.testing.assert_close(crop / 255, views[i], rtol=0, atol=2 / 255)


def test_streamed_and_batched_views_have_the_same_colours():
    images, indices = smooth(16, 24, 24), np.arange(16)
    augmentation = replace(AUGMENTATIONS["barlow_twins"], solarize=(0.0,))
    batched = augment_batch(images, indices, augmentation, size=24, view=1, key=KEY)
    crops = [crop_image(images[i], int(i), augmentation, size=24, view=1, key=KEY) for i in indices]
    streamed = recolour_(torch.stack(crops) / 255, indices, augmentation, view=1, key=KEY)
    assert (streamed - batched).abs().mean() < 1 / 255


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from(["barlow_twins", "small", "none"]))
def test_crop_boxes_lie_inside_the_image(height, width, name):
    top, left, rows, columns = augment._crop_boxes(draws_of(np.arange(200)), height, width, AUGMENTATIONS[name]).T
    assert (top >= 0).all() and (left >= 0).all() and (rows >= 1).all() and (columns >= 1).all()
    assert (top + rows <= height).all() and (left + columns <= width).all()


def test_crop_boxes_have_the_distribution_of_torchvision():
    num = 4000
    ours = augment._crop_boxes(draws_of(np.arange(num)), 50, 60, Augmentation())
    image = torch.empty(3, 50, 60)
    with augment.rng.keyed("reference"):
        params = [v2.RandomResizedCrop(8).make_params([image]) for _ in range(num)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params])
    for column in range(4):
        deciles = np.arange(0.1, 1, 0.1)
        # the standard error of these deciles is below 1 pixel
        assert abs(np.quantile(ours[:, column], deciles) - np.quantile(theirs[:, column], deciles)).max() <= 2


def test_no_crop_that_fits_gives_the_largest_allowed_central_box():
    box = augment._crop_boxes(draws_of(np.arange(3)), 40, 100, NONE)
    assert box.tolist() == [[0, 30, 40, 40]] * 3


def test_none_returns_square_images_as_they_are():
    images = noise(5, 16)
    torch.testing.assert_close(
        augment_batch(images, np.arange(5), NONE, size=16, view=0, key=KEY), images / 255, rtol=0, atol=1e-6
    )


ADJUST = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)


def test_jitter_is_torchvisions_in_each_images_own_order():
    num = 24
    orders = np.array([np.random.default_rng(i).permutation(4) for i in range(num)])
    amounts = np.random.default_rng(0).uniform([0.2, 0.2, 0.0, -0.5], [1.8, 1.8, 2.0, 0.5], (num, 4))
    images = noise(num, 9) / 255
    images[0] = 0.25  # grey: no hue
    images[1, :2] = 1.0  # two highest channels
    images[2, 1:] = 0.0
    expected = images.clone()
    for i in range(num):
        for change in orders[i]:
            expected[i] = ADJUST[change](expected[i], float(amounts[i, change]))
    torch.testing.assert_close(augment._jitter_(images.clone(), amounts, orders), expected, rtol=0, atol=3e-5)


def test_jitter_draws_the_ranges_of_the_augmentation():
    augmentation = Augmentation(brightness=1.5, contrast=0.4, saturation=0.2, hue=0.1)
    amounts, order = augment._jitter_parameters(draws_of(np.arange(5000)), augmentation)
    np.testing.assert_allclose(amounts.min(0), [0, 0.6, 0.8, -0.1], atol=5e-3)
    np.testing.assert_allclose(amounts.max(0), [2.5, 1.4, 1.2, 0.1], atol=5e-3)
    np.testing.assert_allclose(amounts.mean(0), [1.25, 1, 1, 0], atol=0.05)
    assert (np.sort(order, axis=1) == np.arange(4)).all()
    _, counts = np.unique(order, axis=0, return_counts=True)
    assert len(counts) == 24 and counts.min() > 150  # 208 expected, standard deviation 14


@pytest.mark.parametrize("size", [6, 32])
def test_blur_is_torchvisions_with_a_sigma_for_each_image(size):
    images, indices = noise(10, size), np.arange(10)
    blur = replace(NONE, blur=(1.0,), blur_sigma=(0.3, 2.0))
    views = augment_batch(images, indices, blur, size=size, view=0, key=KEY)
    sigmas = 0.3 + 1.7 * draws_of(indices)[:, augment._SIGMA]
    kernel = 2 * augment._blur_radius(2.0, size) + 1
    for image, view, sigma in zip(images, views, sigmas, strict=True):
        expected = reference.gaussian_blur(image / 255, [kernel, kernel], [sigma, sigma])
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


def test_grey_and_solarisation_are_torchvisions():
    images, indices = noise(4, 8), np.arange(4)
    grey = augment_batch(images, indices, replace(NONE, gray=1.0), size=8, view=0, key=KEY)
    expected = reference.rgb_to_grayscale(images / 255, num_output_channels=3)
    torch.testing.assert_close(grey, expected, rtol=0, atol=1e-5)
    # nothing is resampled at 8 pixels, but weights of 1 +- rounding could move a value of exactly 128
    images[images == 128] = 129
    images[images == 127] = 126
    solarised = augment_batch(images, indices, replace(NONE, solarize=(1.0,)), size=8, view=0, key=KEY)
    torch.testing.assert_close(solarised, reference.solarize(images, 128) / 255, rtol=0, atol=1e-6)


def test_probabilities_differ_by_view():
    images = noise(400, 8)
    kept = []
    for view in range(3):
        solarise = replace(NONE, solarize=(0.0, 0.2))
        views = augment_batch(images, np.arange(400), solarise, size=8, view=view, key=KEY)
        kept.append(((views - images / 255).abs().amax((1, 2, 3)) > 1e-3).float().mean().item())
    assert kept[0] == kept[2] == 0  # the third view takes the first entry again
    assert kept[1] == pytest.approx(0.2, abs=0.07)


def test_colour_is_changed_as_often_as_asked():
    images = noise(500, 4)
    for name, probability in (("jitter", 0.8), ("gray", 0.2)):
        views = augment_batch(
            images, np.arange(500), replace(NONE, **{name: probability}), size=4, view=0, key=(3, "often")
        )
        changed = ((views - images / 255).abs().amax((1, 2, 3)) > 1e-3).float().mean().item()
        assert changed == pytest.approx(probability, abs=0.08), name


def test_views_stay_between_zero_and_one():
    edges = noise(64, 32) // 128 * 255
    views = augment_batch(edges, np.arange(64), Augmentation(), size=48, view=1, key=KEY)
    assert views.dtype == torch.float32 and views.min() >= -1e-6 and views.max() <= 1 + 1e-6


STRENGTHS = st.floats(0, 1)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_strength_one_is_the_augmentation_itself_and_zero_changes_nothing(name):
    augmentation, images = AUGMENTATIONS[name], noise(8, 16)
    assert augmentation.scaled(1) == augmentation
    for view in (0, 1):
        views = augment_batch(images, np.arange(8), augmentation.scaled(0), size=16, view=view, key=KEY)
        torch.testing.assert_close(views, images / 255, rtol=0, atol=1e-6)


def test_strength_one_half_lies_in_the_middle():
    half = Augmentation(crop_scale=(0.2, 0.8), crop_ratio=(0.25, 4.0), blur=(1.0, 0.1), hue=0.3).scaled(0.5)
    assert half.crop_scale == pytest.approx((0.6, 0.9)) and half.crop_ratio == pytest.approx((0.5, 2.0))
    assert half.blur == pytest.approx((0.5, 0.05)) and half.hue == pytest.approx(0.15)
    assert half.flip == pytest.approx(0.25) and half.blur_sigma == pytest.approx((0.05, 1.0), abs=1e-3)


@settings(deadline=None, max_examples=50)
@given(STRENGTHS, STRENGTHS, st.sampled_from(["barlow_twins", "small_strong", "patches"]))
def test_more_strength_never_changes_less(one, other, name):
    weak, strong = (AUGMENTATIONS[name].scaled(strength) for strength in sorted((one, other)))
    for field in fields(Augmentation):
        less, more = np.array(getattr(weak, field.name)), np.array(getattr(strong, field.name))
        if field.name == "crop_scale":
            less, more = -less, -more
        elif field.name == "crop_ratio":
            less, more = np.abs(np.log(less)), np.abs(np.log(more))
        assert (less <= more + 1e-12).all(), field.name


def test_views_move_further_from_the_image_with_strength():
    images = smooth(64, 32, 32)
    moved = []
    for strength in (0, 0.25, 0.5, 0.75, 1):
        scaled = AUGMENTATIONS["barlow_twins"].scaled(strength)
        views = augment_batch(images, np.arange(64), scaled, size=32, view=0, key=KEY)
        moved.append((views - images / 255).abs().mean().item())
    assert moved == sorted(moved) and moved[-1] > 0.1


@pytest.mark.parametrize("sigma", [1e-4, 0.001, 0.01])
def test_a_narrow_blur_changes_nothing(sigma):
    images = noise(3, 8)
    blur = replace(NONE, blur=(1.0,), blur_sigma=(sigma, sigma))
    views = augment_batch(images, np.arange(3), blur, size=8, view=0, key=KEY)
    torch.testing.assert_close(views, images / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan")])
def test_strengths_out_of_range_are_refused(strength):
    with pytest.raises(UserError, match=rf"^augmentation strength is {strength}; it must be between 0 and 1$"):
        Augmentation().scaled(strength)


def test_patch_views_are_random_crops_of_64_of_96_pixels_without_colour():
    images, indices, patches = noise(6, 96), np.arange(6), AUGMENTATIONS["patches"]
    views = augment_batch(images, indices, patches, size=64, view=0, key=KEY)
    draws = draws_of(indices)
    boxes = augment._crop_boxes(draws, 96, 96, patches).tolist()
    assert len({(top, left) for top, left, _, _ in boxes}) > 1
    for image, view, (top, left, rows, columns), flip in zip(
        images, views, boxes, draws[:, augment._FLIP], strict=True
    ):
        assert (rows, columns) == (64, 64)
        crop = image[:, top : top + 64, left : left + 64] / 255
        expected = reference.rgb_to_grayscale(crop.flip(-1) if flip < 0.5 else crop, num_output_channels=3)
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("crop_scale", (0.0, 1.0), "0 < low <= high <= 1"),
        ("crop_ratio", (2.0, 1.0), "0 < low <= high"),
        ("hue", 0.7, "between 0 and 0.5"),
        ("contrast", -1.0, "between 0 and inf"),
        ("flip", 1.5, "probabilities"),
        ("blur", (), "probabilities"),
    ],
)
def test_fields_out_of_range_are_refused(field, value, allowed):
    with pytest.raises(UserError, match=rf"^{field} is .*{allowed}"):
        Augmentation(**{field: value})
