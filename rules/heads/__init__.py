"""What stands between a tap's readout and its objective.

| head | takes | gives | options |
|---|---|---|---|
| `projector` | vector | vector | none; its widths are the setting `projector` |
| `none` | vector | vector | none |
| `classifier` | vector | vector (logits) | `hidden` |
| `conv` | map | vector | `channels`, `kernel` |
| `predsim` | map | similarity | none |
| `predictor` | patches | predictions | `steps`, `skip`, `asymmetric` |
| `feedback_predictor` | vector | predictions | `lateral` |
| `mirrored` | map | vector | `depth`, `pyramid` |
| `infopro` | map | reconstruction | `contrast` |
| `next_stage` | map | vector | `momentum` |
| `stale_statistics` | vector | statistics | none |

A head is called as `head(read)`, or `head(read, context)` where its class has an attribute `context`: `"top"`, the
output map of the highest stage, without gradient, or `"images"`, what enters the trunk.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from localsim.errors import UserError, one_of
from localsim.rules.heads.auxiliary import InfoPro, Mirrored, NextStage
from localsim.rules.heads.classifier import Classifier, Conv, PredSim
from localsim.rules.heads.predictor import FeedbackPredictor, Predictor
from localsim.rules.heads.projector import NoHead, Projector, projector
from localsim.rules.heads.stale import StaleStatistics
from localsim.rules.readouts import BY_KIND
from localsim.rules.site import Site

Head = (
    Projector
    | NoHead
    | Classifier
    | Conv
    | PredSim
    | Predictor
    | FeedbackPredictor
    | Mirrored
    | InfoPro
    | NextStage
    | StaleStatistics
)

HEADS: dict[str, type[Head]] = {
    "projector": Projector,
    "none": NoHead,
    "classifier": Classifier,
    "conv": Conv,
    "predsim": PredSim,
    "predictor": Predictor,
    "feedback_predictor": FeedbackPredictor,
    "mirrored": Mirrored,
    "infopro": InfoPro,
    "next_stage": NextStage,
    "stale_statistics": StaleStatistics,
}
"""Every head by name; the arguments of its constructor after the site are its options."""

__all__ = ["HEADS", "Head", "Projector", "make_head", "projector"]


def make_head(name: str, site: Site, options: Mapping[str, Any] | None = None, *, kind: str | None = None) -> Head:
    """Return the head `name` for a site, e.g. `make_head("mirrored", site, {"depth": 6})`.

    Args:
        name: one of `HEADS`.
        site: where the tap reads.
        options: of the head.
        kind: what the readout gives (`readout.kind`); without it, told from the site's shape as far as that goes.

    Raises:
        UserError: unknown name or option, an option outside its range, or a readout of another kind than it takes.
    """
    if name not in HEADS:
        raise one_of("head", name, HEADS)
    made = HEADS[name]
    kinds = [kind] if kind else ["vector"] if len(site.shape) == 1 else ["map", "patches"]
    if made.takes not in kinds:
        given = "patches" if kinds[0] == "patches" else f"a {kinds[0]}"
        raise UserError(
            f"head {name} cannot work on {given}, which is what the readout gives; "
            f"allowed readouts: {BY_KIND[made.takes]}"
        )
    allowed = [option for option in inspect.signature(made).parameters if option != "site"]
    for option in options or {}:
        if option not in allowed:
            raise UserError(f"head {name} has no option {option!r}; allowed: {', '.join(allowed) or 'none'}")
    return made(site, **(options or {}))
