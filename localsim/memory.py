"""Counting what autograd holds: the bytes of saved tensors that are alive, now and at the peak."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor


class HeldBytes:
    """A context in which every tensor that autograd saves is counted while its graph keeps it.

    A storage saved several times counts once. Parameters are named as `excluded`: they live anyway. Casts of weights
    that autocast makes are counted, since the graph is what keeps them. Fake tensors, which have no memory, count with
    the bytes that they stand for.

    Attributes:
        now: bytes held at this moment.
        peak: the largest value of `now` so far.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        self._excluded = {_identity(tensor) for tensor in excluded}
        self._count: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)
        self.now = 0
        self.peak = 0

    def __enter__(self) -> HeldBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> _Held:
        # detached: an operation's own output would keep the graph that keeps it alive
        return _Held(tensor.detach(), self)

    def _add(self, tensor: Tensor, step: int) -> None:
        identity = _identity(tensor)
        if identity in self._excluded:
            return
        before = self._count.get(identity, 0)
        self._count[identity] = before + step
        if before + step == 0:
            del self._count[identity]
        if 0 in (before, before + step):
            self.now += step * tensor.untyped_storage().nbytes()
            self.peak = max(self.peak, self.now)


def _identity(tensor: Tensor) -> int:
    # not the address of its data, which tensors without memory have none of (localsim.cost)
    return tensor.untyped_storage()._cdata


class _Held:
    """A saved tensor; counted out when the graph drops it."""

    __slots__ = ("ledger", "tensor")

    def __init__(self, tensor: Tensor, ledger: HeldBytes) -> None:
        self.tensor = tensor
        self.ledger = ledger
        ledger._add(tensor, 1)

    def __del__(self) -> None:
        self.ledger._add(self.tensor, -1)
