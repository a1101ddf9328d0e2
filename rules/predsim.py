"""Local losses of prediction and similarity: every block classifies, and matches the similarities of the labels."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

RULE = Rule(
    name="predsim",
    summary="Every block has a local classifier and makes images as similar to each other as their labels are.",
    paper="Noekland & Eidnes, Training Neural Networks with Local Error Signals, ICML 2019, arXiv 1901.06656",
    credit=Credit.banded,
    granularity="block",
    readout="map",
    head="predsim",
    objective="predsim",
    # layer by layer on a VGG with batch norm, Adam, as in the paper (its VGG-8 has wider layers)
    settings={
        "backbone": "vgg11_bn",
        "augmentation": "crop_flip",
        "optimizer": "adamw",
        "lr": 5e-4,
        "lr_scaling": "none",
        "weight_decay": 0.0,
    },
)
