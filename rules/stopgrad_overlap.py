"""LoCo's overlap as its co-author coded it later: a loss on every stage, with weights 2 and 1."""

import numpy as np

from localsim.credit import Credit
from localsim.rules.rule import Rule


def credit(num_stages: int) -> Credit:
    """Return the matrix of two passes that stop the gradient after even and after odd stages, losses summed.

    A loss changes its own stage in both passes and the stage below in one of them.
    """
    return Credit(2 * np.eye(num_stages) + np.eye(num_stages, k=-1), tuple(range(num_stages)))


RULE = Rule(
    name="stopgrad_overlap",
    summary="Every stage has a loss, which changes its own stage with weight 2 and the one below with weight 1.",
    paper="Ren, Kornblith, Liao & Hinton, Scaling Forward Gradient with Local Losses, ICLR 2023, arXiv 2210.03310 "
    "(local_stopgrad_overlap_backprop of the released code)",
    credit=credit,
    objective="simclr",
    meaningless={"reach": "its weights of 2 and 1 are those of two passes; use --rule loco --reach N"},
)
