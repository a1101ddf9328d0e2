"""What a divided batch needs of single parts: batch norm in bfloat16, learned numbers without rows, the readout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import make_peers, on_processes, small_backbone
from torch import Tensor, nn

from localsim import engine
from localsim.assembly import build
from localsim.distributed.norms import divide
from localsim.distributed.peers import Peers
from localsim.rules.expand import Expand

ROWS, CHANNELS = 64, 16


class WholeBatch(Peers):
    """Peers of a process that has the whole batch: nothing is sent, the arithmetic is that of a divided one."""

    def __init__(self, counts: list[int] | None = None) -> None:
        super().__init__(None, None, 0, 1)
        self.counts = [ROWS] if counts is None else counts

    def _all(self, x: Tensor) -> Tensor:
        return x[None]

    def sum(self, *parts: Tensor) -> list[Tensor]:
        return list(parts)


def gradient(norm: nn.BatchNorm2d, x: Tensor, g: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(norm(x), x, g)
    return found


class OwnNorm(nn.BatchNorm2d):
    """A layer of which nobody knows what it does across the images."""


def test_a_derived_batch_norm_is_refused_by_several_processes_alone():
    net = nn.Sequential(OwnNorm(3))
    with pytest.raises(engine.UserError, match="layer 0 is a OwnNorm, which cannot be divided among processes"):
        divide(net, WholeBatch())
    divide(net, None)
    assert type(net[0]) is OwnNorm


@pytest.mark.parametrize("mean", [0.0, 3.0, 10.0])
def test_divided_batch_norm_is_as_exact_in_bfloat16_as_torchs(mean):
    """The gradient adds up to 0 over a channel, but for rounding; a bias would be the same for every image."""
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(ROWS, CHANNELS, 6, 6, generator=draw) + mean).bfloat16()
    g = torch.randn(x.shape, generator=draw).bfloat16()
    divided, exact = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS).double()
    usual = nn.BatchNorm2d(CHANNELS)
    divide(divided, WholeBatch())
    expected = gradient(exact, x.double(), g.double())
    ours, torchs = (gradient(norm, x, g).double() for norm in (divided, usual))
    assert (ours - expected).norm() < 1.5 * (torchs - expected).norm()  # two roundings for one
    assert ours.sum((0, 2, 3)).abs().max() < 6 * torchs.sum((0, 2, 3)).abs().max() + 0.1


def test_the_readout_is_fused_in_evaluation_whatever_the_shares(monkeypatch):
    """Of a share of 1024 images, a clean pass sees 256: their number is no whole share."""
    readout = Expand(8, 16, impl="fused").eval()
    divide(readout, WholeBatch([1024, 1024]))
    plain = Expand(8, 16, impl="plain").eval()
    plain.load_state_dict(readout.state_dict())
    x = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(readout.bn, "forward", lambda _x: pytest.fail("the expanded map was made"))
    torch.testing.assert_close(readout(x), plain(x))


class Scaled(nn.Module):
    """A head that looks across images, with a learned number that belongs to none of them."""

    peers: Peers | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, 4)
        self.temperature = nn.Parameter(torch.tensor([0.7]))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.map(z)
        # each process puts the mean into rows that no other has: its gradient is not the same everywhere
        everyones = rows if self.peers is None else self.peers.gather(rows)
        return rows - everyones.square().mean(0), self.temperature


class Pull(nn.Module):
    """An objective with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.3))

    def __call__(self, embeddings: Any, labels: Tensor | None) -> Tensor:
        (one, temperature), (other, _) = embeddings
        return self.weight * ((one @ other.T) * temperature).sigmoid().mean() + self.weight.square()


def learned_numbers(rank: int, size: int) -> dict[str, Any]:
    net = build(backbone=small_backbone(), granularity=2, preset="quick", image_size=16, readout="global").double()
    torch.manual_seed(0)
    for tap in net.taps:
        tap.head, tap.objective = Scaled(8 if tap.stage == 0 else 16).double(), Pull().double()
    views = torch.randn(2, 6, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    peers = make_peers(rank, size) if size > 1 else None
    divide(net, peers)
    mine = slice(6 * rank // size, 6 * (rank + 1) // size)
    if peers is not None:
        peers.begin(6 // size, device=torch.device("cpu"))
    engine.backward(net.train(), *(view[mine] for view in views), key=0, peers=peers)
    return {name: p.grad.numpy() for name, p in net.taps.named_parameters() if p.grad is not None}


def test_heads_that_look_across_images_and_numbers_without_rows_get_the_gradient_of_one_process():
    alone = learned_numbers(0, 1)
    assert any("temperature" in name for name in alone) and any("objective" in name for name in alone)
    for found in on_processes(2, learned_numbers):
        assert found.keys() == alone.keys()
        for name, grad in alone.items():
            assert abs(found[name] - grad).max() < 1e-9, name


def test_a_number_per_image_is_refused_where_the_batch_is_divided():
    net = build(backbone=small_backbone(), granularity=2, preset="quick", image_size=16, readout="global")
    for tap in net.taps:
        tap.head = nn.Sequential(nn.LazyLinear(1), nn.Flatten(0))
    peers = WholeBatch([4])
    with pytest.raises(engine.UserError, match=r"one number per image; .* needs rows, \(n, d\)"):
        engine.backward(net.train(), *torch.randn(2, 4, 3, 16, 16), key=0, peers=peers)
