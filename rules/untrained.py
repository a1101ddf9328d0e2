"""The untrained network: no loss, nothing learned. Every comparison needs it."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

_REASON = "it has no loss"
# what says how losses act; settings of size (projector, epochs, ...) are a preset's and may be shared by all rules
_OF_LOSSES = (
    "reach", "credit", "objective", "objective_options", "readout", "head", "head_options", "provenance", "noise",
    "schedule", "feature_cache", "view_strength", "transport",
)  # fmt: skip

RULE = Rule(
    name="untrained",
    summary="No loss, nothing is learned: the network at its initialisation, which every comparison needs.",
    paper="a control, e.g. Geiger et al., Wiring Up Vision, ICLR 2022",
    credit=Credit.untrained,
    meaningless=dict.fromkeys(_OF_LOSSES, _REASON),
)
