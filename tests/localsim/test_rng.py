"""Keyed draws: the same for the same name, unrelated for another, whatever ran before."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from localsim import rng

PARTS = st.lists(st.integers() | st.text(st.characters(exclude_categories=("Cc", "Cs"))), max_size=4)


def test_keys_stay_what_they_were():
    named = b"int:0\x1fstr:noise\x1fint:7"
    assert rng.key(0, "noise", 7) == int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little") >> 1
    assert rng.key(0, "noise", 7) == 8966346200030282841


@given(PARTS, PARTS)
def test_different_names_have_different_keys(one, other):
    assert (rng.key(*one) == rng.key(*other)) == (one == other)
    assert 0 <= rng.key(*one) < 2**63


def test_numbers_and_their_text_are_different_names():
    assert rng.key(1) != rng.key("1")
    assert rng.key("a", "b") != rng.key("ab")
    assert rng.key(1, 2) != rng.key(2, 1)


def test_generators_of_one_name_agree():
    one, other = (torch.rand(4, generator=rng.generator("a", 1)) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, torch.rand(4, generator=rng.generator("a", 2)))


def test_keyed_seeds_inside_and_restores_afterwards():
    torch.manual_seed(0)
    undisturbed = torch.rand(4)
    torch.manual_seed(0)
    with rng.keyed("inner"):
        inner = torch.rand(3)
    assert torch.equal(torch.rand(2), undisturbed[:2])
    with pytest.raises(KeyError), rng.keyed("inner"):
        assert torch.equal(torch.rand(3), inner)
        raise KeyError
    assert torch.equal(torch.rand(2), undisturbed[2:])
    assert torch.equal(inner, torch.rand(3, generator=rng.generator("inner")))


def test_keyed_blocks_may_be_nested():
    with rng.keyed("outer"):
        plain = torch.rand(4)
    with rng.keyed("outer"):
        first = torch.rand(2)
        with rng.keyed("inner"):
            torch.rand(5)
        assert torch.equal(torch.cat([first, torch.rand(2)]), plain)


def splitmix64(z: int) -> int:
    """The finaliser in unbounded integers (Steele, Lea & Flood 2014)."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 2**32))
def test_uniform_is_counter_based(index, num, seed):
    drawn = rng.uniform(np.array(index), num, seed, "crop")
    assert drawn.shape == (len(index), num)
    assert drawn.dtype == np.float64
    for row, image in zip(drawn, index, strict=True):
        base = splitmix64((image * 0x9E3779B97F4A7C15 + rng.key(seed, "crop")) % 2**64)
        expected = [(splitmix64((base + i * 0xD1B54A32D192ED03) % 2**64) >> 11) / 2**53 for i in range(1, num + 1)]
        assert row.tolist() == expected


def test_uniform_draws_are_uniform_and_unrelated():
    drawn = rng.uniform(np.arange(20000), 4, 0, "crop")
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.stack([np.histogram(column, 10, (0, 1))[0] for column in drawn.T])
    # chi-square with 9 degrees of freedom; below 30 with probability 0.9996
    assert (((counts - 2000) ** 2) / 2000).sum(1).max() < 30
    others = [drawn, rng.uniform(np.arange(20000), 4, 1, "crop"), np.roll(drawn, 1, axis=0)]
    correlation = np.corrcoef(np.concatenate(others, 1).T) - np.eye(12)
    assert np.abs(correlation).max() < 5 / np.sqrt(20000)
