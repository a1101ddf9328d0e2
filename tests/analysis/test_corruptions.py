from __future__ import annotations

import colorsys
import io
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from localsim.analysis import corruption_kernels as kernels
from localsim.analysis.corruptions import CATEGORIES, CORRUPTIONS, SEVERITIES, corrupt
from localsim.data import load_data
from localsim.errors import UserError

SMALL = 32


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    test = load_data("embedded", image_size=SMALL, train_images=10, test_images=12).test
    assert test is not None and test.images is not None
    return test.images


def of_one_value(value: int, num: int = 4, side: int = SMALL) -> torch.Tensor:
    return torch.full((num, 3, side, side), value, dtype=torch.uint8)


def draws(num: int) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in range(num)]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).square().mean())


def test_the_fifteen_corruptions_of_the_benchmark_in_four_categories():
    assert len(CORRUPTIONS) == 15
    counts = {category: sum(c.category == category for c in CORRUPTIONS.values()) for category in CATEGORIES}
    assert counts == {"noise": 3, "blur": 4, "weather": 4, "digital": 4}
    for corruption in CORRUPTIONS.values():
        assert sorted(corruption.constants) == [32, 64, 224]
        assert all(len(rows) == 5 for rows in corruption.constants.values())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alike_in_every_batch(name, images):
    indices = np.arange(len(images)) + 40
    before = images.clone()
    together = corrupt(images, name, 4, seed=3, indices=indices)
    assert torch.equal(images, before), "the images themselves stay"
    assert together.dtype == torch.uint8 and together.shape == images.shape
    assert all(not torch.equal(a, b) for a, b in zip(together, images, strict=True))
    parts = [corrupt(images[i : i + 5], name, 4, seed=3, indices=indices[i : i + 5]) for i in (0, 5, 10)]
    assert torch.equal(torch.cat(parts), together)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    assert torch.equal(corrupt(images[order], name, 4, seed=3, indices=indices[order.numpy()]), together[order])


DRAWN = [name for name in CORRUPTIONS if CORRUPTIONS[name].category == "noise"] + [
    "glass_blur",
    "motion_blur",
    "snow",
    "frost",
    "fog",
    "elastic_transform",
]


@pytest.mark.parametrize("name", DRAWN)
def test_draws_differ_between_images_and_seeds(name, images):
    twice = images[:1].expand(2, -1, -1, -1)
    one, other = corrupt(twice, name, 3, seed=0, indices=[0, 1])
    assert not torch.equal(one, other)
    assert not torch.equal(corrupt(twice, name, 3, seed=1, indices=[0, 1])[0], one)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"elastic_transform"}))
@pytest.mark.parametrize("side", [SMALL, 64])
def test_the_distance_from_the_clean_image_grows_with_severity(name, side, images):
    clean = torch.nn.functional.interpolate(images.float(), size=side, mode="bilinear").round().to(torch.uint8)
    steps = [distance(corrupt(clean, name, level, indices=range(len(clean))), clean) for level in SEVERITIES]
    slope = np.polyfit(SEVERITIES, steps, 1)[0]
    assert slope > 0 and steps[-1] > 1.2 * steps[0], steps


def test_local_warps_grow_with_severity_though_the_affine_shift_shrinks(images):
    x = images.numpy().astype(np.float32) / 255
    distances = []
    for level in SEVERITIES[1:]:
        strength, smoothness, _ = CORRUPTIONS["elastic_transform"].parameters(level, SMALL)
        warped = kernels.elastic_transform(x, draws(len(x)), strength, smoothness, 0.0)
        distances.append(float(np.square(warped - x).mean()))
    assert distances == sorted(distances)
    shifts = [CORRUPTIONS["elastic_transform"].parameters(level, SMALL)[2] for level in SEVERITIES]
    assert shifts == sorted(shifts, reverse=True)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("level", [1, 5])
def test_oblong_and_tiny_images_are_corrupted_too(name, level, images):
    for height, width in ((24, 40), (8, 9)):
        cut = torch.nn.functional.interpolate(images[:2].float(), size=(height, width)).to(torch.uint8)
        assert corrupt(cut, name, level, indices=[0, 1]).shape == (2, 3, height, width)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_published_constants_at_their_sizes_and_between_them_at_the_logarithm():
    noise = CORRUPTIONS["gaussian_noise"]
    for side, published in ((32, 0.10), (64, 0.18), (224, 0.38)):
        assert noise.parameters(5, side) == pytest.approx((published,), abs=1e-12)
    assert noise.parameters(5, round(math.sqrt(32 * 64)))[0] == pytest.approx(0.14, abs=1e-3)  # half-way in log
    for corruption, level in itertools.product(CORRUPTIONS.values(), SEVERITIES):
        low, high = corruption.constants[64][level - 1], corruption.constants[224][level - 1]
        for value, a, b in zip(corruption.parameters(level, 128), low, high, strict=True):
            assert min(a, b) - 1e-9 <= value <= max(a, b) + 1e-9


def test_beyond_the_published_sizes_lengths_scale_with_the_side_and_the_rest_stays():
    blur = CORRUPTIONS["defocus_blur"]
    radius, softening = blur.parameters(5, 224)
    assert blur.parameters(5, 448) == pytest.approx((2 * radius, softening))
    radius, softening = blur.parameters(5, 32)
    assert blur.parameters(5, 16) == pytest.approx((radius / 2, softening))
    assert CORRUPTIONS["jpeg_compression"].parameters(1, 448) == CORRUPTIONS["jpeg_compression"].parameters(1, 224)


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_gaussian_noise_has_the_deviation_of_its_severity():
    grey = of_one_value(128, num=8)
    for level, deviation in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noise = (corrupt(grey, "gaussian_noise", level, indices=range(8)).double() - 128) / 255
        n = noise.numel()
        variance = deviation**2 + 1 / 12 / 255**2  # rounding adds that of a uniform draw
        assert abs(float(noise.mean())) < 5 * deviation / math.sqrt(n)
        assert float(noise.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / n))


def test_shot_noise_has_the_variance_of_counted_photons():
    for value in (64, 128):
        noisy = corrupt(of_one_value(value, num=8), "shot_noise", 5, indices=range(8)).double() / 255
        n, level = noisy.numel(), value / 255
        variance = level / 50
        assert float(noisy.mean()) == pytest.approx(level, abs=5 * math.sqrt(variance / n))
        assert float(noisy.var()) == pytest.approx(variance, rel=5 * math.sqrt(2.1 / n))


def test_impulse_noise_hits_its_share_of_values_with_black_or_white():
    noisy = corrupt(of_one_value(100, num=8), "impulse_noise", 5, indices=range(8))
    assert set(noisy.unique().tolist()) == {0, 100, 255}
    n, share = noisy.numel(), 0.07
    for value in (0, 255):
        found = float((noisy == value).double().mean())
        assert found == pytest.approx(share / 2, abs=5 * math.sqrt(share / 2 / n))


@pytest.mark.parametrize("radius, softening", [(0.3, 0.4), (1.5, 0.1), (3, 0.1), (8, 0.5), (10, 0.5)])
def test_defocus_kernels_are_symmetric_disks_of_sum_one(radius, softening):
    kernel = kernels.defocus_kernel(radius, softening)
    assert kernel.sum() == pytest.approx(1, abs=1e-12) and kernel.min() >= 0
    for other in (kernel.T, kernel[::-1], kernel[:, ::-1]):
        np.testing.assert_allclose(kernel, other, atol=1e-15)
    middle = len(kernel) // 2
    offset = np.arange(len(kernel)) - middle
    far = np.hypot(offset[:, None], offset) > radius + 3
    assert np.all(kernel[far] == 0)
    inner = kernel[np.hypot(offset[:, None], offset) < radius - 3]
    assert np.ptp(inner) < 1e-12 if inner.size else True
    area = (np.hypot(offset[:, None], offset) <= radius).sum()
    if radius >= 3:  # deep inside, softening changes nothing
        assert kernel[middle, middle] == pytest.approx(1 / area, rel=1e-6)


def test_defocus_of_a_point_is_the_kernel():
    x = np.zeros((1, 3, 33, 33), dtype=np.float64)
    x[..., 16, 16] = 1
    blurred = kernels.defocus_blur(x, draws(1), 3, 0.5)
    kernel = kernels.defocus_kernel(3, 0.5)
    wing = len(kernel) // 2
    np.testing.assert_allclose(blurred[0, 0, 16 - wing : 17 + wing, 16 - wing : 17 + wing], kernel, atol=1e-12)


def test_brightness_adds_to_the_value_of_hsv(images):
    added = CORRUPTIONS["brightness"].parameters(4, SMALL)[0]
    brighter = corrupt(images[:2], "brightness", 4, indices=[0, 1])
    for before, after in zip(images[:2, :, ::5, ::5].permute(0, 2, 3, 1).reshape(-1, 3).tolist(),
                             brighter[:, :, ::5, ::5].permute(0, 2, 3, 1).reshape(-1, 3).tolist(),
                             strict=True):  # fmt: skip
        hue, saturation, value = colorsys.rgb_to_hsv(*(v / 255 for v in before))
        expected = colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1))
        assert np.abs(np.array(after) - 255 * np.array(expected)).max() < 0.51
    assert set(corrupt(of_one_value(0), "brightness", 5, indices=range(4)).unique().tolist()) == {76}  # 0.3 * 255


def test_contrast_shrinks_towards_each_channels_mean(images):
    low = corrupt(images, "contrast", 5, indices=range(len(images))).double()
    x = images.double()
    mean = x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(low, (x - mean) * 0.15 + mean, atol=0.51, rtol=0)


@pytest.mark.parametrize("level", SEVERITIES)
def test_jpeg_is_pils_own(level, images):
    quality = (80, 65, 58, 50, 40)[level - 1]
    ours = corrupt(images[:3], "jpeg_compression", level, indices=range(3))
    for image, stored in zip(images, ours, strict=False):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        assert np.array_equal(np.asarray(Image.open(file)), stored.permute(1, 2, 0).numpy())


def test_pixelating_to_half_gives_means_of_two_by_two():
    x = np.random.default_rng(0).integers(0, 256, (1, 3, 64, 64)).astype(np.float32) / 255
    coarse = kernels.pixelate(x, draws(1), 0.5)
    means = x.reshape(1, 3, 32, 2, 32, 2).mean((3, 5))
    np.testing.assert_allclose(coarse[..., ::2, ::2], means, atol=1.01 / 255)
    assert np.array_equal(coarse[..., ::2, ::2], coarse[..., 1::2, 1::2])


def test_a_smeared_point_is_half_a_gaussian_along_the_line():
    x = np.zeros((1, 21, 21))
    x[0, 10, 10] = 1
    weights = np.exp(-(np.arange(9) ** 2) / (2 * 2.0**2))
    for degrees, across, along in ((0, 0, -1), (90, -1, 0), (180, 0, 1), (45, -1, -1)):
        smeared = kernels.smear(x, 4, 2.0, degrees)[0]
        assert smeared.sum() == pytest.approx(1)
        if degrees != 45:  # rounding to whole pixels joins some places of the diagonal
            found = [smeared[10 + across * i, 10 + along * i] for i in range(9)]
            np.testing.assert_allclose(found, weights / weights.sum(), atol=1e-12)
        rows, columns = np.nonzero(smeared)
        assert np.all((rows - 10) * across >= 0) and np.all((columns - 10) * along >= 0)


def test_enlarging_is_exact_on_ramps_and_keeps_the_centre():
    ramp = np.broadcast_to(np.arange(11.0), (1, 11, 11))
    np.testing.assert_allclose(kernels.enlarge(ramp, 1.0), ramp)
    np.testing.assert_allclose(kernels.enlarge(ramp, 2.0)[0, 4], 5 + (np.arange(11) - 5) / 2)


def test_glass_takes_every_pixel_from_nearby():
    height, width = 16, 20
    row, column = np.indices((height, width)).astype(np.float32)
    x = np.stack([row, column, row * 0])[None]
    for reach, passes in ((1, 1), (2, 1), (2, 3)):
        shuffled = kernels.glass_blur(x, draws(1), 0.0, reach, passes)[0]
        source = shuffled[:2]
        assert np.array_equal(source, source.round())
        moved = np.abs(source - x[0, :2])
        assert moved.max() > 0
        for edge in (np.s_[:, : reach + 1], np.s_[:, :, : reach + 1], np.s_[:, height - reach + 1 :]):
            assert np.all(moved[edge] == 0), "pixels too near the edge keep their place"
    # one pass from the lower right: a pixel read before it is written is at most `reach` away, to the upper left
    once = kernels.glass_blur(x, draws(1), 0.0, 1, 1)[0]
    assert (x[0, :2] - once[:2]).max() == 1


def test_plasma_fills_zero_to_one_and_is_smoother_for_a_larger_decay():
    roughness = []
    for decay in (1.4, 2.0, 3.0):
        field = kernels.plasma(64, 50, decay, np.random.default_rng(0))
        assert field.min() >= 0 and field.max() <= 1 and field.shape == (64, 50)
        roughness.append(np.abs(np.diff(field, axis=0)).mean())
    assert roughness == sorted(roughness, reverse=True)


def test_frost_is_a_sheet_of_ice_with_structure():
    sheet = kernels.frost_sheet(64, 64, np.random.default_rng(0))
    assert sheet.min() >= 0 and sheet.max() <= 1 and sheet.std() > 0.05


def test_nothing_happens_at_neutral_parameters(images):
    x = images.numpy().astype(np.float32) / 255
    n = len(x)
    neutral = {
        "gaussian_noise": (0.0,),
        "impulse_noise": (0.0,),
        "defocus_blur": (0.3, 0.01),
        "zoom_blur": (1.0, 0.01),
        "snow": (-9.0, 0.1, 1.0, 0.5, 8, 3, 1.0),
        "frost": (1.0, 0.0),
        "fog": (0.0, 2.0),
        "brightness": (0.0,),
        "contrast": (1.0,),
        "elastic_transform": (0.0, 0.0, 0.0),
        "pixelate": (1.0,),
    }
    for name, parameters in neutral.items():
        same = CORRUPTIONS[name].apply(x, draws(n), *parameters)
        np.testing.assert_allclose(same, x, atol=2e-6, err_msg=name)


@pytest.mark.parametrize(
    "name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "elastic_transform", "pixelate"]
)
def test_an_even_image_stays_even(name):
    even = of_one_value(90)
    assert torch.equal(corrupt(even, name, 5, indices=range(4)), even)


# -- what cannot be corrupted -----------------------------------------------------------------------------------------


def test_what_cannot_be_corrupted_is_said(images):
    with pytest.raises(UserError, match=r"unknown corruption 'rain'; allowed: gaussian_noise, shot_noise"):
        corrupt(images, "rain", 1, indices=range(12))
    with pytest.raises(UserError, match=r"unknown severity 6; allowed: 1, 2, 3, 4, 5"):
        corrupt(images, "fog", 6, indices=range(12))
    with pytest.raises(UserError, match=r"must be uint8 .* not float32 \(12, 3, 32, 32\)"):
        corrupt(images.float(), "fog", 1, indices=range(12))
    with pytest.raises(UserError, match=r"at least 8 pixels, not uint8 \(12, 3, 7, 32\)"):
        corrupt(images[:, :, :7], "fog", 1, indices=range(12))
    with pytest.raises(UserError, match="12 images need as many indices, not 3"):
        corrupt(images, "fog", 1, indices=[1, 2, 3])
