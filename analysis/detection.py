"""A run's ResNet as the trunk of torchvision's object detectors: Faster R-CNN and Mask R-CNN on a feature pyramid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from localsim import rng
from localsim.data.datasets import Triple
from localsim.errors import UserError, one_of
from localsim.network import LocalNetwork
from localsim.opening import open_data
from localsim.runs import Run

if TYPE_CHECKING:
    from torchvision.models.detection import FasterRCNN

KINDS = ("faster_rcnn", "mask_rcnn")
NORMS = ("frozen", "batch")
# unit blocks per layer, and convolutions in each, by torchvision's name
TRUNKS = {
    "resnet18": ((2, 2, 2, 2), 2),
    "resnet34": ((3, 4, 6, 3), 2),
    "resnet50": ((3, 4, 6, 3), 3),
    "resnet101": ((3, 4, 23, 3), 3),
}
_LAYERS = ("layer4", "layer3", "layer2", "layer1", "conv1")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_COLOURS = ((0.9, 0.1, 0.1), (0.1, 0.8, 0.2), (0.15, 0.25, 0.95), (0.95, 0.85, 0.1))


def detection_model(
    source: Run | LocalNetwork,
    kind: str = "faster_rcnn",
    *,
    num_classes: int,
    norm: str = "frozen",
    trainable_layers: int = 5,
    mean: Triple | None = None,
    std: Triple | None = None,
    min_size: int = 800,
    max_size: int = 1333,
    boxes_per_image: int = 512,
    seed: int = 0,
) -> FasterRCNN:
    """Return torchvision's detector on a feature pyramid (Lin et al. 2017) whose trunk has the network's weights.

    They are loaded strictly: every tensor of the trunk finds its place, or none does. The pyramid reads layer1 to
    layer4 and adds a pooled fifth level. A trunk with the CIFAR stem has strides 1, 2, 4 and 8 instead of 4, 8, 16 and
    32, so that images of a given size cost sixteen times as much.

    Args:
        source: a run (its newest checkpoint) or a network, of a torchvision ResNet; it stays as it is.
        kind: `faster_rcnn` (Ren et al. 2015) or `mask_rcnn` (He et al. 2017).
        num_classes: with the background, which is class 0.
        norm: `frozen` keeps the batch norms' statistics, weights and biases as they were learned, which suits batches
            of a few images, and is torchvision's choice; `batch` trains them.
        trainable_layers: how many of layer4, layer3, layer2, layer1 and the stem are trained, in this order; all of
            them by default, since a trunk from local learning may need its lower layers tuned (torchvision: 3).
        mean, std: per channel, what images between 0 and 1 are normalised by. By default those of the run's data,
            which are opened for it; for a network of one's own, ImageNet's.
        min_size, max_size: images are resized so that the shorter side has `min_size` pixels, unless the longer one
            would exceed `max_size`.
        boxes_per_image: proposals of each image that the second stage learns from.
        seed: of what the detector adds to the trunk.

    Raises:
        UserError: another backbone, an unknown kind or norm, or a number out of range.
    """
    from torchvision.models import get_model
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops import FrozenBatchNorm2d

    if kind not in KINDS:
        raise one_of("detector", kind, KINDS)
    if norm not in NORMS:
        raise one_of("norm", norm, NORMS)
    if num_classes < 2:
        raise UserError(f"num_classes {num_classes} must be at least 2: the background and one kind of object")
    if not 0 <= trainable_layers <= len(_LAYERS):
        raise UserError(f"trainable_layers {trainable_layers} must lie between 0 and {len(_LAYERS)}")
    if (mean is None) != (std is None):
        raise UserError("mean and std go together: give both or neither")
    if mean is None or std is None:
        mean, std = _statistics(source)
    net = source.network() if isinstance(source, Run) else source
    name, state = backbone_name(net), net.trunk_state_dict()
    with rng.keyed(seed, "detection"):
        trunk: Any = get_model(name, weights=None, norm_layer=FrozenBatchNorm2d if norm == "frozen" else None)
        trunk.fc = nn.Identity()
        if state["conv1.weight"].shape[-1] == 3:
            trunk.conv1, trunk.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        trunk.load_state_dict(state, strict=True)
        for parameter, tensor in trunk.named_parameters():
            trained = _LAYERS[:trainable_layers] + (("bn1",) if trainable_layers == len(_LAYERS) else ())
            tensor.requires_grad_(parameter.startswith(trained))
        channels = [trunk.inplanes // 2**up for up in (3, 2, 1, 0)]
        layers = {f"layer{level + 1}": str(level) for level in range(4)}
        pyramid = BackboneWithFPN(trunk, layers, channels, 256)
        made = (FasterRCNN if kind == "faster_rcnn" else MaskRCNN)(
            pyramid,
            num_classes,
            min_size=min_size,
            max_size=max_size,
            image_mean=list(mean),
            image_std=list(std),
            box_batch_size_per_image=boxes_per_image,
        )
    return made.to(net.device)


def backbone_name(net: LocalNetwork) -> str:
    """Return torchvision's name of a network's ResNet; UserError for another backbone."""
    state = net.trunk_state_dict()
    for name, (blocks, convolutions) in TRUNKS.items():
        found = {key.rsplit(".", 2)[0] for key in state if key.startswith("layer") and ".downsample" not in key}
        expected = {f"layer{level}.{block}" for level, num in enumerate(blocks, 1) for block in range(num)}
        last = f"layer1.0.conv{convolutions}.weight"
        if found == expected and last in state and f"layer1.0.conv{convolutions + 1}.weight" not in state:
            return name
    units = [unit.name for unit in net.units]
    raise UserError(
        f"a network of {len(units)} unit blocks, {units[0]} to {units[-1]}, cannot carry a detector; "
        f"allowed backbones: {', '.join(TRUNKS)}"
    )


@dataclass(frozen=True)
class TransferCheck:
    """What `check_transfer` found.

    Attributes:
        kind, backbone, norm: of the detector.
        losses: one per step: the detector's losses by name, and their sum as `total`.
        compared: how many tensors of the trunk were compared, bit for bit, before the first step.
        different: those that did not arrive as they were.
        without_gradient: trainable parameters of the trunk that no step's gradient reached, or whose gradient was zero
            or not finite in every step.
        trainable: how many parameters of the trunk are trained.
    """

    kind: str
    backbone: str
    norm: str
    losses: tuple[dict[str, float], ...]
    compared: int
    different: tuple[str, ...]
    without_gradient: tuple[str, ...]
    trainable: int

    @property
    def passed(self) -> bool:
        """Whether all weights arrived, every trained one got a gradient, and every loss is finite."""
        finite = all(math.isfinite(value) for loss in self.losses for value in loss.values())
        return finite and not (self.different or self.without_gradient)

    def __str__(self) -> str:
        totals = ", ".join(f"{loss['total']:.3f}" for loss in self.losses)
        return "\n".join(
            [
                f"{self.kind} on {self.backbone}, {self.norm} batch norm: {'passed' if self.passed else 'FAILED'}",
                f"  trunk tensors that arrived bit for bit: {self.compared - len(self.different)} of {self.compared}",
                f"  trained trunk parameters with a gradient: {self.trainable - len(self.without_gradient)} of "
                f"{self.trainable}",
                f"  losses of {len(self.losses)} steps on made-up boxes (no measure of transfer): {totals}",
            ]
        )


def check_transfer(
    source: Run | LocalNetwork,
    steps: int = 3,
    *,
    kind: str = "faster_rcnn",
    norm: str = "frozen",
    size: int = 128,
    batch_size: int = 2,
    lr: float = 0.005,
    mean: Triple | None = None,
    std: Triple | None = None,
    seed: int = 0,
) -> TransferCheck:
    """Train a detector on a run's trunk for a few steps on made-up images (`coloured_boxes`), and say whether it works.

    It checks the way, not how good the features are: that the trunk's weights arrive bit for bit and that gradients
    reach every one that is trained. SGD with momentum 0.9, gradients clipped to norm 1: frozen batch norms do not adapt
    to the made-up images, and activations can be large.

    Args:
        source, kind, norm, mean, std: as in `detection_model`.
        steps: at least 1.
        size: side of the images, in pixels, at least 32.
        batch_size: images per step.
        lr: learning rate.
        seed: of the images, the detector's new weights and its sampling of boxes.

    Raises:
        UserError: as `detection_model`, or steps, size or batch size are too small.
    """
    if steps < 1 or size < 32 or batch_size < 1:
        raise UserError(
            f"a check needs steps >= 1, size >= 32 and batch_size >= 1, not {steps}, {size} and {batch_size}"
        )
    net = source.network() if isinstance(source, Run) else source
    if mean is None and std is None:
        mean, std = _statistics(source)
    model = detection_model(
        net, kind, num_classes=len(_COLOURS) + 1, norm=norm, mean=mean, std=std, min_size=size, max_size=size,
        boxes_per_image=64, seed=seed,
    )  # fmt: skip
    trunk = cast(nn.Module, model.backbone.body)
    arrived, sent = trunk.state_dict(), net.trunk_state_dict()
    # a frozen batch norm has no counter of batches
    compared = [name for name in sent if norm == "batch" or not name.endswith("num_batches_tracked")]
    different = [name for name in compared if name not in arrived or not torch.equal(sent[name], arrived[name])]

    trained = {name: tensor for name, tensor in trunk.named_parameters() if tensor.requires_grad}
    silent = set(trained)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    losses = []
    model.train()
    for step in range(steps):
        images, targets = coloured_boxes(batch_size, size, seed=rng.key(seed, "boxes", step))
        targets = [{name: value.to(net.device) for name, value in target.items()} for target in targets]
        with rng.keyed(seed, "detection", step, device=net.device):  # it draws which boxes it learns from
            found: dict[str, Tensor] = model(list(images.to(net.device)), targets)
            total = torch.stack(list(found.values())).sum()
            optimizer.zero_grad()
            total.backward()
        silent -= {name for name, tensor in trained.items() if _reached(tensor.grad)}
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append({**{name: value.item() for name, value in found.items()}, "total": total.item()})
    return TransferCheck(
        kind, backbone_name(net), norm, tuple(losses), len(compared), tuple(different), tuple(sorted(silent)),
        len(trained),
    )  # fmt: skip


def coloured_boxes(num: int, size: int, *, seed: int = 0) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return made-up images of coloured rectangles on grey noise, with what a detector is to find in them.

    Each image has one to four rectangles, one per quarter, so that none hides another; the class is the colour.

    Returns:
        images `(num, 3, size, size)` float32 between 0 and 1, and for each image `boxes` `(k, 4)` as x1, y1, x2, y2 in
        pixels, `labels` `(k,)` from 1 to 4, and `masks` `(k, size, size)` uint8.
    """
    draw = rng.generator(seed, "coloured boxes")
    images = 0.5 + 0.1 * torch.randn(num, 1, size, size, generator=draw).expand(-1, 3, -1, -1).clone()
    targets = []
    half = size // 2

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    for image in images:
        boxes, labels, masks = [], [], []
        for quarter in torch.randperm(4, generator=draw)[: number(1, 5)].tolist():
            width, height = number(half // 3, half - 1), number(half // 3, half - 1)
            left = half * (quarter % 2) + number(0, half - width)
            top = half * (quarter // 2) + number(0, half - height)
            label = number(0, len(_COLOURS))
            mask = torch.zeros(size, size, dtype=torch.uint8)
            mask[top : top + height, left : left + width] = 1
            image[:, mask.bool()] = torch.tensor(_COLOURS[label])[:, None]
            boxes.append([left, top, left + width, top + height])
            labels.append(label + 1)
            masks.append(mask)
        targets.append(
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32),
                "labels": torch.tensor(labels),
                "masks": torch.stack(masks),
            }
        )
    return images.clamp_(0, 1), targets


def _statistics(source: Run | LocalNetwork) -> tuple[Triple, Triple]:
    if not isinstance(source, Run):
        return _IMAGENET
    data = open_data(source.config)
    return data.mean, data.std


def _reached(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.count_nonzero())
