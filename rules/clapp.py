"""CLAPP: every layer predicts its own activity, with a hinge loss that a synapse can compute from local signals."""

from localsim.credit import Credit
from localsim.rules.greedy_infomax import ADAM, PATCHES
from localsim.rules.rule import Rule

RULE = Rule(
    name="clapp",
    summary="Every conv layer tells the patches below, in its own activity, from those of one other image.",
    paper="Illing, Ventura, Bellec & Gerstner, Local plasticity rules can learn deep representations using "
    "self-supervised contrastive predictions, NeurIPS 2021, arXiv 2010.08262",
    credit=Credit.banded,
    granularity="block",
    readout="patches",
    objective="hinge",
    settings={
        # CLAPP-s sums both terms for every image: objective_options sampling="both"
        "objective_options": {"sampling": "either"},
        "backbone": "vgg6",
        **PATCHES,
        **ADAM,
    },
)
