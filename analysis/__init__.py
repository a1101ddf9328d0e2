"""What was learned: features, probes, plots. Reads run folders and networks; never imports the trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localsim.analysis import plots as plots
    from localsim.analysis.stage_probe import probe as probe

_WHERE = {"probe": "localsim.analysis.stage_probe"}
__all__ = ["plots", "probe"]


def __getattr__(name: str) -> Any:
    if name == "plots":
        return importlib.import_module("localsim.analysis.plots")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'localsim.analysis' has no attribute {name!r}")
