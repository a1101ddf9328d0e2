"""What a tap minimises. An objective takes the embeddings of all views and the labels, and returns a scalar."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from localsim.errors import UserError, one_of
from localsim.network import Objective
from localsim.rules.objectives.barlow_twins import BarlowTwins
from localsim.rules.objectives.contrastive import SimCLR, SupCon
from localsim.rules.objectives.lpl import LPL
from localsim.rules.objectives.predictive import Hinge, InfoNCE
from localsim.rules.objectives.supervised import CrossEntropy, InfoPro, SimilarityMatching
from localsim.rules.objectives.vicreg import VICReg


class RuleObjective(Objective, Protocol):
    """An objective that a rule or `--objective` can name.

    Attributes:
        reads: the kind of embedding, as heads give it; alternatives are joined by " or ".
        head: the name of the head that makes it by default.
        needs_labels: whether it means nothing without.
    """

    reads: ClassVar[str]
    head: ClassVar[str]
    needs_labels: ClassVar[bool]


OBJECTIVES: dict[str, type[RuleObjective]] = {
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
    "simclr": SimCLR,
    "supcon": SupCon,
    "infonce": InfoNCE,
    "hinge": Hinge,
    "lpl": LPL,
    "cross_entropy": CrossEntropy,
    "predsim": SimilarityMatching,
    "infopro": InfoPro,
}
"""Each a frozen dataclass, whose fields are its options."""


def usual_views(objective: RuleObjective) -> int:
    """Return how many views a run makes of every image for an objective unless told otherwise: its `num_views`, or 1.

    A class attribute of most, a property of those whose options decide it: no type in a protocol fits both.
    """
    return getattr(objective, "num_views", 1)


def make_objective(name: str, options: Mapping[str, Any] | None = None) -> RuleObjective:
    """Return the objective `name` with its `options`, e.g. `make_objective("barlow_twins", {"lambda_": 0.01})`.

    Raises:
        UserError: unknown name or option, or a value outside its range.
    """
    if name not in OBJECTIVES:
        raise one_of("objective", name, OBJECTIVES)
    kind = OBJECTIVES[name]
    allowed = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for option in options or {}:
        if option not in allowed:
            raise UserError(f"objective {name} has no option {option!r}; allowed: {', '.join(allowed)}")
    return kind(**(options or {}))
