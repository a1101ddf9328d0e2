"""Backpropagation: one loss at the top that changes everything. The control for every local rule."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

RULE = Rule(
    name="end_to_end",
    summary="One loss on the last stage changes every stage: backpropagation, the control.",
    paper="Zbontar, Jing, Misra, LeCun & Deny, Barlow Twins, ICML 2021, arXiv 2103.03230",
    credit=Credit.end_to_end,
    meaningless={
        "reach": "its one loss always reaches every stage; use --rule blockwise --reach N",
        "credit": "its one loss always reaches every stage; give the matrix to rule blockwise",
    },
)
