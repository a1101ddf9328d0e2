"""What all tests share."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Many small problems: more threads only wait for each other, and one thread gives the same bits everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def registries_stay_as_they_are() -> Iterator[None]:
    """What a test registers is taken away again: listings would meet it in other tests."""
    from localsim import rules
    from localsim.own_backbones import REGISTERED
    from localsim.rules.heads import HEADS
    from localsim.rules.objectives import OBJECTIVES

    rules._all_rules()
    tables: list[dict[str, Any]] = [rules._rules, rules._sources, OBJECTIVES, HEADS, REGISTERED]
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)
