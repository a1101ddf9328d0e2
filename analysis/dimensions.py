"""Dimensions of a cloud of features: its spectrum, and what is read off it.

The part of `localsim.analysis.geometry` that needs features only; import it from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from localsim.analysis.separability import ROUNDING, Features, UndefinedError, checked_features
from localsim.errors import UserError

FEWEST_RANKS = 3


@dataclass(frozen=True)
class SpectrumSlope:
    """The power law l_k = exp(intercept) k^-alpha fitted to ranks first..last of a spectrum, counted from 1.

    Attributes:
        alpha: the exponent.
        intercept: natural logarithm of the fitted first eigenvalue.
        r2: share of the (weighted) variance of log l_k that the line explains; 1 for a spectrum exactly flat.
        first: lowest rank fitted.
        last: highest rank fitted.
    """

    alpha: float
    intercept: float
    r2: float
    first: int
    last: int


def spectrum(x: Features) -> np.ndarray:
    """Return the eigenvalues of the covariance of features `(n, d)`, descending, `(min(n - 1, d),)`.

        Cov = 1/(n - 1) sum_i (x_i - m)(x_i - m)^T

    They come from the smaller of the two Gram matrices; those that are rounding (below max(n, d) eps l_1) are 0. Sample
    eigenvalues are spread more widely than the population's, the more so the fewer images there are.

    Raises:
        UserError: features are not a finite (n, d) matrix of at least 4 images, or do not vary over the images.
    """
    x = checked_features(x)
    _refuse_constant(x)
    values = np.linalg.eigvalsh(_gram(x - x.mean(0)))[::-1][: min(len(x) - 1, x.shape[1])] / (len(x) - 1)
    return np.where(values > max(x.shape) * np.finfo(float).eps * values[0], values, 0.0)


def participation_ratio(x: Features) -> float:
    """Return the participation ratio of features `(n, d)`.

        PR = (sum_k l_k)^2 / sum_k l_k^2,    l_k the eigenvalues of their covariance

    Between 1 (all variance along one line) and min(n - 1, d) (equal in all directions); 0 if all rows are equal. As in
    Halvagal & Zenke 2023 (LPL), Methods, and Gao et al. 2017, bioRxiv 214262. It grows with the number of images: of
    Gaussian features, 1/PR of a sample is about 1/PR of the population + 1/n, so compare at equal n.

    Raises:
        UserError: `x` is not a matrix of finite numbers with at least two rows.
    """
    x = checked_features(x, least=2)
    # sum l = tr C and sum l^2 = tr C^2: no eigenvalues needed; the smaller of the two Gram matrices has the same ones
    gram = _gram(x - x.mean(0))
    spread = np.trace(gram)
    return float(spread**2 / np.square(gram).sum()) if spread > ROUNDING * np.square(x).sum() else 0.0


def effective_rank(x: Features) -> float:
    """Return the effective rank of features `(n, d)`, between 1 and min(n - 1, d).

        erank = exp(-sum_k p_k log p_k),    p_k = s_k / sum_j s_j

    s_k are the *singular values* of the centred features, the square roots of n - 1 times their covariance's
    eigenvalues: not the eigenvalues, whose entropy would give a smaller number. Source: Roy & Vetterli 2007, "The
    effective rank: a measure of effective dimensionality", equations 1-4, for a matrix as it is; centring, ours, makes
    it a property of the cloud and not of where it lies. RankMe (Garrido et al. 2023) is the same of uncentred features.
    It grows with the number of images: compare at equal n.

    Raises:
        UserError: as `spectrum`.
    """
    return entropy_rank_of(spectrum(x))


def power_law(eigenvalues: ArrayLike, *, first: int | None = None, last: int | None = None) -> SpectrumSlope:
    """Fit l_k = c k^-alpha to the ranks first..last of a descending spectrum `(k,)`, such as that of `cvpca`.

    Least squares of log l_k on log k with weights 1/k, so that each octave of ranks counts alike and the many, least
    reliable eigenvalues of the tail do not decide; range and weights after Stringer et al. 2019, "High-dimensional
    geometry of population responses in visual cortex", and its published code, which take ranks 11 to 500 of 2800
    images. By default, with K positive eigenvalues, last = min(500, (K - 1) // 2), since a finite sample or width bends
    the end of the spectrum down, and first = min(11, last // 10) but at least 1: ranks 11 to 500 where they exist, and
    otherwise about a decade. The ranks used are in the result.

    Raises:
        UserError: there are fewer than three ranks to fit, or an eigenvalue among them is not positive.
    """
    eigenvalues = np.asarray(eigenvalues, dtype=np.float64)
    positive = int(np.count_nonzero(eigenvalues > 0))
    # (K - 1) // 2: of half as many images, as an interval takes, the spectrum still has these ranks
    last = min(500, (positive - 1) // 2) if last is None else last
    first = max(1, min(11, last // 10)) if first is None else first
    if not 1 <= first <= last - FEWEST_RANKS + 1 or last > len(eigenvalues):
        raise UndefinedError(
            f"a slope over ranks {first} to {last} is not possible: it needs at least {FEWEST_RANKS} ranks between 1 "
            f"and {len(eigenvalues)} (by default at least 7 positive eigenvalues; there are {positive})"
        )
    fitted = eigenvalues[first - 1 : last]
    if not (fitted > 0).all():
        rank = first + int(np.argmin(fitted > 0))
        raise UndefinedError(
            f"eigenvalue {rank} is {fitted[rank - first]:g}; a slope over ranks {first} to {last} needs > 0"
        )
    rank = np.arange(first, last + 1)
    across, along, weight = np.log(rank), np.log(fitted), 1 / rank
    slope, intercept = np.polyfit(across, along, 1, w=np.sqrt(weight))
    total = (weight * np.square(along - np.average(along, weights=weight))).sum()
    missed = (weight * np.square(along - intercept - slope * across)).sum()
    r2 = 1 - missed / total if total > ROUNDING else 1.0
    return SpectrumSlope(float(-slope), float(intercept), float(r2), first, last)


def spectrum_slope(x: Features, *, first: int | None = None, last: int | None = None) -> SpectrumSlope:
    """Return the power-law exponent of the spectrum of features `(n, d)`: `power_law` of their `spectrum`.

    Ranks `first` to `last` are fitted, by default chosen by the number of eigenvalues and recorded in the result. A
    sample's largest eigenvalues are too large and its last ones too small, which makes alpha too large where n is not
    far above `last`; the noise of a single measurement makes it too small. Where there are two measurements or views
    per image, `power_law(cvpca(x1, x2))` is free of that noise. Compare at equal n, width and ranks.

    Raises:
        UserError: as `spectrum` and `power_law`.
    """
    return power_law(spectrum(x), first=first, last=last)


def cvpca(x1: Features, x2: Features) -> np.ndarray:
    """Return the cross-validated eigenvalues `(min(n - 1, d),)` of two measurements `(n, d)` of the same n images.

        l_k = 1/(n - 1) sum_i (u_k . x1_i)(u_k . x2_i),    u_k the k-th principal axis of x1, both x centred

    What varies independently in the two (trials, or augmentations: then what is left is what the views share) averages
    out, so l_k estimates the variance common to both, and may be negative. Source: Stringer et al. 2019, Methods,
    "cross-validated PCA"; where they average over random assignments of the repeats, the two roles are averaged here.
    In the order of the principal axes: the values need not descend.

    Raises:
        UserError: features are not two finite matrices of one shape of at least 4 images, or do not vary.
    """
    x1, x2 = checked_features(x1, "the first features"), checked_features(x2, "the second features")
    if x1.shape != x2.shape:
        raise UserError(f"two measurements of the same images must be alike in shape, not {x1.shape} and {x2.shape}")
    _refuse_constant(x1)
    _refuse_constant(x2)
    centred = x1 - x1.mean(0), x2 - x2.mean(0)
    both = []
    for one, other in (centred, centred[::-1]):
        # with u = x1^T a / s the norm s drops out, so the eigenvectors a of the smaller Gram matrix serve as well
        wide = len(one) <= one.shape[1]
        axes = np.linalg.eigh(_gram(one))[1][:, ::-1][:, : min(len(one) - 1, one.shape[1])]
        a, b = (one.T @ axes, other.T @ axes) if wide else (one @ axes, other @ axes)
        both.append((a * b).sum(0) / (len(one) - 1))
    return (both[0] + both[1]) / 2


def ratio_of(eigenvalues: np.ndarray) -> float:
    """Return the `participation_ratio` of features with this `spectrum`."""
    return float(eigenvalues.sum() ** 2 / np.square(eigenvalues).sum())


def entropy_rank_of(eigenvalues: np.ndarray) -> float:
    """Return the `effective_rank` of features with this `spectrum`."""
    share = np.sqrt(eigenvalues[eigenvalues > 0])
    share = share / share.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def _gram(centred: np.ndarray) -> np.ndarray:
    return centred @ centred.T if len(centred) <= centred.shape[1] else centred.T @ centred


def _refuse_constant(x: np.ndarray) -> None:
    # what rounding leaves of equal rows is no direction
    if np.square(x - x.mean(0)).sum() <= ROUNDING * np.square(x).sum():
        raise UndefinedError(f"features of {len(x)} images do not vary over the images: they have no spectrum")
