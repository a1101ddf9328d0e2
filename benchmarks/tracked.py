"""What a piece of work costs: bytes allocated at its peak, arithmetic and seconds; and how fast the machine is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from localsim.arithmetic import Arithmetic


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Run `work` once and return the largest number of bytes allocated at a time, above what was there before.

    On the CPU every allocation of a tensor's memory counts, as torch's profiler sees them; scratch memory that oneDNN
    or MKL takes from the system by itself does not. On CUDA it is what torch's allocator says.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events: list[Any] = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):  # stable: those of one instant keep their order
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def flops(work: Callable[[], object]) -> int:
    """Run `work` once and return the FLOPs of its convolutions and matrix products, by torch's own formulas.

    A multiplication and an addition are two. What torch.compile has fused is not seen.
    """
    with Arithmetic() as seen:
        work()
    return seen.forward + seen.backward


def seconds(work: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Return the seconds that `work` takes, a mean over `times`."""
    wait(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait(device)
    return (time.perf_counter() - start) / times


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device, packages: Sequence[str] = ("torch",)) -> str:
    """Return a sentence about the machine, its load and the versions that are measured."""
    name = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    return (
        f"{os.cpu_count()} cores ({platform.machine()}){name}, {torch.get_num_threads()} thread(s), load "
        f"{os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, {versions}."
    )


@dataclass(frozen=True)
class Rates:
    """FLOP/s of the machine's best matrix product and best convolution."""

    products: float
    convolutions: float


def rates(dtype: str, device: torch.device) -> Rates:
    """Measure the best matrix product and the best convolution of some that the networks have."""
    kind, large = (torch.bfloat16 if dtype == "bf16" else torch.float32), device.type == "cuda"
    n, batch = (8192, 256) if large else (2048, 16)

    def made(*shape: int) -> Tensor:
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.randn(shape, device=device).to(kind, memory_format=layout)

    def rate(flops: int, work: Callable[[], object]) -> float:
        work()
        return flops / min(seconds(work, device) for _ in range(3))

    products = [
        rate(2 * a * b * c, partial(torch.mm, made(a, b), made(b, c))) for a, b, c in ((n, n, n), (8 * n, 256, 2048))
    ]
    convolutions = [
        rate(
            2 * batch * side**2 * channels * width * kernel**2,
            partial(F.conv2d, made(batch, channels, side, side), made(width, channels, kernel, kernel), padding="same"),
        )
        for channels, width, side, kernel in ((256, 2048, 32, 1), (1024, 2048, 16, 1), (512, 512, 16, 3))
    ]
    return Rates(max(products), max(convolutions))
