"""Layerwise complexity-matched learning: one stage after the other, each on views deformed to the scale it sees."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

RULE = Rule(
    name="lcl",
    summary="Stages are trained bottom-up, each alone, on views deformed in proportion to its receptive field.",
    paper="Parthasarathy, Henaff & Simoncelli, Layerwise complexity-matched learning yields an improved model of "
    "cortical area V2, TMLR 2024, arXiv 2312.11436",
    credit=Credit.banded,
    # Of the paper it has the schedule, the kind of loss and views that fit what a layer sees. The paper trains two
    # layers on pairs of locally deformed patches; here the layers are those of a VGG, whose receptive fields grow
    # slowly, views are of whole images, and all of the augmentation is scaled, colour included.
    granularity="block",
    settings={"backbone": "vgg11_bn", "schedule": "sequential", "view_strength": "receptive_field"},
)
