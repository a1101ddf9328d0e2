"""Layers and recordings compared by what is n x n: dissimilarities (rdm, rsa) and inner products (cka) of images.

Both comparisons are a correlation of pairs of images: Spearman's is that of ranks, unbiased CKA that of U-centred inner
products. So a layer is what gives the pairs of any images as a vector of length 1, and a score is an inner product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import torch

from localsim.analysis.brain.regression import Layer
from localsim.analysis.similarity.dissimilarity import rdm
from localsim.analysis.similarity.kernels import room, u_centre_
from localsim.analysis.similarity.measure import Array, Numerics, as_features, check_shape
from localsim.errors import UserError


class Matrix(Protocol):
    """A layer, by pairs of images."""

    def __len__(self) -> int: ...

    def take(self, images: np.ndarray) -> Matrix: ...

    def unit(self, images: np.ndarray | None = None) -> np.ndarray:
        """Return the pairs of some images `(m (m - 1) / 2,)`, of mean 0 and length 1."""
        ...


@dataclass(frozen=True, eq=False)
class Dissimilarities:
    """RDM of a layer `(n, n)`, float64, compared by the ranks of its pairs."""

    matrix: np.ndarray

    @classmethod
    def of(cls, features: Array, *, device: str | torch.device | None = None) -> Dissimilarities:
        """Return 1 - Pearson's r of every two images over features `(n, p)`, read in chunks of columns.

        Raises:
            UserError: features that are constant or not finite, or an image whose features are all equal.
        """
        x = as_features(features)
        check_shape(x)
        room(len(x), Numerics.of(x, device, "float64"))
        return cls(rdm(x, "correlation", device=device, dtype="float64"))

    def __len__(self) -> int:
        return len(self.matrix)

    def take(self, images: np.ndarray) -> Dissimilarities:
        """Return the RDM of some of the images, by their places."""
        return Dissimilarities(_square(self.matrix, images))

    def unit(self, images: np.ndarray | None = None) -> np.ndarray:
        """Return the ranks of pairs of some images, of mean 0 and length 1.

        The ranks among some pairs follow by counting from the order of all: nothing is sorted twice.

        Raises:
            UserError: all distances are equal.
        """
        codes, number = self._codes
        return _ranks(upper(codes if images is None else _square(codes, images)), number, "this layer")

    @cached_property
    def _codes(self) -> tuple[np.ndarray, int]:
        """Place of every distance among the different distances, `(n, n)`, and how many of these there are."""
        n = len(self.matrix)
        values, places = np.unique(upper(self.matrix), return_inverse=True)
        codes = np.zeros((n, n), dtype=np.int32)
        codes[np.triu_indices(n, 1)] = places
        return codes + codes.T, len(values)


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products of images `(n, n)`, float64, compared by unbiased CKA.

    Of float32 features, Brain-Score's CKA is in float32, and differs by about 1e-6; it also adds 1e-12 to its
    denominator, which is felt where responses are tiny.
    """

    layer: Layer

    @classmethod
    def of(cls, features: Array, *, device: str | torch.device | None = None) -> Products:
        """Return the Gram matrix of features `(n, p)`; see `Layer.of`."""
        return cls(Layer.of(features, device=device))

    def __len__(self) -> int:
        return len(self.layer)

    def take(self, images: np.ndarray) -> Products:
        """Return those of some of the images, by their places."""
        return Products(self.layer.take(images))

    def unit(self, images: np.ndarray | None = None) -> np.ndarray:
        """Return the U-centred products of pairs of some images, of mean 0 and length 1.

        Raises:
            UserError: every image is as far from every other.
        """
        kernel = self.layer.gram
        return u_centred(kernel.copy() if images is None else _square(kernel, images), "this layer")


def u_centred(kernel: np.ndarray, whose: str) -> np.ndarray:
    """Return the pairs of a kernel `(n, n)`, which is changed, U-centred and of length 1.

    The inner product of two is the ratio HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) of Song et al.'s unbiased estimators.
    """
    return _unit(upper(u_centre_(torch.from_numpy(kernel)).numpy()), whose, centre=False)


def ranks(distances: np.ndarray, whose: str) -> np.ndarray:
    """Return the ranks of distances `(pairs,)`, ties at their mean, of mean 0 and length 1."""
    values, places = np.unique(distances, return_inverse=True)
    return _ranks(places, len(values), whose)


def _ranks(places: np.ndarray, number: int, whose: str) -> np.ndarray:
    counts = np.bincount(places, minlength=number)
    middle = np.cumsum(counts, dtype=np.float64)
    middle -= counts / 2
    return _unit(middle.take(places), whose)


def _square(matrix: np.ndarray, images: np.ndarray) -> np.ndarray:
    return matrix.take(images, axis=0).take(images, axis=1)


def _unit(values: np.ndarray, whose: str, *, centre: bool = True) -> np.ndarray:
    if centre:
        values -= values.mean()
    length = np.linalg.norm(values)
    if not length > 0:
        raise UserError(f"to {whose} every image is as far from every other, so there is nothing to compare")
    values /= length
    return values


def upper(matrix: np.ndarray) -> np.ndarray:
    """Return the pairs above the diagonal, row after row."""
    return matrix.reshape(-1).take(_places(len(matrix)))


@lru_cache(maxsize=2)
def _places(n: int) -> np.ndarray:
    first, second = np.triu_indices(n, 1)
    return first * n + second


def response_rdm(responses: np.ndarray, whose: str) -> np.ndarray:
    """Return the pairs of the RDM `1 - r` of responses `(n, neurons)`, as Brain-Score's `RDM` computes it.

    Raises:
        UserError: fewer than 2 neurons, or an image to which all neurons respond alike.
    """
    if responses.shape[1] < 2:
        raise UserError(f"{whose} has 1 neuron, over which images have no correlation; allowed: 2 neurons or more")
    found = np.flatnonzero(silent(responses))
    if len(found):
        raise UserError(
            f"all neurons of {whose} give the same response to image {found[0] + 1}, which has no correlation with "
            f"others; leave out {len(found)} such {'image' if len(found) == 1 else 'images'}, or use cka"
        )
    return upper(1 - np.corrcoef(responses))


def silent(responses: np.ndarray) -> np.ndarray:
    """Return which images `(n,)` all neurons respond to alike."""
    return (responses == responses[:, :1]).all(1)
