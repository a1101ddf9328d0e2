"""Layers and networks small enough to write their gradients out: what the tests of transports share."""

from __future__ import annotations

import torch
from torch import nn

from localsim.backbones import UnitBlock, build_backbone
from localsim.network import Stage
from localsim.rng import keyed
from localsim.transport import set_transport

CROSSING = ("feedback_alignment", "sign_symmetric")
ERROR_WIDTH = 6


def install(net: nn.Module, name: str, seed: int = 0) -> nn.Module:
    set_transport(net.named_modules(), name, seed, ERROR_WIDTH)
    return net


def draw(*shape: int, key: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(key), dtype=dtype)


def resnet20_stage(key: int = 0) -> Stage:
    """The stem and blocks of the first and second group: strides, shortcuts by convolution, ReLUs in place."""
    with keyed(key, "stage"):
        units = build_backbone("resnet20", zero_init_residual=False).units
    return Stage([units[0], *units[3:6]])


def small_net() -> nn.Sequential:
    """Two stages: conv - batch norm - ReLU - grouped conv - ReLU - pool - linear - batch norm, and linear layers."""
    lower = {
        "conv": nn.Conv2d(3, 4, 3, padding=1), "norm": nn.BatchNorm2d(4), "relu": nn.ReLU(inplace=True),
        "grouped": nn.Conv2d(4, 6, 3, padding=1, groups=2), "relu2": nn.ReLU(), "pool": nn.AvgPool2d(2),
        "flat": nn.Flatten(1), "linear": nn.Linear(6 * 16, 6), "norm2": nn.BatchNorm1d(6),
    }  # fmt: skip
    upper = {"rows": nn.Unflatten(1, (3, 2)), "first": nn.Linear(2, 4), "tanh": nn.Tanh(), "second": nn.Linear(4, 1)}
    stages = [Stage([UnitBlock("lower", lower.items())]), Stage([UnitBlock("upper", upper.items())])]
    for number, parameter in enumerate(parameter for stage in stages for parameter in stage.parameters()):
        parameter.data = draw(*parameter.shape, key=number) / 3
    return nn.Sequential(*stages).double()


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.second(self.relu(self.first(x)))
        out += x
        return self.relu(out)


def parts_of(net: nn.Module) -> dict[str, nn.Module]:
    """Return what a network's unit blocks consist of, by name."""
    units = [module for module in net.modules() if isinstance(module, UnitBlock)]
    return {name: part for unit in units for name, part in zip(unit.part_names, unit.parts, strict=True)}


def feedback_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in net.named_buffers() if name.endswith("feedback")}


def gradients(net: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the gradients of <net(x), upstream> by x and by every parameter."""
    x = x.clone().requires_grad_()
    names, parameters = zip(*net.named_parameters(), strict=True)
    to_x, *rest = torch.autograd.grad(net(x), [x, *parameters], upstream)
    return to_x, dict(zip(names, rest, strict=True))


def assert_close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max().item() < tolerance * max(1.0, reference.abs().max().item())


def redraw(layer: nn.Module) -> nn.Module:
    """Move a batch norm's gain, bias and running statistics away from 1 and 0."""
    with torch.no_grad():
        for number, value in enumerate((*layer.parameters(), *layer.buffers())):
            if value.is_floating_point():
                value.copy_(draw(*value.shape, key=number).abs() + 0.3)
    return layer


def normalised(x: torch.Tensor, axes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    spread = (x.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()
    return (x - x.mean(axes, keepdim=True)) / spread, spread


def below_normalisation(
    g: torch.Tensor, normal: torch.Tensor, spread: torch.Tensor, axes: tuple[int, ...]
) -> torch.Tensor:
    return (g - g.mean(axes, keepdim=True) - normal * (g * normal).mean(axes, keepdim=True)) / spread


LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (5, 4, 7, 7)),
    "strided conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (5, 4, 8, 8)),
    "grouped conv": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2, groups=2), (5, 4, 7, 7)),
    "reflecting conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (5, 4, 7, 7)),
    "linear": (lambda: nn.Linear(4, 6), (5, 4)),
    "linear of positions": (lambda: nn.Linear(4, 6, bias=False), (5, 3, 4)),
    "batch norm": (lambda: nn.BatchNorm2d(4), (5, 4, 3, 3)),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "batch norm of sequences": (lambda: nn.BatchNorm1d(4, track_running_stats=False), (5, 4, 3)),
    "plain batch norm": (lambda: nn.BatchNorm2d(4, affine=False), (5, 4, 3, 3)),
}


def make_layer(kind: str) -> tuple[nn.Module, torch.Tensor]:
    make, shape = LAYERS[kind]
    with keyed(0, "layer"):
        layer = make().double()
    return (redraw(layer) if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) else layer), draw(*shape, key=1)
