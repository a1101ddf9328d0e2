"""Greedy InfoMax: every module predicts the patches below from the patches above, and no gradient crosses modules."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

ADAM = {"optimizer": "adamw", "lr": 2e-4, "lr_scaling": "none", "weight_decay": 0.0}
PATCHES = {"patches": "16:8", "image_size": 64, "augmentation": "patches"}
"""The released recipe, which CLAPP's builds on."""

RULE = Rule(
    name="greedy_infomax",
    summary="Every module predicts its own activity for patches 2 to 6 rows down; one module: CPC, no autoregressor.",
    paper="Loewe, O'Connor & Veeling, Putting An End to End-to-End: Gradient-Isolated Learning of Representations, "
    "NeurIPS 2019, arXiv 1905.11786",
    credit=Credit.banded,
    readout="patches",
    objective="infonce",
    settings={
        "backbone": "preact_resnet50",
        "zero_init_residual": False,
        **PATCHES,
        **ADAM,
    },
)
