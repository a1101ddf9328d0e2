"""Regressions from a layer to neurons, as Brain-Score does them, from one Gram matrix per layer.

No regression here needs the features: with n images, all of them depend on the layer by the inner products of images
`K = X X'` alone. So the features are read once, whatever their number, and every split, region, neuron and interval
shares an n x n matrix. Fitted is the dual `a` `(n_train, q)`: predictions are `K_test,train a + mean(Y)`.

All in float64. Brain-Score's Ridge solves in the features' own precision, so of float32 features its last digits are
those of float32; its PLS and dual ridge are in float64 as here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from localsim.analysis.similarity.kernels import gram, room
from localsim.analysis.similarity.measure import Array, Numerics, as_features, check_shape, varies
from localsim.errors import UserError

ALPHAS = (
    0.01,
    0.1,
    0.5,
    1.0,
    *np.linspace(1e1, 1e2, 4, endpoint=False).tolist(),
    *(alpha for power in (2, 3, 4, 5) for alpha in np.linspace(10**power, 10 ** (power + 1), 18, endpoint=False)),
    *np.linspace(1e6, 1e7, 19).tolist(),
)
"""Penalties among which `ridgecv` chooses: Brain-Score's `ALPHA_LIST`, in its order."""

_EPS = np.finfo(np.float64).eps
_TOLERANCE, _MOST = 1e-6, 500  # scikit-learn's, of PLSRegression
_EXHAUSTED = 1e-13  # of a variance: what float64 leaves of a direction that the features do not have
_NEURONS = 128  # whose products are held at a time
_ROUGH, _NEAR = 1e-6, 1e-4  # of errors of penalties: what is left out, and up to where they are compared exactly
_KEPT = 10  # eigendecompositions kept at a time: Brain-Score's splits of one layer
_KEPT_IMAGES = 2500  # above, 10 of them are more than 0.5 GB and are made anew for every region


@dataclass(frozen=True, eq=False)
class Layer:
    """Inner products of images, which is all that a regression needs of a layer.

    Attributes:
        gram: `(n, n)` float64, of features with their mean over images removed.
        features: how many there are, p.
    """

    gram: np.ndarray
    features: int

    @classmethod
    def of(cls, features: Array, *, device: str | torch.device | None = None) -> Layer:
        """Return the Gram matrix of features `(n, p)`, read in chunks of columns.

        Raises:
            UserError: features that are constant, not finite, no table, or of too many images for one matrix.
        """
        x = as_features(features)
        check_shape(x)
        where = Numerics.of(x, device, "float64")
        room(len(x), where)
        return cls(gram(x, where).cpu().numpy(), x.shape[1])

    def __len__(self) -> int:
        return len(self.gram)

    def take(self, images: np.ndarray) -> Layer:
        """Return the layer's response to some of the images, by their places."""
        return Layer(self.gram[np.ix_(images, images)], self.features)

    def fold(self, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return `K` `(n_train, n_train)` and `K_test,train`, of features with their mean over `train` removed.

        Raises:
            UserError: all images to fit look the same to the layer.
        """
        rows = self.gram[train]
        kernel = rows[:, train]
        size = float(np.trace(kernel))
        across = rows[:, test].T
        means = kernel.mean(0)
        total = means.mean()
        kernel = kernel - (means - total)
        kernel -= means[:, None]
        varies(float(np.trace(kernel)), size)
        return kernel, across - (across.mean(1)[:, None] - total) - means


def pls(kernel: np.ndarray, targets: np.ndarray, components: int) -> np.ndarray:
    """Return the dual of partial least squares, equal to scikit-learn's PLSRegression(components, scale=False).

        v <- M v  until |w - w_before|^2 < 1e-6,   M = Y' K Y,  w = X'Y v / |X'Y v|,  v from Y's first column
        t = X w;   Y <- Y - t t'Y / t't;   X <- X - t t'X / t't                      for every component

    Wegelin 2000, section 4.1, in the kernel form of Rosipal & Trejo 2001, J. Mach. Learn. Res. 2:97. The loose stop is
    part of the result: where M's first two eigenvalues are close, the component depends on the start. With orthonormal
    scores t as T, deflating X is the same as deflating K Y: `X_d' Y_d = X' Y_d`.

    Where no direction is left that the features have, the fit ends; scikit-learn goes on with what rounding leaves.

    Args:
        kernel: `(n, n)`, centred.
        targets: `(n, q)`, centred.
        components: how many.
    """
    # of more neurons than images, n combinations hold all: Y = Z B with B B' = I, and v = B' v_Z
    basis, left = np.eye(targets.shape[1]), targets.copy()
    if targets.shape[1] > len(targets):
        basis, left = (part.T for part in np.linalg.qr(targets.T))
    products = kernel @ left
    size = float(np.trace(kernel))
    scores, weights, images = (np.zeros((components, len(kernel))) for _ in range(3))
    found = 0
    for found in range(components):
        known = scores[:found]
        start = next((j for j, y in enumerate(targets.T) if np.abs(y - (known @ y) @ known).max() >= 10 * _EPS), None)
        if start is None:
            break
        direction = _leading(left.T @ products, basis[:, start])
        if direction is None:
            break
        weights[found] = left @ direction
        images[found] = score = products @ direction
        before = np.linalg.norm(score)
        for _ in range(2):
            score = score - known.T @ (known @ score)
        length = np.linalg.norm(score)
        # |X'u|^2 = 1 for the u in `weights`
        if weights[found] @ weights[found] * size * _EXHAUSTED >= 1 or length <= 1e-10 * before:
            break
        scores[found] = score = score / length
        loadings = score @ left
        left -= np.outer(score, loadings)
        products -= np.outer(kernel @ score, loadings)
    else:
        found = components
    from scipy.linalg import solve_triangular

    scores, weights, images = scores[:found], weights[:found], images[:found]
    if not found:
        return np.zeros_like(targets)
    return weights.T @ solve_triangular(scores @ images.T, scores @ targets)


def _leading(cross: np.ndarray, start: np.ndarray) -> np.ndarray | None:
    """Return v `(q,)` with v' M v = 1 where scikit-learn's power method stops; None where M sends the start to 0."""
    v, before = start.copy(), None
    for _ in range(_MOST):
        product = cross @ v
        square = v @ product
        if not square > 0:
            return None
        v /= square**0.5
        product /= square**0.5
        if len(v) == 1 or (before is not None and 2 - 2 * (before @ product) < _TOLERANCE):
            break
        before, v = v, product
    return v


def ridge(kernel: np.ndarray, targets: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """Return the dual of ridge regression, `(K + alpha I)^-1 Y`, of a centred kernel and centred targets."""
    from scipy.linalg import solve

    return solve(kernel + alpha * np.eye(len(kernel)), targets, assume_a="pos")


def ridgecv(values: np.ndarray, vectors: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the dual of ridge regression, and its penalty: the one with the least leave-one-out error.

        error(alpha) = mean over images and neurons of (c / d)^2,   c = G^-1 Y,  d = diag(G^-1),  G = K + alpha I

    with the intercept's direction taken out of G^-1 (Rifkin & Lippert 2007, MIT-CSAIL-TR-2007-025): scikit-learn's
    RidgeCV. One penalty for all neurons; of equal errors, the first of `ALPHAS` counts.

    Of all penalties together, c is Q W, W the columns of 1 / (eigenvalue + alpha): smooth in alpha, and so, to six
    digits, of a rank r of about 20. So r products with Q, in float32, tell which penalties may be the best; of these
    alone errors are computed in float64.

    Args:
        values, vectors: eigenvalues `(n - 1,)` and eigenvectors `(n, n - 1)` of the centred kernel, less the constant.
        targets: `(n, q)`, centred.
    """
    alphas = np.asarray(ALPHAS)
    z = vectors.T @ targets
    shrunk = 1 / (values[:, None] + alphas)
    scale = shrunk.max(0)  # else errors of large penalties would be lost beside those of small ones
    inverse = np.square(vectors) @ (shrunk / scale)  # d, in these units
    rough = _errors(vectors.astype(np.float32), z.astype(np.float32), shrunk / scale, inverse)
    near = np.flatnonzero(rough <= rough.min() * (1 + _NEAR))
    duals = [vectors @ (shrunk[:, place, None] * z) for place in near]
    errors = [
        np.square(dual / (inverse[:, place, None] * scale[place])).mean()
        for dual, place in zip(duals, near, strict=True)
    ]
    best = int(np.argmin(errors))
    return duals[best], float(alphas[near[best]])


def _errors(vectors: np.ndarray, z: np.ndarray, shrunk: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """Return the leave-one-out error of every penalty `(penalties,)`, to the precision of float32.

    Args:
        vectors: `(n, n - 1)`.
        z: targets on these `(n - 1, q)`.
        shrunk: W, each column in units of its own `(n - 1, penalties)`.
        inverse: d, in these units `(n, penalties)`.
    """
    basis, singular, mixing = np.linalg.svd(shrunk, full_matrices=False)
    rank = int((singular > _ROUGH * singular[0]).sum())
    basis, mixing = basis[:, :rank].astype(z.dtype), (singular[:rank, None] * mixing[:rank]).astype(z.dtype)
    parts = np.stack([vectors @ (column[:, None] * z) for column in basis.T], axis=1)  # (n, r, q)
    inner = parts @ parts.transpose(0, 2, 1)  # (n, r, r)
    squares = np.einsum("nra,ra->na", inner @ mixing, mixing, optimize=True)
    return (squares / inverse**2).mean(0)


@lru_cache(maxsize=_KEPT)
def _kept(layer: Layer, train: bytes) -> tuple[np.ndarray, np.ndarray]:
    return decompose(layer.fold(np.frombuffer(train, dtype=np.int64), np.arange(0))[0])


def decomposed(layer: Layer, train: np.ndarray, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `decompose(kernel)`, from memory where another region has asked for it last."""
    if len(train) > _KEPT_IMAGES:
        return decompose(kernel)
    return _kept(layer, train.astype(np.int64).tobytes())


def decompose(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues `(n - 1,)` and eigenvectors `(n, n - 1)` of a centred kernel, orthogonal to the constant.

    Added with a weight larger than any eigenvalue, the constant is the last eigenvector, and mixes with no other.
    """
    n = len(kernel)
    largest = np.abs(kernel).sum(0).max()
    from scipy.linalg import eigh

    values, vectors = eigh(kernel + 2 * largest / n, overwrite_a=True, check_finite=False, driver="evd")
    return np.clip(values[:-1], 0, None), vectors[:, :-1]


def check_components(components: int, train: int, features: int) -> None:
    """Raise UserError where PLS cannot have that many components."""
    most = min(train, features)
    if components > most:
        raise UserError(
            f"{components} PLS components are more than {train} images to fit and {features} features allow; "
            f"allowed: {most} or fewer"
        )
