"""Networks against neural recordings: which regime, and which stage, is closest to which cortical area.

    from localsim.analysis import brain

    scores = brain.score("runs/first", "runs/second", recordings="my/v4")
    print(scores)

`score` is where to begin; `load_recordings` says what recordings look like, `METRICS` how closeness is measured, and
`brain_model` makes Brain-Score's BrainModel of a run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localsim.analysis.brain.assemblies import from_assembly as from_assembly
    from localsim.analysis.brain.assemblies import to_assembly as to_assembly
    from localsim.analysis.brain.baselines import BASELINES as BASELINES
    from localsim.analysis.brain.brainscore import brain_model as brain_model
    from localsim.analysis.brain.brainscore import score_benchmark as score_benchmark
    from localsim.analysis.brain.contrasts import differences as differences
    from localsim.analysis.brain.folders import save_recording as save_recording
    from localsim.analysis.brain.loading import load_recordings as load_recordings
    from localsim.analysis.brain.metrics import METRICS as METRICS
    from localsim.analysis.brain.metrics import get_metric as get_metric
    from localsim.analysis.brain.plugin import export_plugin as export_plugin
    from localsim.analysis.brain.recordings import Recording as Recording
    from localsim.analysis.brain.scores import BrainScores as BrainScores
    from localsim.analysis.brain.scoring import score as score

_WHERE = {
    "assemblies": ("from_assembly", "to_assembly"),
    "baselines": ("BASELINES",),
    "brainscore": ("brain_model", "score_benchmark"),
    "contrasts": ("differences",),
    "folders": ("save_recording",),
    "loading": ("load_recordings",),
    "metrics": ("METRICS", "get_metric"),
    "plugin": ("export_plugin",),
    "recordings": ("Recording",),
    "scores": ("BrainScores",),
    "scoring": ("score",),
}
_HOME = {name: module for module, names in _WHERE.items() for name in names}
__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"localsim.analysis.brain.{_HOME[name]}"), name)
    raise AttributeError(f"module 'localsim.analysis.brain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
