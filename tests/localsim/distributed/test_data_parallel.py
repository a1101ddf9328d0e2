"""A batch divided among 2 or 4 processes, each with other images, is one batch: losses, gradients, buffers, weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from processes import make_peers, on_processes, small_backbone
from torch import Tensor

from localsim import engine
from localsim.assembly import build
from localsim.distributed import norms
from localsim.distributed.norms import divide
from localsim.distributed.peers import Peers
from localsim.network import LocalNetwork

IMAGES = 11  # uneven shares on any number of processes
SIZE = 16
SMALL: dict[str, Any] = {
    "preset": "quick",
    "image_size": SIZE,
    "projector": [16, 16],
    "expand_width": 16,
    "num_classes": 10,
}
CASES: dict[str, dict[str, Any]] = {
    "blockwise": {"rule": "blockwise", "granularity": 3},
    "fused readout": {"rule": "blockwise", "granularity": 2, "expand_width": 160, "readout_impl": "fused"},
    "loco": {"rule": "loco", "granularity": 4},
    "greedy_infomax": {"rule": "greedy_infomax", "granularity": 3, "patches": "8:2"},
    "simclr": {"rule": "blockwise", "objective": "simclr", "granularity": 3},
    "vicreg": {"rule": "blockwise", "objective": "vicreg", "granularity": 3},
    "lpl": {"rule": "lpl", "granularity": 3},
    "stale lpl": {"rule": "lpl", "granularity": 2, "head": "stale_statistics"},
    "clapp": {"rule": "clapp", "granularity": 3, "patches": "8:2"},
    "clapp_dfb": {"rule": "clapp_dfb", "granularity": 3},
    "infopro": {"rule": "infopro", "granularity": 2},
    "subsample": {"rule": "blockwise", "readout": "subsample", "granularity": 2},
    "recomputed": {"rule": "end_to_end", "recompute": "units"},
    "sign-symmetric": {"rule": "end_to_end", "transport": "sign_symmetric", "readout": "global"},
    "direct feedback": {"rule": "blockwise", "granularity": 2, "transport": "direct_feedback", "readout": "global"},
}
NAMED_BY_THE_DESIGN = ("blockwise", "loco", "greedy_infomax", "simclr", "vicreg", "lpl")


@cache
def images() -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)
    views = [torch.randn(IMAGES, 3, SIZE, SIZE, generator=draw, dtype=torch.float64) for _ in range(2)]
    return views, torch.randint(10, (IMAGES,), generator=draw)


def share(rank: int, size: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    views, labels = images()
    mine = slice(IMAGES * rank // size, IMAGES * (rank + 1) // size)
    return [view[mine].to(dtype) for view in views], labels[mine]


def make(case: str, dtype: torch.dtype) -> LocalNetwork:
    return build(backbone=small_backbone(), **SMALL | CASES[case]).to(dtype).train()


def steps(net: LocalNetwork, peers: Peers | None, rank: int, size: int, num: int, rate: float) -> dict[int, Tensor]:
    """Take steps of plain gradient descent on this process's share; leaves the last gradients in place."""
    views, labels = share(rank, size, next(net.parameters()).dtype)
    losses: dict[int, Tensor] = {}
    for step in range(num):
        net.zero_grad(set_to_none=True)
        if peers is not None:
            peers.begin(len(labels), device=torch.device("cpu"))
        losses = engine.backward(net, *views, labels=labels, key=step, peers=peers)
        net.end_step()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
    return losses


def learned(
    rank: int, size: int, cases: list[str], num: int, dtype: torch.dtype, rate: float, nudge: float = 0
) -> dict[str, Any]:
    """Return what every case computes: losses, gradients and buffers after `num` steps, and weights.

    With a `nudge`, every weight starts that part of itself larger or smaller.
    """
    peers = make_peers(rank, size) if size > 1 else None
    found: dict[str, Any] = {}
    for case in cases:
        net = make(case, dtype)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in net.parameters() if nudge else ():
                weight += nudge * weight * torch.randn(weight.shape, generator=draw).sign()
        divide(net, peers)
        losses = steps(net, peers, rank, size, num, rate)
        found |= {f"{case} loss {tap}": loss.numpy() for tap, loss in losses.items()}
        found |= {f"{case} d {n}": p.grad.numpy() for n, p in net.named_parameters() if p.grad is not None}
        found |= {f"{case} {n}": value.numpy() for n, value in net.state_dict().items()}
    return found


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference between arrays, each relative to its own size, and to 1 where they are small."""
    assert one.keys() == other.keys()
    return max(float(abs(other[name] - one[name]).max() / max(1.0, abs(one[name]).max())) for name in one)


@pytest.fixture(scope="module")
def in_one_process() -> dict[str, Any]:
    return learned(0, 1, list(CASES), 2, torch.float64, 1e-3)


@pytest.mark.parametrize("size", [2, 4])
def test_gradients_are_those_of_one_process(in_one_process, size):
    """Two steps, so that running statistics, updates and what heads remember of the step before count too."""
    for found in on_processes(size, learned, list(CASES), 2, torch.float64, 1e-3):
        for case in CASES:
            mine = {name: value for name, value in in_one_process.items() if name.startswith(f"{case} ")}
            theirs = {name: value for name, value in found.items() if name.startswith(f"{case} ")}
            assert largest_difference(mine, theirs) < 1e-9, case


def test_the_weights_after_twenty_steps_are_equal_within_float32_rounding():
    """The yardstick: one process that starts from weights rounded otherwise in their last bit."""
    cases, rate = ["blockwise", "loco", "lpl"], 1e-2
    alone = learned(0, 1, cases, 20, torch.float32, rate)
    nudged = learned(0, 1, cases, 20, torch.float32, rate, 2.0**-24)
    (found, _) = on_processes(2, learned, cases, 20, torch.float32, rate)
    for case in cases:
        weights = [name for name in alone if name.startswith(f"{case} stages") and name.endswith("weight")]
        start = learned_at_start(case)
        moved, rounding, apart = (
            largest_difference({name: alone[name] for name in weights}, {name: other[name] for name in weights})
            for other in (start, nudged, found)
        )
        assert apart < 2 * rounding < moved / 10, (case, apart, rounding, moved)


def learned_at_start(case: str) -> dict[str, Any]:
    return {f"{case} {name}": value.numpy() for name, value in make(case, torch.float32).state_dict().items()}


# -- what these tests would see of a mistake --------------------------------------------------------------------------


def _own_statistics(x: Tensor, peers: Peers) -> tuple[Tensor, Tensor, int]:
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    return mean, var, x.numel() // x.shape[1]


def _no_sum(peers: Peers, tensors: Any) -> Callable[[], Any]:
    return lambda: list(tensors)


def _average(peers: Peers, tensors: Any) -> Callable[[], Any]:
    wait = start_sum(peers, tensors)
    return lambda: [None if total is None else total / peers.size for total in wait()]


start_sum = Peers.start_sum
MISTAKES = {
    "normalisation of each share by itself": mock.patch.object(norms, "statistics", _own_statistics),
    "gradients of each share by itself": mock.patch.object(Peers, "start_sum", _no_sum),
    "averaged gradients of a loss over all images": mock.patch.object(Peers, "start_sum", _average),
    "losses of each share by itself": mock.patch.object(Peers, "gather", lambda peers, x, alike: x),
    "the same noise on every share": mock.patch.object(Peers, "first", lambda peers, num_rows: 0),
}


@contextmanager
def mistaken(what: str) -> Iterator[None]:
    with MISTAKES[what]:
        if what.startswith("losses"):  # labels are gathered otherwise
            with mock.patch.object(Peers, "gather_rows", lambda peers, x: x):
                yield
        else:
            yield


def learned_by_mistake(rank: int, size: int) -> dict[str, dict[str, Any]]:
    make_peers(rank, size)
    found = {}
    for what in MISTAKES:
        with mistaken(what):
            found[what] = learned(rank, size, ["blockwise"], 2, torch.float64, 1e-3)
    return found


def test_every_mistake_of_released_code_would_be_seen(in_one_process):
    alone = {name: value for name, value in in_one_process.items() if name.startswith("blockwise ")}
    (found, _) = on_processes(2, learned_by_mistake)
    for what in MISTAKES:
        assert largest_difference(alone, found[what]) > 1e-4, what
