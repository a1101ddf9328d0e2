"""Heads that learn from labels: a classifier, and the two-part head of predsim."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from localsim.errors import UserError
from localsim.rules.site import Site


class Classifier(nn.Sequential):
    """A linear classifier, or an MLP: `logits = W h + b`, with h the vector or its hidden layers' output.

    The auxiliary classifier of greedy supervised training (Belilovsky et al. 2019, arXiv 1812.11446). Hidden layers
    are linear with batch norm and ReLU; those of the paper's deeper classifiers are convolutions.

    Args:
        site: gives the number of classes.
        hidden: widths of the hidden layers; none for a linear classifier.

    Raises:
        UserError: images without labels, or a width below 1.
    """

    takes = "vector"
    gives = "vector"

    def __init__(self, site: Site, hidden: Sequence[int] = ()) -> None:
        if not isinstance(hidden, list | tuple) or any(type(width) is not int or width < 1 for width in hidden):
            raise UserError(f"classifier: hidden is {hidden!r}; allowed: a list of positive widths, e.g. [128]")
        layers: list[nn.Module] = []
        width = site.shape[0]
        for next_width in hidden:
            layers += [nn.Linear(width, next_width, bias=False), nn.BatchNorm1d(next_width), nn.ReLU()]
            width = next_width
        super().__init__(*layers, nn.Linear(width, site.classes()))


class Conv(nn.Module):
    """Convolutions with batch norm and ReLU, the mean over positions, then the objective's own vector head.

    With channels 128 and 64 and 3x3 kernels this is the auxiliary network of interlocking backpropagation (Gomez et al.
    2022, released code); with three 1x1 convolutions, that of DGL (Belilovsky et al. 2020, arXiv 1901.08164), but for
    the hidden layers of its classifier.

    Args:
        site: where the tap reads.
        channels: of the convolutions, one after the other.
        kernel: their size, odd.

    Raises:
        UserError: no or non-positive channels, or an even kernel.
    """

    takes = "map"
    gives = "vector"

    def __init__(self, site: Site, channels: Sequence[int] = (128, 64), kernel: int = 3) -> None:
        super().__init__()
        if not isinstance(channels, list | tuple) or not channels or any(type(c) is not int or c < 1 for c in channels):
            raise UserError(f"conv: channels is {channels!r}; allowed: a list of positive numbers, e.g. [128, 64]")
        if type(kernel) is not int or kernel < 1 or kernel % 2 == 0:
            raise UserError(f"conv: kernel is {kernel!r}; allowed: odd numbers from 1")
        layers: list[nn.Module] = []
        width = site.shape[0]
        for wide in channels:
            layers += [nn.Conv2d(width, wide, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
            width = wide
        self.layers = nn.Sequential(*layers)
        self.end = site.end(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the end's output `(n, d)` for a map `(n, channels, height, width)`."""
        return self.end(self.layers(x).mean((2, 3)))


class PredSim(nn.Module):
    """The prediction and similarity-matching head of Nøkland & Eidnes 2019 (arXiv 1901.06656).

        logits = W mean_positions(h) + b,    features_c = std_positions(conv3x3(h))_c

    for a map h of c channels; the convolution keeps the channels and has no bias; std is the unbiased estimate. On a
    map of one position, which has no standard deviation, the features are the convolution's output itself. As in the
    released code (anokland/local-loss) W starts at zero. That code pools a map to about 2048 values before W, of which
    this keeps the mean over all positions.
    """

    takes = "map"
    gives = "similarity"

    def __init__(self, site: Site) -> None:
        super().__init__()
        channels = site.shape[0]
        self.classify = nn.Linear(channels, site.classes())
        nn.init.zeros_(self.classify.weight)
        self.compare = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `(n, classes)` and features `(n, channels)` of a map `(n, channels, height, width)`."""
        compared = self.compare(x).flatten(2)
        features = compared.std(2) if compared.shape[2] > 1 else compared.flatten(1)
        return self.classify(x.mean((2, 3))), features
