"""Networks without any normalisation, for rules that cut images into patches and compare the patches of one batch.

Batch norm would mix the patches of an image, and with them the very thing that such a rule predicts. Parameters have
plain names: `features.0.weight` as in torchvision's VGG, `layer1.0.conv1.weight` as in its ResNets.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

# channels of each convolution of CLAPP's VGG-6, and whether a max-pool follows it
VGG6_LAYERS = ((128, False), (256, True), (256, False), (512, True), (1024, True), (1024, True))
# the first three stages of ResNet-50: bottleneck blocks in each, and their inner channels
PREACT_BLOCKS = (3, 4, 6)
PREACT_CHANNELS = (64, 128, 256)
EXPANSION = 4


class PlainVgg(nn.Module):
    """A VGG without normalisation and classifier: 3x3 convolutions, each with a ReLU, some with a 2x2 max-pool.

    Args:
        layers: for each convolution its channels, and whether a max-pool follows.
    """

    def __init__(self, layers: Sequence[tuple[int, bool]]) -> None:
        super().__init__()
        modules, in_channels = [], 3
        for channels, pooled in layers:
            modules += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU(inplace=True)]
            modules += [nn.MaxPool2d(2)] * pooled
            in_channels = channels
        self.features = nn.Sequential(*modules)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(n, 3, h, w)` to the last map, `(n, channels, h / 2^pools, w / 2^pools)`."""
        return self.features(x)


class PreActBottleneck(nn.Module):
    """A bottleneck block that rectifies before each convolution (He et al. 2016, arXiv:1603.05027), unnormalised.

    `out = conv3(relu(conv2(relu(conv1(r))))) + shortcut` with `r = relu(x)`. The shortcut is `x` itself, or a 1x1
    convolution of `r` where the shape changes. The sum is not rectified: the next block does that.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        # not in place: the input is the stage below's output, which taps read and the shortcut adds
        self.first_relu = nn.ReLU()
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, channels, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.conv3 = nn.Conv2d(channels, out_channels, 1)
        changes = stride > 1 or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, in_channels, h, w)` to `(n, 4 channels, ceil(h / stride), ceil(w / stride))`."""
        rectified = self.first_relu(x)
        shortcut = x if self.shortcut is None else self.shortcut(rectified)
        out = self.relu(self.conv1(rectified))
        return self.conv3(self.relu(self.conv2(out))) + shortcut


class PreActResNet(nn.Module):
    """A pre-activation ResNet without normalisation, max-pool and classifier: a 5x5 convolution, then stages.

    Without normalisation, blocks of equal scale would double the variance from block to block. The last convolution of
    each is therefore scaled by `1 / sqrt(blocks)` (De & Smith 2020, arXiv:2002.10444), which bounds the growth by e.

    Args:
        blocks: bottleneck blocks in each stage; all stages but the first halve the map.
        channels: inner channels of the blocks of each stage; the stem has those of the first.
        zero_init_residual: start the last convolution of every block at zero instead, so that each block begins as its
            shortcut (Zhang et al. 2019, arXiv:1901.09321).
    """

    def __init__(self, blocks: Sequence[int], channels: Sequence[int], *, zero_init_residual: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels[0], 5, padding=2)
        in_channels = channels[0]
        for stage, (num_blocks, inner) in enumerate(zip(blocks, channels, strict=True), start=1):
            row = []
            for block in range(num_blocks):
                row.append(PreActBottleneck(in_channels, inner, 2 if block == 0 and stage > 1 else 1))
                in_channels = EXPANSION * inner
            self.add_module(f"layer{stage}", nn.Sequential(*row))
        _initialise(self)
        for module in self.modules():
            if isinstance(module, PreActBottleneck):
                scale = 0.0 if zero_init_residual else sum(blocks) ** -0.5
                module.conv3.weight.data.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(n, 3, h, w)` to the last map, `(n, 4 channels, h / 4, w / 4)` with three stages."""
        for module in self.children():
            x = module(x)
        return x


def vgg6(width: float = 1.0) -> PlainVgg:
    """Return the VGG-6 of CLAPP (Illing et al. 2021, arXiv:2010.08262), its channels times `width`."""
    return PlainVgg([(_scaled(channels, width), pooled) for channels, pooled in VGG6_LAYERS])


def preact_resnet50(width: float = 1.0, *, zero_init_residual: bool = True) -> PreActResNet:
    """Return the three-stage ResNet-50 of Greedy InfoMax (Löwe et al. 2019, arXiv:1905.11786), scaled by `width`."""
    channels = [_scaled(inner, width) for inner in PREACT_CHANNELS]
    return PreActResNet(PREACT_BLOCKS, channels, zero_init_residual=zero_init_residual)


def _scaled(channels: int, width: float) -> int:
    return max(8, round(channels * width))


def _initialise(model: nn.Module) -> None:
    """Draw Kaiming normal weights over the fan-in, biases zero.

    The fan-in keeps the size of activations through the depth, which nothing else does here. Their gradients, which the
    fan-out would keep, cross few layers in a local rule.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
