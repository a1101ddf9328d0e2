"""Blockwise self-supervised learning: every stage has its own loss, and no gradient crosses a boundary."""

from localsim.credit import Credit
from localsim.rules.noise import Noise
from localsim.rules.rule import Rule

RULE = Rule(
    name="blockwise",
    summary="Every stage is trained by its own loss; no gradient crosses a boundary.",
    paper="Siddiqui, Krueger, LeCun & Deny, Blockwise Self-Supervised Learning at Scale, TMLR 2024, arXiv 2302.01647",
    credit=Credit.banded,
    granularity="stage",
    readout="expand",
    noise=Noise("all", 0.25),
)
