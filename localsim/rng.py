"""Random draws keyed by what they are for, never by the order in which code runs.

A draw is named by parts such as `(seed, "noise", step, stage, view)`. Equal names give equal draws, so eager and late
backward passes, a resumed run, several workers or several processes all see the same randomness.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch

Part = int | str


@dataclass
class _Named:
    """A named draw under way: its key, and how many draws row by row were made in it."""

    key: int
    draws: int = 0


_within: ContextVar[_Named | None] = ContextVar("within", default=None)


def key(*parts: Part) -> int:
    """Return the 63-bit integer that stands for a named draw; stable across processes, machines and versions."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: Part, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a torch generator for the named draw."""
    made = torch.Generator(device=device)
    made.manual_seed(key(*parts))
    return made


@contextmanager
def keyed(*parts: Part, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's default generator for the named draw inside the block, and put it back as it was afterwards.

    Lets ordinary modules (dropout, noise, initialisation) draw reproducibly without knowing about keys.
    """
    device = torch.device(device)
    devices = [device.index or 0] if device.type == "cuda" else []
    named = _Named(key(*parts))
    with torch.random.fork_rng(devices=devices):
        # not torch.manual_seed: that would reseed every other device too, and leave it so
        torch.default_generator.manual_seed(named.key)
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(named.key)
        before = _within.set(named)
        try:
            yield
        finally:
            _within.reset(before)


def normal_rows(num_rows: int, width: int, *, first: int = 0, like: torch.Tensor) -> torch.Tensor:
    """Return `(num_rows, width)` draws from N(0, 1), those of every row from a generator of its own.

    Row i is row `first + i` of a batch, and its draws do not depend on which other rows there are: a process that has
    some rows of a batch draws what one that has them all would. They depend on the innermost `keyed` and on how many
    such draws were made in it; outside of one, on torch's default generator.
    """
    out = torch.empty(num_rows, width, dtype=like.dtype, device=like.device)
    for row, drawn in _rows(out, first):
        row.normal_(generator=drawn)
    return out


def uniform_rows(num_rows: int, width: int, *, first: int = 0, device: torch.device) -> torch.Tensor:
    """Return `(num_rows, width)` float32 draws from U[0, 1), see `normal_rows`."""
    out = torch.empty(num_rows, width, device=device)
    for row, drawn in _rows(out, first):
        row.uniform_(generator=drawn)
    return out


def _rows(out: torch.Tensor, first: int) -> Iterator[tuple[torch.Tensor, torch.Generator]]:
    """Yield every row with its generator, seeded for it; none of a tensor without memory."""
    within = _within.get()
    if within is None:
        within = _Named(int(torch.randint(2**62, ())))
    within.draws += 1
    if out.device.type == "meta" or type(out) is not torch.Tensor:  # such as the fake tensors of `localsim.cost`
        return
    drawn = torch.Generator(out.device)
    for number, row in enumerate(out, start=first):
        yield row, drawn.manual_seed(key(within.key, within.draws, number))


def uniform(index: np.ndarray, num: int, *parts: Part) -> np.ndarray:
    """Return `num` draws from U[0, 1) for every image in `index`.

    Counter-based (the splitmix64 finaliser applied to key, image and draw number): the draws of an image depend
    on its own index and the key only, so they are the same in every batch, worker and process.

    Args:
        index: `(n,)` integer image indices.
        num: draws per image.
        parts: what the draws are for.

    Returns:
        `(n, num)` float64 array.
    """
    with np.errstate(over="ignore"):
        counter = index.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key(*parts))
        mixed = _mix(_mix(counter) + np.arange(1, num + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    """Return the splitmix64 finaliser of 64-bit integers (Steele, Lea & Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
