"""The geometry of a stage's features: how many dimensions they fill, how classes and views lie in them.

Numbers of dimensions (participation ratio, effective rank) and the slope of the spectrum are those of the images at
hand. They depend on how many images there are, and on nothing more than this with fewer images than dimensions: compare
them at equal n only, and give n with them.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from localsim.analysis.dimensions import (
    SpectrumSlope,
    cvpca,
    effective_rank,
    entropy_rank_of,
    participation_ratio,
    power_law,
    ratio_of,
    spectrum,
    spectrum_slope,
)
from localsim.analysis.probes import bootstrap_interval
from localsim.analysis.separability import (
    ClassSeparability,
    Features,
    UndefinedError,
    alignment,
    checked_features,
    checked_labels,
    checked_views,
    class_separability,
    leave_one_out_hits,
    nearest_class_mean_accuracy,
    separability_of_part,
    shared_variance,
    uniformity,
    uniformity_of_subsets,
    view_distances,
)
from localsim.analysis.statistics import centred_interval, half_samples
from localsim.errors import UserError

__all__ = [
    "ClassSeparability",
    "GeometryRow",
    "SpectrumSlope",
    "alignment",
    "class_separability",
    "cvpca",
    "describe",
    "effective_rank",
    "nearest_class_mean_accuracy",
    "participation_ratio",
    "power_law",
    "shared_variance",
    "spectrum",
    "spectrum_slope",
    "uniformity",
]


@dataclass(frozen=True)
class GeometryRow:
    """One quantity of one stage's features.

    Attributes:
        quantity: its name; the function in this module, or the field of `ClassSeparability`, that defines it.
        value: the estimate from all images.
        low: lower end of its 95 % interval over images, or None where none was asked for or some half of the images
            has no value.
        high: upper end of it.
        n: number of images.
        settings: what it was computed with (ranks of the slope, number of classes or views), JSON-serialisable.
    """

    quantity: str
    value: float
    low: float | None
    high: float | None
    n: int
    settings: dict[str, Any] = field(default_factory=dict)


def describe(
    x: Features,
    labels: Features | None = None,
    views: Features | None = None,
    *,
    resamples: int = 200,
    seed: int = 0,
) -> list[GeometryRow]:
    """Return the geometry of one stage's features `(n, d)` as rows: quantity, value, 95 % interval over images, n.

    `participation_ratio`, `effective_rank`, `spectrum_slope` and `uniformity`. With `labels` `(n,)` also `within_share`
    and `nc1` of `class_separability` (its third number is 1 / within_share - 1) and `nearest_class_mean_accuracy`, each
    image being left out of its class mean. With `views` `(v, n, d)` of the same images also `alignment` and
    `shared_variance`.

    What is not defined for the features at hand is left out, since a stage that has collapsed is a finding and no
    mistake: the slope where fewer than 7 eigenvalues are positive, uniformity where a row is zero and has no direction
    (an image to which no feature responds), alignment where one of a view is, within_share and nc1 where all class
    means are equal. Of features that are the same for all images there are a participation ratio of 0 and, unless they
    are zero, uniformity and alignment. A quantity that some half of the images does not define has no interval.

    The interval is estimate + quantiles of (half - mean of halves), each half being half of the images drawn without
    replacement (delete-half jackknife, Shao & Wu 1989; Saigo et al. 2001): repeated images, as a bootstrap has, would
    lower every rank. It says how far other images would move the number *at this n*; the bias of a finite n is no part
    of it. With fewer images than dimensions the effective rank's interval is too short (in simulations with n = 100,
    d = 150 it held 84 %). Classes of which a half holds fewer than two images are left out of it. The accuracy's
    interval is the bootstrap over its hits. It takes one eigendecomposition per resample, of min(n/2, d) dimensions.

    Args:
        x: features; at least 4 images, 8 for intervals.
        labels: class of each image.
        views: features of v >= 2 augmented views of each image.
        resamples: halves drawn, 20 or more; 0 for no intervals.
        seed: key of the halves.

    Raises:
        UserError: features are not finite or do not fit labels or views, or there are too few images, images per
            class, or resamples.
    """
    x = checked_features(x)
    y = None if labels is None else checked_labels(labels, len(x))
    z = None if views is None else checked_views(views)
    if z is not None and z.shape[1:] != x.shape:
        raise UserError(f"views of {x.shape[0]} images and {x.shape[1]} features must be (v, n, d), not {z.shape}")
    slope = None
    with suppress(UndefinedError):
        slope = spectrum_slope(x)
    settings: dict[str, dict[str, Any]] = {"uniformity": {"t": 2}}
    if slope:
        settings["spectrum_slope"] = {"first": slope.first, "last": slope.last, "r2": slope.r2}
    if y is not None:
        settings["within_share"] = settings["nc1"] = {"classes": len(np.unique(y))}
    if z is not None:
        settings |= {"shared_variance": {"views": len(z)}, "alignment": {"views": len(z), "alpha": 2}}

    every = np.arange(len(x))
    subsets = [every, *(half_samples(len(x), resamples, seed) if resamples else ())]
    ranks = (slope.first, slope.last) if slope else None
    each = [_scalars(x[s], None if y is None else y[s], None if z is None else z[:, s], ranks) for s in subsets]
    values = {name: [one[name] for one in each if name in one] for name in each[0]}
    # these are sums over pairs of images, or over images: each term once for all subsets
    member = np.stack([np.isin(every, subset).astype(float) for subset in subsets], axis=1)
    with suppress(UndefinedError):
        values["uniformity"] = list(uniformity_of_subsets(x, member))
    if z is not None:
        with suppress(UndefinedError):
            values["alignment"] = list(view_distances(z) @ member / member.sum(0))
    rows = []
    for name, (value, *draws) in values.items():
        low, high = centred_interval(value, draws) if resamples and len(draws) == resamples else (None, None)
        rows.append(GeometryRow(name, float(value), low, high, len(x), settings.get(name, {})))
    if y is not None and "effective_rank" in values:  # of equal rows no class mean is nearest
        hits = leave_one_out_hits(x, y)
        low, high = bootstrap_interval(hits, seed=seed) if resamples else (None, None)
        how = {"classes": len(np.unique(y)), "leave_one_out": True}
        rows.append(GeometryRow("nearest_class_mean_accuracy", float(hits.mean()), low, high, len(x), how))
    return rows


def _scalars(
    x: np.ndarray, y: np.ndarray | None, z: np.ndarray | None, ranks: tuple[int, int] | None
) -> dict[str, float]:
    """Return what is computed anew for each half of the images, so far as it is defined.

    The slope is over the ranks chosen for all images.
    """
    values = {"participation_ratio": 0.0}
    with suppress(UndefinedError):
        eigenvalues = spectrum(x)
        values |= {"participation_ratio": ratio_of(eigenvalues), "effective_rank": entropy_rank_of(eigenvalues)}
        if ranks:
            values["spectrum_slope"] = power_law(eigenvalues, first=ranks[0], last=ranks[1]).alpha
    if y is not None:
        with suppress(UndefinedError):
            classes = separability_of_part(x, y)
            values |= {"within_share": classes.within_share, "nc1": classes.nc1}
    if z is not None:
        with suppress(UndefinedError):
            values["shared_variance"] = shared_variance(z)
    return values
