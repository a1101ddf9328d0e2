"""How alike two representational dissimilarity matrices are, given their pairs above the diagonal.

All but Kendall's are the cosine of two vectors that are made once per layer; a pair of layers costs one inner product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localsim.analysis.similarity.dissimilarity import image_count, rows
from localsim.errors import UserError

_PIECE = 2**20  # numbers that are summed in float64 at a time


@dataclass(frozen=True, kw_only=True)
class Comparator:
    """One way to compare RDMs.

    Attributes:
        words: what it is, in a few words.
        source: paper and section.
        prepare: pairs `(n (n - 1) / 2,)` of one layer to what is compared.
        compare: two of those to a number.
        centred: whether a factor and an offset common to all distances are both ignored, so that unrelated layers
            score 0 on average; otherwise only the factor is.
        squared: whether it is meant for squared distances only.
    """

    words: str
    source: str
    prepare: Callable[[Tensor], Any]
    compare: Callable[[Any, Any], float]
    centred: bool
    squared: bool = False


def ranks(pairs: Tensor) -> Tensor:
    """Return ranks, ties averaged, less their mean, at unit length.

    They are whole or half numbers up to the number of pairs, which float32 stops telling apart at 2^24 (n = 5794); so
    they are made in float64, and rounded once centred and scaled.
    """
    order, ordered = _sorted(pairs)
    begins = torch.ones(len(pairs), dtype=torch.bool, device=pairs.device)
    torch.ne(ordered[1:], ordered[:-1], out=begins[1:])
    first = begins.nonzero().flatten()
    counts = torch.diff(first, append=first.new_tensor([len(pairs)]))
    middle = first.double().add_(counts, alpha=0.5).sub_(len(pairs) / 2)
    middle /= math.sqrt(float((counts * middle.square()).sum()))
    result = torch.empty_like(pairs)
    result[order] = middle.to(pairs.dtype).repeat_interleave(counts)
    return result


def _sorted(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the order of values `(m,)`, and something that is sorted and tied as they are."""
    if values.is_cuda or values.dtype != torch.float32:
        ordered, order = values.sort()
        return order, ordered
    # Several times faster: the bits of a float, as an integer that sorts alike, before its index, and numpy's sort.
    bits = (values + 0.0).numpy().view(np.int32)  # + 0.0: makes no difference but between -0.0 and 0.0
    keys = np.empty((len(values), 2), dtype="<i4")
    keys[:, 1] = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys[:, 0] = np.arange(len(values), dtype=np.uint32).view(np.int32)
    keys.view("<i8").sort(axis=0)
    return torch.from_numpy(keys[:, 0].astype(np.int64)), torch.from_numpy(keys[:, 1].copy())


def whitened(pairs: Tensor) -> Tensor:
    """Return the Gram matrix of squared distances, as a vector with the same inner products, at unit length.

        G = -1/2 J D J,  J = I - 1/n;    (sqrt(2) G_ij for i < j, and G_ii)

    The distances of one image covary, by V = (C C') o (C C') with C the contrasts of all pairs, for noise that is equal
    and independent over images. The inner product d' V^-1 d' of distances is that of these vectors, up to a factor.
    """
    n, count = image_count(pairs), len(pairs)
    means = torch.zeros(n, dtype=torch.float64, device=pairs.device)
    for i, row in rows(pairs):
        means[i] += row.sum(dtype=torch.float64)
        means[i + 1 :] += row
    means /= n
    middle = means.mean()
    result = pairs.new_empty(count + n)
    for (i, row), (_, out) in zip(rows(pairs), rows(result[:count]), strict=True):
        out.copy_((row - means[i] - means[i + 1 :] + middle) * math.sqrt(2))
    result[count:] = middle - 2 * means
    return _unit(result)


def _unit(vector: Tensor) -> Tensor:
    return vector / math.sqrt(_inner(vector, vector))


def _centred(vector: Tensor) -> Tensor:
    return vector - vector.mean(dtype=torch.float64).to(vector.dtype)


def _inner(a: Tensor, b: Tensor) -> float:
    """Return <a, b>; in float64, since millions of float32 products of one sign would lose digits."""
    pieces = zip(a.split(_PIECE), b.split(_PIECE), strict=True)
    return float(sum(torch.dot(left.double(), right.double()) for left, right in pieces))


def _cosine(a: Tensor, b: Tensor) -> float:
    """Return the inner product of unit vectors, within [-1, 1] also after rounding."""
    return min(1.0, max(-1.0, _inner(a, b)))


def _varied(pairs: Tensor) -> Tensor:
    """Return the pairs, or raise UserError where they differ by rounding only."""
    low, high = (float(edge) for edge in torch.aminmax(pairs))
    if not high - low > 16 * torch.finfo(pairs.dtype).eps * max(abs(low), abs(high)):
        raise UserError(
            f"all pairs of images are equally dissimilar (distances between {low:.6g} and {high:.6g}), so there is "
            "nothing to correlate; allowed: other images, or the cosine comparator"
        )
    return pairs


def _counted(pairs: Tensor) -> tuple[np.ndarray, float]:
    """Return the pairs, and the share of pairs of pairs that are not tied."""
    values = _varied(pairs).cpu().numpy()
    ordered = np.sort(values)
    ends = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1], True])
    counts = np.diff(ends)
    return values, 1 - int((counts * (counts - 1) // 2).sum()) / math.comb(len(values), 2)


def _tau_a(a: tuple[np.ndarray, float], b: tuple[np.ndarray, float]) -> float:
    """Return Kendall's tau-a = (concordant - discordant) / all, in O(N log N), from scipy's tau-b.

    tau-b = tau-a / sqrt(u v), with u and v the shares that are not tied in the one and in the other.
    """
    from scipy import stats

    (x, untied_x), (y, untied_y) = a, b
    tau_b: Any = stats.kendalltau(x, y, method="asymptotic")[0]  # the method is that of the unused p-value
    return float(tau_b * math.sqrt(untied_x * untied_y))


_NILI = "Nili et al. 2014, PLoS Comput. Biol. 10:e1003553"
_DIEDRICHSEN = "Diedrichsen et al. 2021, Neurons Behav. Data Anal. Theory 5(3), arXiv 2007.02789"

COMPARATORS: dict[str, Comparator] = {
    "spearman": Comparator(
        words="Spearman's rank correlation",
        source="Kriegeskorte et al. 2008, Front. Syst. Neurosci. 2:4",
        prepare=lambda pairs: ranks(_varied(pairs)),
        compare=_cosine,
        centred=True,
    ),
    "pearson": Comparator(
        words="Pearson's correlation",
        source=_NILI,
        prepare=lambda pairs: _unit(_centred(_varied(pairs))),
        compare=_cosine,
        centred=True,
    ),
    "kendall": Comparator(
        words="Kendall's rank correlation tau-a, below 1 where distances are tied",
        source=_NILI,
        prepare=_counted,
        compare=_tau_a,
        centred=True,
    ),
    "cosine": Comparator(words="cosine", source=_DIEDRICHSEN, prepare=_unit, compare=_cosine, centred=False),
    "whitened_cosine": Comparator(
        words="cosine, whitened for what distances of the same image share",
        source=_DIEDRICHSEN,
        prepare=whitened,
        compare=_cosine,
        centred=False,
        squared=True,
    ),
    "whitened_pearson": Comparator(
        words="Pearson's correlation, whitened for what distances of the same image share",
        source=_DIEDRICHSEN,
        prepare=lambda pairs: whitened(_centred(_varied(pairs))),
        compare=_cosine,
        centred=True,
        squared=True,
    ),
}
