"""Small networks and images for tests of what networks show, and how often they were asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from tiny import tiny_config
from torch import nn

from localsim.analysis.feature_store import Features
from localsim.analysis.sources import Source
from localsim.assembly import build_network
from localsim.network import LocalNetwork

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def pixels(n: int = 7, size: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def network(rule: str = "blockwise", **settings) -> LocalNetwork:
    return build_network(tiny_config(rule, **settings))


def source(net: nn.Module | None = None, **fields) -> Source:
    return Source("tiny", network() if net is None else net, **{"size": 16, "mean": MEAN, "std": STD, **fields})


class Net(nn.Module):
    """Two layers with an in-place one between them, and one that works twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.unused = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Linear(1, 1)
        self.twice = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(self.twice(self.relu(self.first(x))))


def seeded(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


@contextmanager
def counted(net: nn.Module) -> Iterator[list[int]]:
    """Count the forward passes of a network by the images they saw."""
    seen: list[int] = []
    handle = net.register_forward_pre_hook(lambda _module, given: seen.append(len(given[0])))
    yield seen
    handle.remove()


def hooks_of(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def assert_equal(here: Features, there: Features) -> None:
    assert here.names == there.names
    assert [name for name in here if not np.array_equal(here[name], there[name])] == []


# -- what is read -----------------------------------------------------------------------------------------------------
