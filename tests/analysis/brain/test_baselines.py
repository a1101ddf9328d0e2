from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from localsim.analysis import features
from localsim.analysis.brain import baselines
from localsim.analysis.brain.baselines import (
    BASELINES,
    CELLS,
    DEGREES,
    OCTAVES,
    GaborBank,
    gabor,
    pixels,
    transfer,
    widths,
)
from localsim.data.augment import without_colour
from localsim.errors import UserError

BANK = GaborBank((4, 8, 16), 8, 8)
KINDS = {kind: place for place, kind in enumerate(CELLS)}


def grating(
    frequency: float, degrees: float, phase: float = 0.0, side: int = 96, contrast: float = 0.5
) -> torch.Tensor:
    """A grating `(1, 3, side, side)`, modulated along `degrees` from the x axis, around the image's centre."""
    at = (torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5
    along = at[None] * math.cos(math.radians(degrees)) + at[:, None] * math.sin(math.radians(degrees))
    wave = 0.5 + contrast * torch.cos(2 * math.pi * frequency * along + phase)
    return wave.float()[None, None].repeat(1, 3, 1, 1)


def photographs(n: int = 3, side: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def cells(bank: GaborBank, images: torch.Tensor) -> torch.Tensor:
    """Responses as `(n, frequencies, orientations, kinds, grid, grid)`."""
    return bank(images).unflatten(1, (len(bank.frequencies), bank.orientations, len(CELLS)))


def middle(maps: torch.Tensor) -> torch.Tensor:
    """The mean of the four fields in the middle: far from the edges, where gratings are mirrored."""
    half = maps.shape[-1] // 2
    return maps[..., half - 1 : half + 1, half - 1 : half + 1].mean((-1, -2))


# -- filters ----------------------------------------------------------------------------------------------------------


@given(st.floats(0.5, 64), st.floats(0, math.pi))
@settings(deadline=None)
def test_the_tuning_of_a_filter_is_as_wide_as_said(frequency, angle):
    s, t = widths(frequency)
    low, high = (frequency + sign * math.sqrt(2 * math.log(2)) * s for sign in (-1, 1))
    assert math.log2(high / low) == pytest.approx(OCTAVES)
    half = math.radians(DEGREES / 2)
    u, v = frequency * math.cos(half), frequency * math.sin(half)
    assert (u - frequency) ** 2 / (2 * s**2) + v**2 / (2 * t**2) == pytest.approx(math.log(2))
    # without the small part that takes the mean out, it is half of the peak there; with it, less than 0.1 % off
    x, y = (torch.tensor(value, dtype=torch.float64) for value in (math.cos(angle), math.sin(angle)))
    peak = transfer(frequency * x, frequency * y, frequency, angle)
    assert peak.item() == pytest.approx(2, rel=2e-3)
    for place in (low, high):
        assert transfer(place * x, place * y, frequency, angle).item() == pytest.approx(1, abs=0.07)
    assert transfer(high * x, high * y, frequency, angle).item() == pytest.approx(1, rel=2e-3)


@given(st.floats(0.5, 64), st.floats(0, math.pi))
@settings(deadline=None)
def test_a_filter_has_no_mean_and_is_blind_to_what_it_does_not_face(frequency, angle):
    zero = torch.zeros((), dtype=torch.float64)
    assert transfer(zero, zero, frequency, angle).abs() < 1e-12
    across = torch.tensor([-math.sin(angle), math.cos(angle)], dtype=torch.float64) * frequency
    assert transfer(across[0], across[1], frequency, angle).abs() < 1e-12


def test_a_filter_in_space_is_a_gabor_function():
    side, frequency, angle = 128, 8.0, math.radians(22.5)
    k = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    made = torch.fft.ifft2(transfer(k[None], k[:, None], frequency, angle)) * side**2
    # the inverse Fourier transform of a Gaussian is a Gaussian: in image lengths, 1 / (2 pi s) wide
    at = torch.fft.fftfreq(side, dtype=torch.float64)
    x, y = at[None], at[:, None]
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    s, t = widths(frequency)
    envelope = 2 * math.pi * s * t * torch.exp(-2 * math.pi**2 * ((s * u) ** 2 + (t * v) ** 2))
    carrier = torch.exp(2j * math.pi * frequency * u) - math.exp(-(frequency**2) / (2 * s**2))
    assert torch.allclose(made, 2 * envelope * carrier, atol=1e-9 * envelope.max().item())


# -- cells ------------------------------------------------------------------------------------------------------------


def test_uniform_images_leave_all_cells_silent():
    shades = torch.tensor([0.0, 0.3, 1.0])[:, None, None, None].expand(3, 3, 64, 64)
    assert BANK(shades).abs().max() < 1e-5


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("orientation", range(8))
def test_a_cell_likes_the_grating_of_its_own_frequency_and_orientation_best(place, orientation):
    own = BANK.frequencies[place], 180 * orientation / 8
    shown = [(f, d) for f in (2, 4, 8, 16, 24) for d in np.arange(8) * 22.5]
    complex_cell = middle(cells(BANK, torch.cat([grating(*one) for one in shown])))[:, place, orientation, -1]
    assert shown[int(complex_cell.argmax())] == own
    assert complex_cell.max().item() == pytest.approx(0.5, rel=0.02)  # the grating's contrast: gain 1


def test_a_cell_answers_other_gratings_as_its_transfer_function_says():
    for frequency, degrees in ((8, 15.0), (6, 0.0), (11, 5.0), (8, 60.0)):
        got = middle(cells(BANK, grating(frequency, degrees)))[0, 1, 0, -1].item()
        x, y = (torch.tensor(frequency * way(math.radians(degrees))) for way in (math.cos, math.sin))
        assert got == pytest.approx(0.5 / 2 * transfer(x, y, 8.0, 0.0).item(), abs=5e-3)


def test_complex_cells_do_not_see_phase_and_simple_ones_do():
    fine = GaborBank((4,), 8, 48)  # a third of the period of the grating's rectified response in each field
    phases = torch.linspace(0, 2 * math.pi, 9)[:-1]
    shown = torch.cat([grating(4, 45.0, phase.item()) for phase in phases])
    got = cells(fine, shown)[:, 0, 2, :, 24, 24]
    assert (got[:, -1].max() - got[:, -1].min()) / got[:, -1].mean() < 0.02
    for kind in range(4):
        assert got[:, kind].min() == 0
        assert got[:, kind].max() > 0.45


def test_the_simple_cells_of_a_place_are_a_quarter_of_a_cycle_apart():
    fine = GaborBank((4,), 8, 48)
    # field 24 of 48 reaches from the middle of the image to 1/48 right of it, so that its centre is 1/96 off
    got = cells(fine, grating(4, 0.0, phase=-2 * math.pi * 4 / 96))[0, 0, 0, :, 24, 24]
    assert got[KINDS["even"]].item() == pytest.approx(0.5, rel=0.02)
    assert got[KINDS["minus even"]] == 0
    assert max(got[KINDS["odd"]], got[KINDS["minus odd"]]) < 0.07  # its mean over a field of a twelfth of a cycle
    later = cells(fine, grating(4, 0.0, phase=-2 * math.pi * 4 / 96 + math.pi / 2))[0, 0, 0, :, 24, 24]
    assert later[KINDS["odd"]].item() == pytest.approx(0.5, rel=0.02)
    assert later[KINDS["minus odd"]] == 0


def test_the_negative_of_an_image_swaps_the_cells_of_either_sign():
    x = photographs()
    plain, negative = cells(BANK, x), cells(BANK, 1 - x)
    swapped = negative[:, :, :, [2, 3, 0, 1, 4]]
    assert torch.allclose(plain, swapped, atol=1e-5)


def test_responses_grow_with_contrast_in_proportion():
    x = photographs()
    assert torch.allclose(BANK(0.5 + (x - 0.5) / 4), BANK(x) / 4, atol=1e-5)


def test_responses_are_never_negative_and_channels_are_named_in_order():
    found = BANK(photographs())
    assert found.min() >= 0
    assert found.shape == (3, len(BANK.channels), 8, 8)
    assert BANK.channels[:6] == [(4, 0, kind) for kind in CELLS] + [(4, 22.5, "even")]
    assert BANK.channels[40] == (8, 0, "even")


def test_a_mirrored_image_gives_mirrored_maps_of_mirrored_orientations():
    x = photographs()
    plain, mirrored = cells(BANK, x)[..., -1, :, :], cells(BANK, x.flip(-1))[..., -1, :, :]
    assert torch.allclose(mirrored.flip(-1)[:, :, [0, 7, 6, 5, 4, 3, 2, 1]], plain, atol=1e-5)


@pytest.mark.parametrize("side", (128, 192))
def test_a_larger_image_of_the_same_scene_gives_the_same_responses(side):
    bank = GaborBank((4, 8), 8, 8)

    def scene(side: int) -> torch.Tensor:  # cosines that a mirror continues without an edge
        at = (torch.arange(side, dtype=torch.float64) + 0.5) / side
        waves = [torch.cos(math.pi * a * at[None]) * torch.cos(math.pi * b * at[:, None])
                 for a, b in ((3, 8), (16, 2), (5, 5), (0, 11), (1, 20))]  # fmt: skip
        return (0.5 + torch.stack(waves).sum(0) / 10).float()[None, None].repeat(1, 3, 1, 1)

    assert torch.allclose(bank(scene(64)), bank(scene(side)), atol=2e-6)


def test_colour_is_seen_as_its_luminance():
    x = photographs()
    assert torch.allclose(BANK(x), BANK(without_colour(x)), atol=1e-5)
    red = x.clone()
    red[:, 1:] = 0
    assert not torch.allclose(BANK(x), BANK(red), atol=1e-2)


def test_the_bank_equals_direct_convolution_with_its_filters():
    side, frequency = 64, 8.0
    x = photographs(1, side)
    bank = GaborBank((frequency,), 4, side)
    found = bank(x)[0].unflatten(0, (4, 5))
    light = without_colour(x)[0, 0].double().numpy()
    padded = np.pad(light, side // 2, mode="symmetric")  # a filter of 8 cycles has vanished at half an image
    at = np.arange(-side // 2, side // 2 + 1) / side
    s, t = widths(frequency)
    for i in range(4):
        angle = math.pi * i / 4
        u = at[None] * math.cos(angle) + at[:, None] * math.sin(angle)
        v = at[:, None] * math.cos(angle) - at[None] * math.sin(angle)
        kernel = 4 * math.pi * s * t * np.exp(-2 * math.pi**2 * ((s * u) ** 2 + (t * v) ** 2)) / side**2
        kernel = kernel * (np.exp(2j * math.pi * frequency * u) - math.exp(-(frequency**2) / (2 * s**2)))
        weight = torch.tensor(np.stack([kernel.real, kernel.imag])[:, None, ::-1, ::-1].copy())
        even, odd = F.conv2d(torch.tensor(padded)[None, None], weight)[0, :, :side, :side]
        assert torch.allclose(found[i, 0].double(), even.relu(), atol=2e-4)
        assert torch.allclose(found[i, 3].double(), (-odd).relu(), atol=2e-4)
        assert torch.allclose(found[i, 4].double(), (even**2 + odd**2).sqrt(), atol=2e-4)


# -- sources ----------------------------------------------------------------------------------------------------------


def test_pixels_are_the_image_where_it_has_the_size_already():
    x = (photographs(4, 32) * 255).to(torch.uint8)
    found = features(pixels(), x, modules=["pixels"], spatial="flatten")["pixels"]
    assert np.array_equal(found, (x.float() / 255).flatten(1).numpy())


def test_pixels_are_resized_as_torch_does_it_and_nothing_is_cut_off():
    x = photographs(2, 112)
    found = features(pixels(), x, modules=["pixels"], spatial="flatten")["pixels"]
    expected = F.interpolate(x, size=(32, 32), mode="bilinear", antialias=True)
    assert np.allclose(found, expected.flatten(1).numpy(), atol=1e-6)
    # and where the image changes slowly, what is resized is the means of blocks
    ramp = torch.linspace(0, 1, 128).expand(1, 3, 128, 128).contiguous()
    found = features(pixels(), ramp, modules=["pixels"], spatial="flatten")["pixels"].reshape(3, 32, 32)
    blocks = F.avg_pool2d(ramp, 4)[0].numpy()
    assert np.allclose(found[:, :, 1:-1], blocks[:, :, 1:-1], atol=1e-5)
    assert found.min() < 0.02
    assert found.max() > 0.98


@pytest.mark.parametrize(("name", "width"), [("pixels", 3 * 32 * 32), ("gabor", 5 * 8 * 5 * 4 * 4)])
def test_a_baseline_is_read_like_a_network_and_always_the_same(name, width):
    bar = BASELINES[name]
    x = (photographs(3, 48) * 255).to(torch.uint8)
    first = features(bar.source, x, modules=bar.modules, spatial=bar.spatial)
    again = features(bar.source, x, modules=bar.modules, spatial=bar.spatial, batch_size=1)
    assert first.names == list(bar.modules)
    assert first[name].shape == (3, width)
    assert np.allclose(first[name], again[name], atol=1e-6)
    torch.manual_seed(7)
    anew = {"pixels": pixels, "gabor": gabor}[name]()
    assert np.array_equal(first[name], features(anew, x, modules=bar.modules, spatial=bar.spatial)[name])
    assert anew.weights_hash() == bar.source.weights_hash()


def test_a_bank_with_other_settings_has_another_hash(monkeypatch):
    banks = [gabor(), gabor(orientations=4), gabor(grid=8), gabor(frequencies=(2, 4))]
    monkeypatch.setattr(baselines, "OCTAVES", 1.0)
    banks.append(gabor())
    assert len({bank.weights_hash() for bank in banks}) == 5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pixels(0), "size is 0"),
        (lambda: gabor(size=64), "size is 64; allowed: 96"),
        (lambda: gabor(orientations=0), "orientations is 0"),
        (lambda: gabor(grid=2.0), "grid is 2.0"),
        (lambda: gabor(frequencies=()), "frequencies are ()"),
        (lambda: gabor(frequencies=(2, -1)), "frequencies are (2, -1)"),
        (lambda: gabor(frequencies=(2, math.nan)), "frequencies are (2, nan)"),
        (lambda: gabor(size=16, frequencies=(2,), grid=20), "size is 16; allowed: 20"),
        (lambda: BANK(torch.rand(1, 3, 64, 48)), "64x48 pixels"),
        (lambda: BANK(torch.rand(1, 3, 32, 32)), "squares of 48 or more"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)
