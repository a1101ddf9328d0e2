from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localsim.analysis import spatial
from localsim.analysis.spatial import Reducer
from localsim.errors import UserError


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_maps_of_known_numbers():
    """Channel c of a 4 x 4 map holds 100 c + its position, counted row by row."""
    x = torch.arange(16.0).reshape(1, 1, 4, 4) + 100 * torch.arange(2.0)[None, :, None, None]
    assert Reducer("mean")(x).tolist() == [[7.5, 107.5]]
    assert Reducer("1x1")(x).tolist() == [[7.5, 107.5]]
    assert Reducer("2x2")(x).tolist() == [[2.5, 4.5, 10.5, 12.5, 102.5, 104.5, 110.5, 112.5]]
    assert torch.equal(Reducer("4x4")(x), x.flatten(1)) and torch.equal(Reducer("flatten")(x), x.flatten(1))


def test_a_map_that_is_coarser_than_asked_for_stays_as_it_is():
    fine, coarse, oblong = numbers(2, 3, 8, 8), numbers(2, 3, 2, 2), numbers(2, 3, 2, 8)
    assert torch.equal(Reducer("upto4x4")(fine), Reducer("4x4")(fine))
    assert torch.equal(Reducer("upto4x4")(coarse), coarse.flatten(1))
    assert torch.equal(Reducer("upto4x4")(oblong), oblong.unflatten(3, (4, 2)).mean(4).flatten(1))


def test_tokens_are_averaged_or_flattened_and_vectors_stay():
    tokens, vectors = numbers(3, 5, 4), numbers(3, 4)
    torch.testing.assert_close(Reducer("mean")(tokens), tokens.sum(1) / 5)
    assert torch.equal(Reducer("flatten")(tokens), tokens.reshape(3, 20))
    for name in ("mean", "flatten", "2x2"):
        assert torch.equal(Reducer(name)(vectors), vectors)


def test_half_precision_is_averaged_in_float32_even_under_autocast():
    x = numbers(2, 3, 30, 30).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = Reducer("project5")(x)
    assert torch.equal(Reducer("mean")(x), x.float().mean((2, 3)))
    assert given.dtype == torch.float32 and torch.equal(given, Reducer("project5")(x.float()))


@settings(deadline=None, max_examples=20)
@given(num=st.integers(1, 9), split=st.integers(1, 5), width=st.integers(1, 40))
def test_a_projection_depends_on_seed_and_shape_only(num, split, width):
    x = numbers(6, width)
    whole = Reducer(f"project{num}", 3)(x)
    reduce = Reducer(f"project{num}", 3)
    parts = torch.cat([reduce(part) for part in x.split(split)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert not torch.equal(Reducer(f"project{num}", 4)(x), whole)


def test_a_projection_is_that_of_the_flattened_map_and_linear():
    x, reduce = numbers(4, 3, 2, 2), Reducer("project7")
    assert torch.equal(reduce(x), reduce(x.flatten(1)))
    matrix = reduce(torch.eye(12))
    torch.testing.assert_close(reduce(x), x.flatten(1) @ matrix)


def test_a_projection_keeps_squared_distances():
    """Their ratio has mean 1 and variance 2 / N."""
    x = numbers(40, 300)
    before = torch.pdist(x).square()
    ratio = torch.pdist(Reducer("project2000", 1)(x)).square() / before
    assert abs(ratio.mean() - 1) < 0.02
    assert ratio.std() == pytest.approx((2 / 2000) ** 0.5, rel=0.2)


def test_a_projection_too_large_to_hold_is_the_same(monkeypatch):
    monkeypatch.setattr(spatial, "BLOCK_NUMBERS", 50)
    x = numbers(3, 101)
    held, drawn = Reducer("project10"), Reducer("project10")
    first = held(x)
    with monkeypatch.context() as patched:
        patched.setattr(spatial, "HELD_BYTES", 0)
        assert torch.equal(drawn(x), first) and torch.equal(drawn(x), held(x))
    assert not drawn._held and [len(block) for block in held._held[101]] == [5] * 20 + [1]


@pytest.mark.parametrize("name", ["max", "2x3", "0x0", "project", "project0", "project-3", "", None, 2])
def test_unknown_names_are_refused(name):
    with pytest.raises(UserError, match=r"unknown spatial handling .*; allowed: mean, 2x2"):
        Reducer(name)


def test_what_has_no_such_regions_is_refused():
    with pytest.raises(UserError, match="spatial 4x4 is finer than the map of layer9, 3x5"):
        Reducer("4x4")(numbers(2, 1, 3, 5), "layer9")
    with pytest.raises(UserError, match="spatial 2x2 needs maps, but blocks gives tokens"):
        Reducer("2x2")(numbers(2, 4, 4), "blocks")
    with pytest.raises(UserError, match=r"the layer gives an array of shape \(2,\); allowed: vectors"):
        Reducer("mean")(numbers(2))
    with pytest.raises(UserError, match="complex"):
        Reducer("mean")(torch.zeros(2, 2, dtype=torch.complex64))
