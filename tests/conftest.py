"""What all tests share."""

from collections.abc import Iterator

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
def rules_stay_as_they_are() -> Iterator[None]:
    """Rules that a test adds are taken away again: listings of all rules would meet them in other tests."""
    from localsim import rules

    rules._all_rules()
    before = dict(rules._rules), dict(rules._sources)
    yield
    for now, then in zip((rules._rules, rules._sources), before, strict=True):
        now.clear()
        now.update(then)
