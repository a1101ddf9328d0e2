"""Heads that only re-map a vector before the objective: a projector, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from localsim.errors import UserError
from localsim.rules.site import Site


def projector(in_features: int, widths: Sequence[int]) -> nn.Sequential:
    """Return the Barlow Twins projector: linear layers without bias, batch norm and ReLU after all but the last.

    Zbontar et al. 2021, section 2.3 (three layers of 8192); Siddiqui et al. 2023 use one per block.

    Args:
        in_features: width of the readout.
        widths: output width of every layer; the last is the embedding's.

    Raises:
        UserError: no width, or a width below 1.
    """
    if not widths or any(width < 1 for width in widths):
        raise UserError(f"projector {list(widths)} is not a list of positive widths, e.g. [8192, 8192, 8192]")
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(in_features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, widths[-1], bias=False))


class Projector(nn.Sequential):
    """Linear layers with batch norm and ReLU between them, as wide as the setting `projector` says."""

    takes = "vector"
    gives = "vector"

    def __init__(self, site: Site) -> None:
        super().__init__(*projector(site.shape[0], site.widths))

    def forward_views(self, reads: Sequence[Tensor]) -> list[Tensor]:
        """Return the embedding `(n, d)` of every view, from what was read of each, `(n, in_features)`.

        They are those of calling the head view after view, running statistics included, but for rounding: batch norm
        does see each view alone, in order. The rest works row by row and runs once on all views, so that a step reads
        every weight, and makes its gradient, once.
        """
        sizes = [len(read) for read in reads]
        x = torch.cat(list(reads))
        for layer in self:
            alone = isinstance(layer, _NormBase)
            x = torch.cat([layer(view) for view in x.split(sizes)]) if alone else layer(x)
        starts = accumulate(sizes, initial=0)
        # not split, whose results may not be changed in place
        return [x.narrow(0, start, size) for start, size in zip(starts, sizes, strict=False)]


class NoHead(nn.Identity):
    """The readout's vector is the embedding."""

    takes = "vector"
    gives = "vector"

    def __init__(self, site: Site) -> None:
        super().__init__()
