"""Measures of how alike two layers are: one signature, declared properties.

`MEASURES` has them by name; `get_measure(name)` says what exists where there is no such name. Every measure takes
features `(n, p)` and `(n, q)` of the same images and returns a float; `similarity` adds an interval over images and a
chance level.
"""

from __future__ import annotations

from localsim.analysis.similarity import (
    alignment,
    canonical,
    latent,
    neighbours,
    prediction,
    representational,
    shape,
)
from localsim.analysis.similarity.alignment import cka
from localsim.analysis.similarity.canonical import cca, pwcca, svcca
from localsim.analysis.similarity.dissimilarity import rdm
from localsim.analysis.similarity.measure import INVARIANCES, Measure
from localsim.analysis.similarity.neighbours import mutual_knn
from localsim.analysis.similarity.prediction import predictivity
from localsim.analysis.similarity.representational import rsa
from localsim.analysis.similarity.scoring import Score, score_pairs, similarity
from localsim.analysis.similarity.shape import procrustes
from localsim.errors import one_of

__all__ = [
    "INVARIANCES", "MEASURES", "Measure", "Score", "cca", "cka", "get_measure", "mutual_knn", "predictivity",
    "procrustes", "pwcca", "rdm", "rsa", "score_pairs", "similarity", "svcca",
]  # fmt: skip

_FAMILIES = (alignment, representational, shape, canonical, prediction, latent, neighbours)
MEASURES: dict[str, Measure] = {measure.name: measure for family in _FAMILIES for measure in family.MEASURES}
"""All named measures."""


def get_measure(name: str) -> Measure:
    """Return the measure `name`; UserError naming those that exist."""
    if name not in MEASURES:
        raise one_of("measure", name, MEASURES)
    return MEASURES[name]
