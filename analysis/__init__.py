"""What was learned: features, similarity, geometry, probes, plots, of runs and of networks trained elsewhere.

Reads run folders and networks; never imports the trainer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from localsim.analysis import brain as brain
    from localsim.analysis import geometry as geometry
    from localsim.analysis import plots as plots
    from localsim.analysis.comparison import Comparison as Comparison
    from localsim.analysis.comparison import compare as compare
    from localsim.analysis.corrupted_probe import robustness as robustness
    from localsim.analysis.corruptions import corrupt as corrupt
    from localsim.analysis.detection import check_transfer as check_transfer
    from localsim.analysis.detection import detection_model as detection_model
    from localsim.analysis.extraction import feature_batches as feature_batches
    from localsim.analysis.extraction import features as features
    from localsim.analysis.feature_files import load_features as load_features
    from localsim.analysis.feature_files import save_features as save_features
    from localsim.analysis.feature_store import Features as Features
    from localsim.analysis.report import write_report as write_report
    from localsim.analysis.run_geometry import stage_geometry as stage_geometry
    from localsim.analysis.similarity import MEASURES as MEASURES
    from localsim.analysis.similarity import cca as cca
    from localsim.analysis.similarity import cka as cka
    from localsim.analysis.similarity import get_measure as get_measure
    from localsim.analysis.similarity import mutual_knn as mutual_knn
    from localsim.analysis.similarity import predictivity as predictivity
    from localsim.analysis.similarity import procrustes as procrustes
    from localsim.analysis.similarity import pwcca as pwcca
    from localsim.analysis.similarity import rdm as rdm
    from localsim.analysis.similarity import rsa as rsa
    from localsim.analysis.similarity import svcca as svcca
    from localsim.analysis.sources import Source as Source
    from localsim.analysis.stage_probe import probe as probe
    from localsim.analysis.sweeps import SweepTable as SweepTable
    from localsim.analysis.sweeps import sweep_table as sweep_table
    from localsim.analysis.updates import alignment_over_training as alignment_over_training
    from localsim.analysis.updates import gradient_alignment as gradient_alignment

_MODULES = ("brain", "geometry", "plots")
_WHERE = {
    "comparison": ("Comparison", "compare"),
    "corrupted_probe": ("robustness",),
    "corruptions": ("corrupt",),
    "detection": ("check_transfer", "detection_model"),
    "extraction": ("feature_batches", "features"),
    "feature_files": ("load_features", "save_features"),
    "feature_store": ("Features",),
    "report": ("write_report",),
    "similarity": (
        "MEASURES", "cca", "cka", "get_measure", "mutual_knn", "predictivity", "procrustes", "pwcca", "rdm", "rsa",
        "svcca",
    ),
    "sources": ("Source",),
    "run_geometry": ("stage_geometry",),
    "stage_probe": ("probe",),
    "sweeps": ("SweepTable", "sweep_table"),
    "updates": ("alignment_over_training", "gradient_alignment"),
}  # fmt: skip
_HOME = {name: module for module, names in _WHERE.items() for name in names}
__all__ = [*_MODULES, *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"localsim.analysis.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"localsim.analysis.{_HOME[name]}"), name)
    raise AttributeError(f"module 'localsim.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
