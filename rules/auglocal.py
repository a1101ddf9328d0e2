"""AugLocal: every block's head is a copy in kind of the blocks above it, shallower towards the top."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

RULE = Rule(
    name="auglocal",
    summary="Every block is trained through a head built like the blocks above it, with weights of its own.",
    paper="Ma, Wu, Si & Tan, Scaling Supervised Local Learning with Augmented Auxiliary Networks, ICLR 2024, arXiv "
    "2402.17318",
    credit=Credit.banded,
    granularity="block",
    readout="map",
    head="mirrored",
    objective="cross_entropy",
)
