"""LoCo: every loss reaches its own stage and the one below, so that neighbours share a stage."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

RULE = Rule(
    name="loco",
    summary="Every loss changes its own stage and the one below; the lowest stage has no loss of its own.",
    paper="Xiong, Ren & Urtasun, LoCo: Local Contrastive Representation Learning, NeurIPS 2020, arXiv 2008.01342",
    credit=Credit.overlapping,
    # the projector's widths are the preset's (SimCLR's are 2048 and 128: --set projector=[2048,128]);
    # the paper's deeper decoders, extra layers before the projector, are --readout residual1, residual2, ...
    objective="simclr",
)
