"""MAN: every module's head starts with a slowly following copy of the next module's first block."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

RULE = Rule(
    name="man",
    summary="Every module is trained through a moving average of the next module's first block, and a trainable twin.",
    paper="Su et al., Momentum Auxiliary Network for Supervised Local Learning, ECCV 2024",
    credit=Credit.banded,
    readout="map",
    head="next_stage",
    # the released code adds InfoPro's reconstruction to the classification; here it is the classification alone
    objective="cross_entropy",
)
