"""What published training recipes of a kind have in common, for `Rule.settings`."""

from __future__ import annotations

from typing import Any

SUPERVISED: dict[str, Any] = {
    # crops and flips, SGD with momentum, 0.1 per 256 images, as supervised residual networks use (He et al. 2016)
    "augmentation": "crop_flip",
    "optimizer": "sgd",
    "lr": 0.1,
    "lr_scaling": "linear",
    "weight_decay": 1e-4,
}
