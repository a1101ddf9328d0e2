"""localsim: how far must a learning signal travel?

`localsim.run(...)` trains a rule, `localsim.sweep(...)` a grid of them, `localsim.load_run(path)` opens what was kept,
`localsim.load_trunk(path)` as a torchvision network, `localsim.build(...)` returns an untrained network,
`localsim.engine.backward(...)` computes one step's gradients. Everything is imported when it is first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a clone that is not installed, localsim.rules and localsim.analysis stand beside this folder, not inside it.
_here = Path(__file__).resolve().parent
if not (_here / "rules").exists() and (_here.parent / "rules" / "rule.py").is_file():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from localsim import engine as engine
    from localsim.assembly import build as build
    from localsim.credit import Credit as Credit
    from localsim.errors import UserError as UserError
    from localsim.experiment import run as run
    from localsim.interop import load_trunk as load_trunk
    from localsim.runs import load_run as load_run
    from localsim.sweeping import sweep as sweep

_WHERE = {
    "build": "localsim.assembly",
    "Credit": "localsim.credit",
    "UserError": "localsim.errors",
    "run": "localsim.experiment",
    "load_run": "localsim.runs",
    "load_trunk": "localsim.interop",
    "sweep": "localsim.sweeping",
}
__all__ = ["Credit", "UserError", "build", "engine", "load_run", "load_trunk", "run", "sweep"]


def __getattr__(name: str) -> Any:
    if name == "engine":
        return importlib.import_module("localsim.engine")
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'localsim' has no attribute {name!r}")
