"""How the convolutions above a stage start: as those of a residual trunk do."""

from __future__ import annotations

from torch import nn


def kaiming_fan_out(module: nn.Module) -> None:
    """Draw the weights of all convolutions of a module anew: normal, variance 2 / (output channels x kernel area).

    He et al. 2015 (arXiv 1502.01852), equation 14, as torchvision's ResNets start. Drawn from torch's default generator
    in the order of `module.modules()`; biases stay as they are.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
