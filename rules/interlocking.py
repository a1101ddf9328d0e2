"""Interlocking backpropagation: a stage is changed only by a loss further up, its own loss trains a head alone."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

RULE = Rule(
    name="interlocking",
    summary="Every stage is changed only by the loss one stage up (--reach N: N - 1 stages up), or the last.",
    paper="Gomez, Key, Perlin, Gou, Frosst, Dean & Gal, Interlocking Backpropagation: Improving depthwise "
    "model-parallelism, JMLR 23:171, 2022, arXiv 2010.04116",
    credit=Credit.interlocking,
    # the released code's last component has a linear classifier; here every tap has the auxiliary network
    readout="map",
    head="conv",
    objective="cross_entropy",
    settings={"lr_scaling": "none", "weight_decay": 2e-4},
)
