"""Chunked learning: consecutive stages share the loss on top of them, and no gradient leaves a chunk."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

RULE = Rule(
    name="chunked",
    summary="One loss on top of every two stages changes both; --reach N makes chunks of N.",
    paper="Laskin et al., Parallel Training of Deep Networks with Local Updates, 2020, arXiv 2012.03837",
    credit=Credit.chunked,
)
