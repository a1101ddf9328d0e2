"""Representational similarity analysis: do two layers find the same images different?

Every layer is reduced to the dissimilarities of all pairs of images (`dissimilarity`), and these are compared
(`comparators`). A measure is a choice of one of each; what can be said of it follows from the two.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from localsim.analysis.similarity.comparators import COMPARATORS
from localsim.analysis.similarity.dissimilarity import KINDS, REPEATED, pairs_of, take_pairs
from localsim.analysis.similarity.measure import Array, Measure, Precision
from localsim.errors import UserError, one_of

SQUARED = tuple(kind for kind in KINDS if kind != "euclidean")
"""Kinds that are squared distances; 1 - r and 1 - cos are, of features scaled to one length."""

# A factor common to all features is none of the RDM's, or common to all distances, which every comparator ignores.
# Shrinkage keeps the noise-normalised kinds from being invariant to every linear map.
_INVARIANCES = {
    "correlation": {"scale"},
    "cosine": {"scale", "orthogonal"},
    "euclidean": {"scale", "orthogonal", "translation"},
    "sqeuclidean": {"scale", "orthogonal", "translation"},
    "mahalanobis": {"scale", "orthogonal", "translation"},
    "crossnobis": {"scale", "orthogonal", "translation"},
}
# one object per kind, so that measures of one kind can be seen to share what stands for a layer
_REPRESENT = {kind: partial(pairs_of, kind=kind) for kind in KINDS}


def representational_similarity(rdm: str = "correlation", comparator: str = "spearman") -> Measure:
    """Return the measure that compares RDMs of one kind by one comparator.

    Raises:
        UserError: unknown kind or comparator, or a whitened comparator of distances that are not squared.
    """
    if rdm not in KINDS:
        raise one_of("kind of RDM", rdm, KINDS)
    if comparator not in COMPARATORS:
        raise one_of("comparator of RDMs", comparator, COMPARATORS)
    chosen = COMPARATORS[comparator]
    if chosen.squared and rdm not in SQUARED:
        raise UserError(f"{comparator} compares squared distances, not {rdm} ones; allowed: {', '.join(SQUARED)}")
    return Measure(
        name=f"rsa_{rdm}_{comparator}",
        summary=f"How alike two layers' {rdm} distances between images are: {chosen.words}.",
        source=chosen.source,
        kind="similarity",
        # distances that cannot be negative, and their Gram matrices, have no negative cosine
        low=-1.0 if chosen.centred or rdm == "crossnobis" else 0.0,
        high=1.0,
        symmetric=True,
        metric=False,
        # the images of one layer put in another order leave centred distances 0 in common, on average over orders
        bias="debiased" if chosen.centred else "biased",
        invariances=frozenset(_INVARIANCES[rdm]),
        represent=_REPRESENT[rdm],
        take=take_pairs,
        transform=chosen.prepare,
        compare=chosen.compare,
        repeats=rdm in REPEATED,
    )


def rsa(
    x: Array,
    y: Array,
    *,
    rdm: str = "correlation",
    comparator: str = "spearman",
    device: str | torch.device | None = None,
    dtype: Precision | None = None,
) -> float:
    """Return the representational similarity of two layers: how alike their dissimilarities of images are.

        rsa(x, y) = comparator over i < j of (D_ij(x), D_ij(y)),    D the RDMs; 1 if they agree, -1 at least

    Kriegeskorte, Mur & Bandettini 2008, Front. Syst. Neurosci. 2:4; comparators in Nili et al. 2014, PLoS Comput. Biol.
    10:e1003553, and Diedrichsen et al. 2021, arXiv 2007.02789. A similarity, symmetric, unchanged by a factor; by
    rotations too, unless the RDM is `correlation`; and by offsets, unless it is `correlation` or `cosine`. Unrelated
    layers score 0 on average, except by `cosine` and `whitened_cosine`: these two range from 0 to 1 (from -1 for
    `crossnobis`), and `whitened_cosine` of `sqeuclidean` RDMs is linear CKA.

    Args:
        x, y: features `(n, p)` and `(n, q)`; for `mahalanobis` and `crossnobis` `(repeats, n, p)`; arrays (also
            memory-mapped) or tensors.
        rdm: `correlation`, `euclidean`, `sqeuclidean`, `cosine`, `mahalanobis` or `crossnobis`; equations in
            `dissimilarity.rdm`.
        comparator: `spearman`, `pearson`, `kendall` (tau-a), `cosine`, `whitened_cosine` or `whitened_pearson`; the
            last two compare squared distances, which are all but `euclidean`.
        device: where to compute; by default where `x` is.
        dtype: `float32` or `float64`; by default float64 where `x` is, else float32.

    Raises:
        UserError: unknown or unfit choices; fewer than 4 images, another number of images, constant or non-finite
            features, or distances that are all equal.
    """
    return representational_similarity(rdm, comparator)(x, y, device=device, dtype=dtype)


_ALL = tuple(
    representational_similarity(kind, name)
    for kind in KINDS
    for name, comparator in COMPARATORS.items()
    if kind in SQUARED or not comparator.squared
)
MEASURES: tuple[Measure, ...] = (replace(representational_similarity(), name="rsa"), *_ALL)
"""`rsa`, which is correlation distance and Spearman's correlation, and every combination by its name."""
