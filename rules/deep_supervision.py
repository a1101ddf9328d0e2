"""Deep supervision: a loss on every stage, each of which changes everything below. The control for local losses."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

RULE = Rule(
    name="deep_supervision",
    summary="Every stage has a loss, and every loss changes all stages below: many losses, no locality.",
    paper="Lee, Xie, Gallagher, Zhang & Tu, Deeply-Supervised Nets, AISTATS 2015, arXiv 1409.5185",
    credit=Credit.deep_supervision,
    objective="cross_entropy",
    meaningless={"reach": "its losses always reach every stage below; use --rule blockwise --reach N"},
)
