"""Imports the scripts in benchmarks/, which are no package."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark(request):
    """The script whose name a test file gives in `SCRIPT`; other scripts can be imported as long as it is there."""
    sys.path.insert(0, str(FOLDER))  # also that of the processes it starts
    yield import_module(request.module.SCRIPT)
    sys.path.remove(str(FOLDER))
    for path in FOLDER.glob("*.py"):  # their names are common ones
        sys.modules.pop(path.stem, None)
