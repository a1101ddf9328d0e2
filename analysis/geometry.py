"""The shape of a cloud of features: how many dimensions does it fill?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def participation_ratio(x: ArrayLike) -> float:
    """Return the participation ratio of features `(n, d)`.

        PR = (sum_k l_k)^2 / sum_k l_k^2,    l_k the eigenvalues of their covariance

    Between 1 (all variance along one line) and min(n - 1, d) (equal in all directions); 0 if all rows are equal. As in
    Halvagal & Zenke 2023 (LPL), Methods, and Gao et al. 2017, bioRxiv 214262.

    Raises:
        ValueError: `x` is not a matrix of finite numbers with at least two rows.
    """
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2 or not np.isfinite(x).all():
        raise ValueError(f"features must be a finite (n, d) matrix with n >= 2, not of shape {x.shape}")
    centred = x - x.mean(0)
    # sum l = tr C and sum l^2 = tr C^2: no eigenvalues needed; the smaller of the two Gram matrices has the same ones
    gram = centred @ centred.T if len(x) <= x.shape[1] else centred.T @ centred
    spread = np.trace(gram)
    # what rounding leaves of equal rows is no direction
    return float(spread**2 / np.square(gram).sum()) if spread > 1e-24 * np.square(x).sum() else 0.0
