"""Counting the arithmetic of whatever runs: convolutions and matrix products, by torch's own formulas."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker


class Arithmetic(TorchDispatchMode):
    """A context that counts FLOPs, two for every multiplication and addition; what torch.compile has fused is not seen.

    Attributes:
        forward: FLOPs of what ran outside backward passes.
        backward: FLOPs of backward passes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0
        # only asked whether a backward pass runs: entered, as in torch's FlopCounterMode, it forbids `autograd.grad`
        # with respect to leaves
        self._tracker = ModuleTracker()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            number = formula(*args, **kwargs, out_val=out)
            if self._tracker.is_bw:
                self.backward += number
            else:
                self.forward += number
        return out
