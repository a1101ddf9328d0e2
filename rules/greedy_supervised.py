"""Greedy supervised learning: every block is trained by a classifier of its own."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

RULE = Rule(
    name="greedy_supervised",
    summary="Every block is trained by a classifier of its own; no gradient crosses a boundary.",
    # simultaneous as DGL is; --set schedule=sequential trains block after block as the first paper does
    paper="Belilovsky, Eickenberg & Oyallon, Greedy Layerwise Learning Can Scale to ImageNet, ICML 2019, arXiv "
    "1812.11446; Decoupled Greedy Learning of CNNs (DGL), ICML 2020, arXiv 1901.08164",
    credit=Credit.banded,
    # one linear layer; DGL's deeper heads are head=conv, e.g. head_options={"channels": [256, 256, 256], "kernel": 1}
    objective="cross_entropy",
)
