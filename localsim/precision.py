"""The precisions in which networks run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from localsim.errors import one_of

PRECISIONS = ("full", "bf16")


def autocast(precision: str, device_type: str) -> Callable[[], AbstractContextManager]:
    """Return a maker of the context in which `full` or `bf16` forward passes run.

    Raises:
        UserError: another word.
    """
    if precision not in PRECISIONS:
        raise one_of("precision", precision, PRECISIONS)
    if precision == "full":
        return nullcontext
    return lambda: torch.autocast(device_type, dtype=torch.bfloat16)


def at_least_float32(z: Tensor) -> Tensor:
    """Return half-precision numbers in float32, and others as they are."""
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
