"""The small ResNets of He et al. 2016 (arXiv:1512.03385, section 4.2) for 32 x 32 images, with torchvision's names."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

# depth = 6n + 2: three stages of n basic blocks of two convolutions, the first convolution and the classifier
BLOCKS_PER_STAGE = {"resnet20": 3, "resnet32": 5, "resnet110": 18}
STAGE_CHANNELS = (16, 32, 64)


class CifarBasicBlock(nn.Module):
    """Two 3x3 convolutions around the parameter-free shortcut "A" (He et al. 2016, section 3.3).

    Where the block halves the map, the shortcut keeps every second row and column and appends channels of zeros.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map `(n, in_channels, h, w)` to `(n, channels, ceil(h / stride), ceil(w / stride))`."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1 or self.new_channels > 0:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return self.relu(out + x)


class CifarResNet(nn.Module):
    """A ResNet of 6n + 2 layers: a 3x3 convolution, three stages of n basic blocks, global pooling, a classifier.

    Convolutions are initialised as in torchvision's ResNets (Kaiming normal, fan-out), so that both families
    differ in architecture only.

    Args:
        blocks_per_stage: n; 3 gives ResNet-20, 18 gives ResNet-110.
        num_classes: width of the classifier `fc`.
        zero_init_residual: start the last batch norm of every block at zero, so that each block begins as its shortcut.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int = 10, *, zero_init_residual: bool = False) -> None:
        super().__init__()
        narrow, middle, wide = STAGE_CHANNELS
        self.conv1 = nn.Conv2d(3, narrow, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(narrow, narrow, blocks_per_stage, stride=1)
        self.layer2 = _stage(narrow, middle, blocks_per_stage, stride=2)
        self.layer3 = _stage(middle, wide, blocks_per_stage, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(wide, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, CifarBasicBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(n, 3, h, w)` to logits `(n, num_classes)`."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(in_channels: int, channels: int, num_blocks: int, *, stride: int) -> nn.Sequential:
    first = CifarBasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(CifarBasicBlock(channels, channels, 1) for _ in range(num_blocks - 1)))
