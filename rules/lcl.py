"""Layerwise complexity-matched learning: one stage after the other, each on views deformed to the scale it sees."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

RULE = Rule(
    name="lcl",
    summary="Stages are trained bottom-up, each alone, on views deformed in proportion to its receptive field.",
    paper="Parthasarathy, Henaff & Simoncelli, Layerwise complexity-matched learning yields an improved model of "
    "cortical area V2, TMLR 2024, arXiv 2312.11436",
    credit=Credit.banded,
    settings={"schedule": "sequential", "view_strength": "receptive_field"},
)
