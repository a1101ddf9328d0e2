"""Rates of a process and of what joins processes: of named machines, as assumed, and of this one, as measured."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from localsim.config import Config
from localsim.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of one process and of what joins processes; all are what is reached, not what is advertised.

    Attributes:
        name: for tables.
        source: where the numbers come from, as a sentence.
        flops: FLOP/s of a training step, all that is not arithmetic included.
        memory: bytes per second that an optimiser's step moves.
        bandwidth: bytes per second that a process sends, and receives, within a node.
        latency: seconds from a message's start to its arrival, size apart, within a node.
        node: processes in a node.
        bandwidth_between: as `bandwidth`, to another node, with all processes of the node sending.
        latency_between: as `latency`, to another node.
    """

    name: str
    source: str
    flops: float
    memory: float
    bandwidth: float
    latency: float
    node: int
    bandwidth_between: float
    latency_between: float

    def gather_seconds(self, bytes_each: float, copies: int) -> float:
        """Return the time until each of `copies` processes has what every one gave, `bytes_each`.

        With nodes of g processes, m of them: m blocks from node to node, then g m blocks within each,

            (m - 1) n / B' + log2(m) a' + (g - 1) m n / B + log2(g) a

        for bandwidth B and latency a within a node, B' and a' between (recursive doubling: Thakur, Rabenseifner &
        Gropp 2005, "Optimization of collective communication operations in MPICH", section 4.1, once per level).
        """
        g, m = self._levels(copies)
        between = (m - 1) * bytes_each / self.bandwidth_between + _rounds(m) * self.latency_between
        return between + (g - 1) * m * bytes_each / self.bandwidth + _rounds(g) * self.latency

    def sum_seconds(self, num_bytes: float, copies: int) -> float:
        """Return the time until each of `copies` processes has the sum of what every one gave, `num_bytes`.

        A sum in pieces within the node, of each piece between nodes, and the pieces collected within the node:

            2 (g - 1) / g n / B + 2 log2(g) a + 2 (m - 1) / m (n / g) / B' + 2 log2(m) a'

        (Rabenseifner's algorithm, section 4.4 of the same paper, once per level).
        """
        g, m = self._levels(copies)
        within = 2 * (g - 1) / g * num_bytes / self.bandwidth + 2 * _rounds(g) * self.latency
        return (
            within + 2 * (m - 1) / m * (num_bytes / g) / self.bandwidth_between + 2 * _rounds(m) * self.latency_between
        )

    def link(self, processes: int) -> tuple[float, float]:
        """Return bandwidth and latency between two processes that run neighbouring stages, of `processes` in all.

        The copies of a stage lie side by side, so that neighbours in the network lie in different nodes if there are
        several.
        """
        if processes <= self.node:
            return self.bandwidth, self.latency
        return self.bandwidth_between, self.latency_between

    def _levels(self, copies: int) -> tuple[int, int]:
        g = min(copies, self.node)
        return g, -(-copies // g)


def _rounds(processes: int) -> int:
    return math.ceil(math.log2(processes))


@dataclass(frozen=True)
class _Published:
    """What makers say of an accelerator in a machine, per accelerator: FLOP/s by precision, bytes/s."""

    words: str
    flops: dict[str, float]
    memory: float
    within: float
    between: float
    latency_between: float


# NVIDIA A100 80GB SXM and H100 SXM data sheets: dense bfloat16, float32 without tensor cores, memory, half of the
# NVLink figure, which counts both directions; DGX A100 and DGX H100 data sheets: one 200 or 400 Gb/s port per GPU
_A100 = _Published(
    words="A100 80GB SXM, 8 in a node, NVLink, 200 Gb/s InfiniBand each",
    flops={"bf16": 312e12, "full": 19.5e12},
    memory=2039e9,
    within=300e9,
    between=25e9,
    latency_between=2e-5,
)
_H100 = _Published(
    words="H100 SXM, 8 in a node, NVLink, 400 Gb/s InfiniBand each",
    flops={"bf16": 989e12, "full": 67e12},
    memory=3350e9,
    within=450e9,
    between=50e9,
    latency_between=2e-5,
)
_ETHERNET = dataclasses.replace(
    _A100,
    words="A100 80GB SXM, 8 in a node, NVLink, one 100 Gb/s Ethernet port a node",
    between=12.5e9 / 8,
    latency_between=5e-5,
)
_PUBLISHED = {"a100": _A100, "a100-ethernet": _ETHERNET, "h100": _H100}
_OF_ARITHMETIC, _OF_BYTES, _LATENCY = 0.25, 0.7, 1e-5
MACHINES = (*_PUBLISHED, "here")


def machine(text: str, config: Config) -> Machine:
    """Return the machine that is meant by a name, or by `FLOPS,BYTES_PER_S,SECONDS`.

    Args:
        text: one of `MACHINES`, or three numbers: a process's FLOP/s in a training step, bytes per second that it
            sends, and seconds of a message whatever its size. With these every process reaches every other alike, and
            the optimiser takes no time.
        config: whose precision decides the arithmetic; `here` measures a small step of it.

    Raises:
        UserError: an unknown name, or numbers that are none; or `here` cannot be measured.
    """
    if text == "here":
        return measured(config)
    if text in _PUBLISHED:
        made = _PUBLISHED[text]
        return Machine(
            name=text,
            source=f"{made.words}. Assumed, not measured: {_OF_ARITHMETIC:.0%} of the published arithmetic, "
            f"{_OF_BYTES:.0%} of the published bytes per second, {_LATENCY * 1e6:.0f} us a message within a node and "
            f"{made.latency_between * 1e6:.0f} us between",
            flops=_OF_ARITHMETIC * made.flops[config.precision],
            memory=_OF_BYTES * made.memory,
            bandwidth=_OF_BYTES * made.within,
            latency=_LATENCY,
            node=8,
            bandwidth_between=_OF_BYTES * made.between,
            latency_between=made.latency_between,
        )
    try:
        flops, bandwidth, latency = (float(word) for word in text.split(","))
    except ValueError:
        flops = bandwidth = latency = math.nan
    if not (0 < flops < math.inf and 0 < bandwidth < math.inf and 0 <= latency < math.inf):
        raise UserError(
            f"--machine is {text!r}; allowed: {', '.join(MACHINES)}, or FLOPS,BYTES_PER_S,SECONDS, e.g. 8e13,2e10,2e-5"
        )
    return in_one_node("given", "as given; the optimiser's step left out", flops, math.inf, bandwidth, latency)


def in_one_node(name: str, source: str, flops: float, memory: float, bandwidth: float, latency: float) -> Machine:
    """Return a machine in which every process reaches every other alike; for the numbers see `Machine`."""
    return Machine(
        name=name,
        source=source,
        flops=flops,
        memory=memory,
        bandwidth=bandwidth,
        latency=latency,
        node=sys.maxsize,
        bandwidth_between=bandwidth,
        latency_between=latency,
    )


# -- this machine -----------------------------------------------------------------------------------------------------

_STEP = {"cpu": 3e10, "cuda": 5e12}
"""FLOPs of the step that is timed: enough to keep the device busy, and over within seconds."""
_WIDEST = 512


def measured(config: Config) -> Machine:
    """Measure this machine within seconds: a small real step, memory, and messages between two processes.

    The step is the configuration's own, of fewer images and projectors of at most 512; it takes all threads that torch
    would use here. Messages go over gloo, or over nccl where there are two GPUs. That every further process gets as
    much is what a prediction then supposes.

    Raises:
        UserError: two processes cannot talk to each other here.
    """
    device = torch.device("cuda" if config.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
    flops, images = _step_rate(config, device)
    memory = _memory_rate(device)
    gpus = device.type == "cuda" and torch.cuda.device_count() > 1
    latency, bandwidth = message_rates("nccl" if gpus else "gloo")
    threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return in_one_node(
        "here",
        f"measured just now on {device.type}{threads}: a step of {images} images at {flops / 1e9:.3g} GFLOP/s, memory "
        f"at {memory / 1e9:.3g} GB/s, two processes at {bandwidth / 1e9:.3g} GB/s and {latency * 1e6:.3g} us "
        "a message. Supposed, not measured: every further process gets as much",
        flops,
        memory,
        bandwidth,
        latency,
    )


def _step_rate(config: Config, device: torch.device) -> tuple[float, int]:
    """Return the FLOP/s of a training step, and of how many images it was."""
    from localsim import engine
    from localsim.arithmetic import Arithmetic
    from localsim.assembly import build_network
    from localsim.cost import blank_batch, cost

    small = dataclasses.replace(config, batch_size=4, projector=[min(_WIDEST, width) for width in config.projector])
    predicted = cost(small)
    per_image = (predicted.forward_flops + predicted.backward_flops) / small.batch_size
    small = dataclasses.replace(small, batch_size=max(4, min(config.batch_size, int(_STEP[device.type] / per_image))))
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    net = build_network(small).to(device, memory_format=layout).train()  # type: ignore[call-overload]
    views, labels = blank_batch(small, small.batch_size)
    random = torch.Generator().manual_seed(0)
    views = [view.normal_(generator=random).to(device) for view in views]
    hooks = engine.Hooks(on_final=lambda _parameters: net.zero_grad(set_to_none=True))

    def step() -> None:
        engine.backward(net, *views, labels=labels.to(device), key=config.seed, precision=config.precision, hooks=hooks)

    with Arithmetic() as done:
        step()
    return (done.forward + done.backward) / _best(step, device, 2), small.batch_size


def _memory_rate(device: torch.device) -> float:
    """Return the bytes per second of adding a large tensor to another: two are read, one is written."""
    a, b = torch.zeros(2, 2**24, device=device)
    return 3 * a.nbytes / _best(lambda: a.add_(b), device, 5)


def _best(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Return the seconds of the fastest of `times` runs."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - begin)
    return min(taken)


_LARGE = 2**24  # bytes


def message_rates(backend: str) -> tuple[float, float]:
    """Return seconds per message and bytes per second between two processes, from sums of one number and of many.

    Of two processes a sum of n bytes takes 2 a + n / B, see `Machine.sum_seconds`.

    Args:
        backend: of torch.distributed: gloo, or nccl.

    Raises:
        UserError: two processes cannot talk to each other here.
    """
    with tempfile.TemporaryDirectory() as folder:
        pair = [
            subprocess.Popen(
                [sys.executable, "-c", "import sys; from localsim.machines import add_up; add_up(*sys.argv[1:])",
                 backend, str(rank), str(Path(folder) / "met")],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            told = [process.communicate(timeout=120) for process in pair]
        except subprocess.TimeoutExpired:
            told = [("", "no answer within 120 seconds")] * 2
        finally:
            for process in pair:
                process.kill()
                process.wait()
    if pair[0].returncode or pair[1].returncode:
        why = [line for _, errors in told for line in errors.strip().splitlines()[-1:]]
        raise UserError(f"two processes cannot talk to each other here ({why[0] if why else 'no answer'})")
    small, large = json.loads(told[0][0])
    return small / 2, _LARGE / max(large - small, 1e-9)


def add_up(backend: str, rank: str, met: str) -> None:
    """Be one of two processes that add up numbers; the first prints seconds of a small and a large sum as JSON."""
    if backend == "nccl":
        torch.cuda.set_device(int(rank))
    dist.init_process_group(backend, init_method=f"file://{met}", rank=int(rank), world_size=2)
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    taken = []
    for size, times in ((1, 50), (_LARGE // 4, 6)):
        x = torch.zeros(size, device=device)
        taken.append(_best(lambda x=x: dist.all_reduce(x), device, times))
    if rank == "0":
        print(json.dumps(taken))
    dist.destroy_process_group()
