"""The one way in which a loss may leave something out of its gradient."""

from __future__ import annotations

from torch import Tensor


def constant(x: Tensor) -> Tensor:
    """Return `x` as a constant of the loss: same values, no gradient through it.

    For heads and objectives whose published form holds a term fixed (CLAPP's asymmetric predictor, targets of a
    reconstruction). It works inside a tap only; what a tap's loss may change in the trunk the credit matrix says.
    """
    return x.detach()
