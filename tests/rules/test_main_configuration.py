"""The main configuration is the paper's graph: blockwise Barlow Twins on torchvision's ResNet-50, in float64.

The reference is written here from the paper and its released code (Siddiqui et al. 2023): torchvision's own forward,
`.detach()` at every boundary, conv-BN-ReLU-pool readouts, projectors, noise scaled by the whole tensor's deviation
before the own head and the next stage, the four losses summed and one backward pass.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from localsim import engine
from localsim.assembly import build
from localsim.network import LocalNetwork
from localsim.rng import keyed, normal_rows

SIZE, BATCH, WIDTH, PROJECTOR = 32, 4, 16, [16, 16, 16]
KEY = 11
LAMBDA, SCALE, SIGMA = 0.0051, 0.024, 0.25


class Reference(nn.Module):
    """The released model's modules: a torchvision trunk, and one readout and one projector per block."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = resnet50(weights=None)
        self.trunk.fc = nn.Identity()
        self.readouts = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, WIDTH, 1, bias=False),
                nn.BatchNorm2d(WIDTH),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
            for channels in (256, 512, 1024, 2048)
        )
        sizes = [WIDTH, *PROJECTOR]
        self.projectors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(sizes[0], sizes[1], bias=False),
                nn.BatchNorm1d(sizes[1]),
                nn.ReLU(),
                nn.Linear(sizes[1], sizes[2], bias=False),
                nn.BatchNorm1d(sizes[2]),
                nn.ReLU(),
                nn.Linear(sizes[2], sizes[3], bias=False),
            )
            for _ in range(4)
        )
        self.double()

    def block(self, index: int, x: torch.Tensor) -> torch.Tensor:
        t = self.trunk
        if index == 0:
            x = t.maxpool(t.relu(t.bn1(t.conv1(x))))
        return getattr(t, f"layer{index + 1}")(x)

    def embed(self, x: torch.Tensor, view: int, noise: bool) -> list[torch.Tensor]:
        embeddings = []
        for index in range(4):
            x = self.block(index, x.detach())
            if noise:
                with keyed(KEY, "stage", index, view):
                    draw = normal_rows(len(x), x[0].numel(), like=x).view_as(x)
                x = x + SIGMA * draw * x.std()
            embeddings.append(self.projectors[index](self.readouts[index](x)))
        return embeddings


def barlow_twins(z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    norm = nn.BatchNorm1d(z1.shape[1], affine=False).double()
    c = norm(z1).T @ norm(z2) / len(z1)
    eye = torch.eye(len(c), dtype=torch.bool)
    return SCALE * ((c[eye] - 1).pow(2).sum() + LAMBDA * c[~eye].pow(2).sum())


def twin_of(net: LocalNetwork) -> tuple[Reference, dict[str, str]]:
    """Return the reference with the network's weights, and its name for each of the network's parameters and buffers.

    Readouts and projectors are matched in order of registration; the trunk by torchvision's names.
    """
    reference = Reference()
    reference.trunk.load_state_dict(net.trunk_state_dict(), strict=True)
    address = {value.data_ptr(): name for name, value in net.trunk_state_dict().items()}
    names = {name: f"trunk.{address[v.data_ptr()]}" for name, v in net.state_dict().items() if "stages" in name}
    for index, tap in enumerate(net.taps):
        for part, plain in (("readout", "readouts"), ("head", "projectors")):
            ours, theirs = getattr(tap, part).state_dict(), getattr(reference, plain)[index]
            assert [v.shape for v in ours.values()] == [v.shape for v in theirs.state_dict().values()]
            pairs = dict(zip(ours, theirs.state_dict(), strict=True))
            theirs.load_state_dict({pairs[name]: value for name, value in ours.items()})
            names |= {f"taps.{index}.{part}.{a}": f"{plain}.{index}.{b}" for a, b in pairs.items()}
    assert sorted(names.values()) == sorted(reference.state_dict())
    return reference, names


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    difference = (ours - theirs).norm().item()
    return difference / theirs.norm().item() if difference else 0.0


@pytest.mark.parametrize("zero_init_residual", [False, True])
@pytest.mark.parametrize("noise", [None, "none"])
def test_gradients_and_running_statistics_are_those_of_the_papers_graph(zero_init_residual, noise):
    net = build(
        "blockwise",
        preset="imagenet",
        granularity=4,
        image_size=SIZE,
        batch_size=BATCH,
        expand_width=WIDTH,
        projector=PROJECTOR,
        zero_init_residual=zero_init_residual,
        noise=noise,
    ).double()
    reference, names = twin_of(net)
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(BATCH, 3, SIZE, SIZE, generator=generator, dtype=torch.float64) for _ in range(2)]

    losses = engine.backward(net, *views, key=KEY)

    embeddings = [reference.embed(x, view, noise=noise is None) for view, x in enumerate(views)]
    expected = [barlow_twins(z1, z2) for z1, z2 in zip(*embeddings, strict=True)]
    torch.stack(expected).sum().backward()

    for index in range(4):
        assert losses[index].item() == pytest.approx(expected[index].item(), rel=1e-12)
    gradients = {name: p.grad for name, p in reference.named_parameters()}
    assert all(grad is not None for grad in gradients.values())
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert relative_error(p.grad, gradients[names[name]]) < 1e-10, name
    if not zero_init_residual:
        assert all(grad.any() for grad in gradients.values())
    buffers = dict(reference.named_buffers())
    assert len(buffers) == 3 * (53 + 4 + 8), "mean, variance and count of every batch norm"
    for name, ours in net.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert ours.item() == buffers[names[name]].item() == 2, "once per view"
        else:
            assert relative_error(ours, buffers[names[name]]) < 1e-10, name
