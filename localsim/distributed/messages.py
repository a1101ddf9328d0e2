"""Messages between two processes: tensors of any shape with a few numbers beside them, in the order they were sent."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_KINDS = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
_MOST_DIMS = 5
_PER_TENSOR = 3 + _MOST_DIMS  # kind, layout, number of dimensions, sizes
MOST_TENSORS, _MOST_NOTES = 64, 8
_HEAD = 2 + _MOST_NOTES + MOST_TENSORS * _PER_TENSOR


class Channel:
    """What goes to and comes from one other process.

    Args:
        rank: of the other process.
        device: where tensors that arrive are put.
        in_flight: how many messages may be under way before `send` waits for the oldest to be fetched.
    """

    def __init__(self, rank: int, device: torch.device, in_flight: int = 2) -> None:
        self.rank, self.device, self.in_flight = rank, device, in_flight
        self._under_way: deque[list[tuple[Any, Tensor]]] = deque()

    def send(self, tensors: Sequence[Tensor], notes: Sequence[int] = ()) -> None:
        """Send tensors and numbers; they may not be changed in place until the message has been fetched."""
        while len(self._under_way) >= self.in_flight:
            self._wait()
        head = torch.zeros(_HEAD, dtype=torch.int64)
        if len(tensors) > MOST_TENSORS or len(notes) > _MOST_NOTES:
            raise ValueError(f"{len(tensors)} tensors and {len(notes)} numbers are too many for a message")
        head[0], head[1] = len(tensors), len(notes)
        head[2 : 2 + len(notes)] = torch.tensor(list(notes), dtype=torch.int64)
        flat = []
        for number, tensor in enumerate(tensors):
            last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
            last = last and not tensor.is_contiguous()
            start = 2 + _MOST_NOTES + number * _PER_TENSOR
            told = [_KINDS.index(tensor.dtype), int(last), tensor.dim(), *tensor.shape]
            head[start : start + len(told)] = torch.tensor(told)
            flat.append(tensor.detach().permute(0, 2, 3, 1) if last else tensor.detach().contiguous())
        parts = [head, *(tensor for tensor in flat if tensor.numel())]
        self._under_way.append([(dist.isend(part, self.rank), part) for part in parts])

    def receive(self) -> tuple[list[Tensor], list[int]]:
        """Return the tensors and numbers of the next message, laid out in memory as they were where they came from."""
        head = torch.zeros(_HEAD, dtype=torch.int64)
        dist.recv(head, self.rank)
        told = head.tolist()
        tensors = []
        for number in range(told[0]):
            kind, last, dims, *sizes = told[2 + _MOST_NOTES + number * _PER_TENSOR :][:_PER_TENSOR]
            shape = sizes[:dims]
            if last:
                shape = [shape[0], shape[2], shape[3], shape[1]]
            tensor = torch.empty(shape, dtype=_KINDS[kind], device=self.device)
            if tensor.numel():
                dist.recv(tensor, self.rank)
            tensors.append(tensor.permute(0, 3, 1, 2) if last else tensor)
        return tensors, told[2 : 2 + told[1]]

    def flush(self) -> None:
        """Wait until all that was sent has been fetched."""
        while self._under_way:
            self._wait()

    def _wait(self) -> None:
        for work, _ in self._under_way.popleft():
            work.wait()


def packed(value: Any) -> Tensor:
    """Return plain values and tensors as bytes, on the CPU; `unpacked` is the inverse and executes no code."""
    file = io.BytesIO()
    torch.save(value, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def unpacked(data: Tensor) -> Any:
    """Return what was packed."""
    return torch.load(io.BytesIO(data.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


def exchange(value: Any, size: int) -> list[Any]:
    """Return the plain values of all `size` processes, by rank; all call it."""
    data = packed(value)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(data)], dtype=torch.int64))
    longest = max(int(length) for length in lengths)
    told = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(told, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [unpacked(one[: int(length)]) for one, length in zip(told, lengths, strict=True)]
