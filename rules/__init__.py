"""What is learned where: the rules, one file each, and the objectives, readouts, heads and noise they are made of.

To add a rule, write a file like `blockwise.py` with one `RULE` and name it here.
"""

from __future__ import annotations

from localsim.errors import one_of
from localsim.rules import blockwise, end_to_end, layerwise, untrained
from localsim.rules.rule import Rule as Rule

rules: dict[str, Rule] = {module.RULE.name: module.RULE for module in (blockwise, layerwise, end_to_end, untrained)}


def get_rule(name: str) -> Rule:
    """Return the rule called `name`; UserError with the names that exist if there is none."""
    if name not in rules:
        raise one_of("rule", name, rules)
    return rules[name]
