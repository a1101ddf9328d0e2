"""Recordings of a few neurons that respond to made-up images, and a network of two layers to score against them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from localsim.analysis.brain.recordings import Recording
from localsim.data import ImageSet

N = 30


def shown(n: int = N, seed: int = 0, size: int = 16) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), dtype=np.uint8)
    return ImageSet(torch.from_numpy(pixels), None, None)


def recorded(name: str = "A", n: int = N, seed: int = 0, bins: int = 1, **fields) -> Recording:
    """Return six neurons, four of V4 and two of IT, that respond to the images."""
    rng = np.random.default_rng(seed)
    images = shown(n, seed)
    assert images.images is not None
    x = images.images.double().mean(3).flatten(1).numpy() / 50
    y = (x - x.mean(0)) @ rng.normal(size=(x.shape[1], 6))
    trials = y[:, :, None, None] + rng.normal(size=(n, 6, 4, bins))
    return Recording(name, images, trials, **{"regions": ("V4",) * 4 + ("IT",) * 2, **fields})


def matrices(name: str = "rdms") -> Recording:
    one = recorded()
    rdms = 1 - np.corrcoef(one.means())
    np.fill_diagonal(rdms, 0)
    return Recording(name, one.images, rdms=np.stack([rdms, rdms]), regions=("IT",) * 2, subjects=("a", "b"))


class Net(nn.Module):
    """Two layers; remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.low, self.high = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        return self.high(self.low(x).relu()).relu()


LAYERS = {"modules": ["low", "high"]}
