"""Patches against explicit slicing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localsim.errors import UserError
from localsim.patches import Patches, unfold


def numbered(num: int, size: int) -> torch.Tensor:
    return torch.arange(num * 3 * size * size, dtype=torch.float64).view(num, 3, size, size)


def test_the_published_grid():
    assert Patches(16, 8).grid(64) == (7, 7)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 9), st.integers(1, 3))
def test_folded_patches_are_slices_in_the_order_of_images_rows_and_columns(size, stride, more, num):
    patches, images = Patches(size, stride), numbered(num, size + more)
    starts = range(0, more + 1, stride)
    slices = [image[:, y : y + size, x : x + size] for image in images for y in starts for x in starts]
    assert torch.equal(patches.fold(images), torch.stack(slices))
    assert patches.grid(size + more) == (len(starts), len(starts))


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 8))
def test_unfolding_puts_vectors_back_in_their_places(size, stride, more):
    patches, images = Patches(size, stride), numbered(2, size + more)
    folded = patches.fold(images)
    # each patch's first pixel is the image at the patch's place
    assert torch.equal(
        unfold(folded[:, :, 0, 0], patches.grid(size + more)),
        images[..., ::stride, ::stride][..., : patches.grid(size + more)[0], : patches.grid(size + more)[1]],
    )


def test_unfolding_keeps_rows_and_columns_of_a_grid_that_is_not_square():
    x = torch.arange(2 * 6 * 5).view(12, 5)
    out = unfold(x, (2, 3))
    assert out.shape == (2, 5, 2, 3)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                assert torch.equal(out[image, :, row, column], x[image * 6 + row * 3 + column])


def test_gradients_flow_to_every_patch_that_holds_a_pixel():
    patches = Patches(2, 1)
    images = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    patches.fold(images).sum().backward()
    once = torch.tensor([1.0, 2.0, 2.0, 1.0], dtype=torch.float64)
    assert images.grad is not None and torch.equal(images.grad[0, 0], once[:, None] * once)

    def means(images: torch.Tensor) -> torch.Tensor:
        return unfold(patches.fold(images).mean((2, 3)), patches.grid(4))

    assert torch.autograd.gradcheck(means, torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True))


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_text_and_patches_are_one(size, stride):
    assert Patches.parse(str(Patches(size, stride))) == Patches(size, stride)
    assert str(Patches(size, stride)) == f"{size}:{stride}"


@pytest.mark.parametrize("text", ["", "16", "16:", "16-8", "16:8:4", "-16:8", "16: 8", "a:b", "1.5:1", "16:8\n", "٣:1"])
def test_other_texts_are_refused(text):
    with pytest.raises(UserError, match=r"cannot be read; allowed: SIZE:STRIDE in pixels, such as 16:8$"):
        Patches.parse(text)


@pytest.mark.parametrize(
    ("size", "stride", "message"),
    [(0, 8, "patch size 0 is"), (16, 0, "patch stride 0 is"), (16.0, 8, "patch size 16.0"), (16, True, "stride True")],
)
def test_impossible_patches_are_refused(size, stride, message):
    with pytest.raises(UserError, match=rf"{message}.*allowed: whole numbers from 1"):
        Patches(size, stride)
    with pytest.raises(UserError, match="patch stride 0"):
        Patches.parse("16:0")


def test_images_without_a_patch_are_refused():
    assert Patches(16, 8).grid(16) == (1, 1)
    for refused in (lambda: Patches(16, 8).grid(15), lambda: Patches(16, 8).fold(torch.zeros(1, 3, 15, 15))):
        with pytest.raises(UserError, match=r"^patches of 16 pixels do not fit into images of 15; allowed: 1 to 15$"):
            refused()
