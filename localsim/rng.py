"""Random draws keyed by what they are for, never by the order in which code runs.

A draw is named by parts such as `(seed, "noise", step, stage, view)`. Equal names give equal draws, so eager and late
backward passes, a resumed run, several workers or several processes all see the same randomness.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

Part = int | str


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
    with torch.random.fork_rng(devices=devices):
        # not torch.manual_seed: that would reseed every other device too, and leave it so
        torch.default_generator.manual_seed(key(*parts))
        for index in devices:
            torch.cuda.default_generators[index].manual_seed(key(*parts))
        yield


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
