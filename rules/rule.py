"""What a rule is: a named composition of partition, credit, readout, objective and boundary, with its defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from localsim.credit import Credit
from localsim.errors import UserError
from localsim.rules.noise import Noise


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A learning rule as data.

    Args:
        name: what `--rule` takes.
        summary: one sentence, who may change what.
        paper: authors, title, year and arXiv number.
        credit: from the number of stages to the credit matrix; called with a reach too, unless `reach` is meaningless.
        granularity: the default partition: a number of stages, or `network`, `stage`, `block`.
        readout: the default readout of every tap.
        head: the head of every tap, as long as it suits the objective; None: what the objective uses by default.
        objective: the default objective of every tap.
        noise: the default noise at every boundary.
        settings: other fields of `localsim.config.Config` that the paper fixes: a backbone of its own, patches,
            schedule, options of objective and head, ... They take the place of a preset's.
        meaningless: options that cannot be overridden, each with the reason why.
    """

    name: str
    summary: str
    paper: str
    credit: Callable[..., Credit]
    granularity: int | str = "stage"
    readout: str = "global"
    head: str | None = None
    objective: str = "barlow_twins"
    noise: Noise = field(default_factory=Noise)
    settings: Mapping[str, Any] = field(default_factory=dict)
    meaningless: Mapping[str, str] = field(default_factory=dict)

    def check_overrides(self, options: Mapping[str, object]) -> None:
        """Raise UserError if one of the given options has no meaning for this rule; None counts as not given."""
        for option, reason in self.meaningless.items():
            if options.get(option) is not None:
                flag = f"--{option.replace('_', '-')}"
                raise UserError(f"{flag} {options[option]} has no meaning for rule {self.name}: {reason}")
