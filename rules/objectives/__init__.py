"""What a tap minimises. An objective takes the embeddings of all views and the labels, and returns a scalar."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from localsim.errors import UserError, one_of
from localsim.network import Objective
from localsim.rules.objectives.barlow_twins import BarlowTwins

OBJECTIVES: dict[str, type[Objective]] = {"barlow_twins": BarlowTwins}
"""Each a frozen dataclass, whose fields are its options."""


def make_objective(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """Return the objective `name` with its options, e.g. `make_objective("barlow_twins", {"lambda_": 0.01})`.

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
