"""Latent predictive learning: every layer pulls two views together, spreads its units and decorrelates them."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

RULE = Rule(
    name="lpl",
    summary="Every conv layer predicts its own next activity under Hebbian (variance) and decorrelating plasticity.",
    paper="Halvagal & Zenke, The combination of Hebbian and predictive plasticity learns invariant object "
    "representations in deep sensory networks, Nature Neuroscience 26, 2023",
    credit=Credit.banded,
    granularity="block",
    objective="lpl",
    settings={"backbone": "vgg11", "optimizer": "adamw", "lr": 1e-3, "lr_scaling": "none", "weight_decay": 1.5e-6},
)
