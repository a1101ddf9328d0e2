from pathlib import Path

import pytest
from disturbed import undisturbed_runs


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> dict[str, Path]:
    """A run of every kind that nothing disturbed; not to be changed."""
    return undisturbed_runs(tmp_path_factory)
