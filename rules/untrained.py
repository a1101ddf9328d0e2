"""The untrained network: no loss, nothing learned. Every comparison needs it."""

from localsim.credit import Credit
from localsim.rules.rule import Rule

_REASON = "it has no loss"

RULE = Rule(
    name="untrained",
    summary="No loss, nothing is learned: the network at its initialisation, which every comparison needs.",
    paper="a control, e.g. Geiger et al., Wiring Up Vision, ICLR 2022",
    credit=Credit.untrained,
    meaningless=dict.fromkeys(("reach", "credit", "objective", "readout", "noise"), _REASON),
)
