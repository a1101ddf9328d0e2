"""The processes that share every batch: what they tell each other so that together they compute one process's step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Finish = Callable[[], list[Tensor]]


class Peers:
    """Processes of which each has some rows of every batch (data-parallel).

    Every method is called by all of them, in the same order. The rows of a batch lie on the processes in the order of
    their ranks, and need not be equally many.

    Args:
        group: the torch process group for what a step waits for.
        late_group: a group of the same processes for gradients that travel while the step goes on.
        rank: this process's place among them.
        size: how many there are.

    Attributes:
        counts: images of the present batch on every process, set by `begin`.
    """

    def __init__(self, group: Any, late_group: Any, rank: int, size: int) -> None:
        self.group, self.late_group, self.rank, self.size = group, late_group, rank, size
        self.counts: list[int] = []

    def begin(self, num_images: int, *notes: int, device: torch.device) -> list[tuple[int, ...]]:
        """Say how many images of the batch this process has; return what every process noted beside, by rank."""
        told = self._all(torch.tensor([num_images, *notes], dtype=torch.int64, device=device))
        rows = told.tolist()
        self.counts = [row[0] for row in rows]
        return [tuple(row[1:]) for row in rows]

    def first(self, num_rows: int) -> int:
        """Return which row of the whole batch is the first of this process's `num_rows`, one or more per image."""
        return self.first_image * (num_rows // self.counts[self.rank])

    @property
    def first_image(self) -> int:
        """Which image of the whole batch is the first of this process's."""
        return sum(self.counts[: self.rank])

    def most(self, num_rows: int) -> int:
        """Return how many rows the process with the most images has where this one has `num_rows`."""
        return max(self.counts) * (num_rows // self.counts[self.rank])

    def gather(self, x: Tensor, alike: bool = False) -> Tensor:
        """Return the rows `(n, ...)` of all processes below each other.

        The gradient that goes on to this process's rows is the sum of those that all processes have for them, which
        takes one more message.

        Args:
            x: rows of this process's images.
            alike: what is computed of all rows, every process computes alike, and each has an equal part in it. The
                sum is then `size` times the gradient that this process has, and nothing is said.
        """
        return _Gather.apply(x, self, alike)

    def gather_rows(self, x: Tensor) -> Tensor:
        """Return what `gather` does, without gradients, for any number of rows on each process."""
        lengths = self._all(torch.tensor([len(x)], dtype=torch.int64, device=x.device)).flatten().tolist()
        return self._all_rows(x.detach(), lengths)

    def combine(self, mean: Tensor, var: Tensor, num: int) -> tuple[Tensor, Tensor, int]:
        """Return mean, variance and number of all processes' values, from those of this one's (Chan et al. 1983, eq. 2.1).

            m = sum_r n_r m_r / n,    v = sum_r n_r (v_r + (m_r - m)^2) / n,    n = sum_r n_r

        Args:
            mean: of any shape, without gradient.
            var: of the same shape, divided by the number of values.
            num: of values that each entry is taken over.

        Returns:
            m, v and n, without gradient.
        """  # noqa: E501
        flat = torch.cat([mean.flatten(), var.flatten(), mean.new_tensor([num])])
        told = self._all(flat).double()
        width = mean.numel()
        numbers = told[:, -1].round()
        means, variances, shares = told[:, :width], told[:, width:-1], (numbers / numbers.sum())[:, None]
        m = (shares * means).sum(0)
        v = (shares * (variances + (means - m).square())).sum(0)
        return m.to(mean.dtype).view_as(mean), v.to(var.dtype).view_as(var), int(numbers.sum())

    def sum(self, *parts: Tensor) -> list[Tensor]:
        """Return the sums over all processes of some tensors of one dtype, in one message and without gradient."""
        return self._start(parts, self.group)()

    def start_sum(self, tensors: Sequence[Tensor | None]) -> Callable[[], list[Tensor | None]]:
        """Start adding up tensors over all processes, coalesced; return a function that waits for the sums.

        Entries that are None are so on every process, and stay None.
        """
        given = [tensor for tensor in tensors if tensor is not None]
        kinds = list(dict.fromkeys(tensor.dtype for tensor in given))
        waits = {kind: self._start([t for t in given if t.dtype == kind], self.late_group) for kind in kinds}

        def finish() -> list[Tensor | None]:
            sums = {kind: iter(wait()) for kind, wait in waits.items()}
            return [None if tensor is None else next(sums[tensor.dtype]) for tensor in tensors]

        return finish

    def _start(self, tensors: Sequence[Tensor], group: Any) -> Finish:
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        work = dist.all_reduce(flat, group=group, async_op=True)
        shapes = [tensor.shape for tensor in tensors]

        def finish() -> list[Tensor]:
            if work is not None:
                work.wait()
            parts = flat.split([shape.numel() for shape in shapes])
            return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

        return finish

    def _all_rows(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the rows of all processes, of which each has as many as `lengths` says."""
        padded = x.new_zeros((max(lengths), *x.shape[1:]))
        padded[: len(x)] = x
        return torch.cat([rows[:length] for rows, length in zip(self._all(padded), lengths, strict=True)])

    def _all(self, x: Tensor) -> Tensor:
        """Return the tensors of all processes, alike in shape, stacked by rank."""
        told = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(told, x, group=self.group)
        return torch.stack(told)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, alike: bool) -> Tensor:
        per_image = len(x) // peers.counts[peers.rank]
        lengths = [count * per_image for count in peers.counts]
        ctx.mine, ctx.peers, ctx.alike = (sum(lengths[: peers.rank]), len(x)), peers, alike
        return peers._all_rows(x, lengths)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.alike:
            return grad.narrow(0, *ctx.mine) * ctx.peers.size, None, None
        (total,) = ctx.peers.sum(grad)
        return total.narrow(0, *ctx.mine), None, None
