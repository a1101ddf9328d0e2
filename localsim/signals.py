"""Signals: boundary gradients on their way down, and which of them travel as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass
class Signal:
    """A boundary gradient at the top of a segment and the credit that its tap (or merged taps) has from here down.

    Attributes:
        row: credit for the stages up to the segment's own.
        grads: for every view, in the shape of the stage's output (under direct feedback the taps' errors).
    """

    row: np.ndarray
    grads: list[Tensor]
    sent: bool = False


def merged(signals: Sequence[Signal], width: int) -> list[Signal]:
    """Return one signal per group whose rows, up to `width`, are proportional; rows of zeros are dropped.

    The product with a Jacobian is linear: such a group travels as one.
    """
    groups: dict[bytes, list[Signal]] = {}
    for signal in signals:
        row = signal.row[:width]
        if row.any():
            groups.setdefault((row / row.max()).tobytes(), []).append(signal)
    whole = []
    for group in groups.values():
        first, *others = group
        grads = first.grads
        for other in others:
            ratio = float(other.row[:width].max() / first.row[:width].max())
            grads = [g + o * ratio for g, o in zip(grads, other.grads, strict=True)]
        whole.append(Signal(first.row, grads))
    return whole


def summed(signals: Sequence[Signal], stage: int) -> Signal:
    """Return the sum of signals weighted with their credit for `stage`."""
    grads = [g * float(signals[0].row[stage]) for g in signals[0].grads]
    for signal in signals[1:]:
        grads = [total + g * float(signal.row[stage]) for total, g in zip(grads, signal.grads, strict=True)]
    return Signal(np.zeros(0), grads)
