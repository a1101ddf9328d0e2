"""Time, memory and arithmetic of one training step: localsim beside plain torch.

    python benchmarks/steps.py
    python benchmarks/steps.py --batch 16 --size 128 --only reference end_to_end blockwise
    python benchmarks/steps.py --projector 8192 --size 224 --one-at-a-time
    OMP_NUM_THREADS=2 python benchmarks/steps.py --json steps.json

What the rows and columns mean, and how to read them: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reference_blockwise import Blockwise, EndToEnd, total_loss
from torch import Tensor, nn
from tracked import Rates, flops, peak_bytes, rates, seconds

from localsim import engine
from localsim.assembly import build_network
from localsim.memory import HeldBytes
from localsim.optim import make_optimizer, scaled_lr
from localsim.presets import resolve
from localsim.rng import generator, key

PRECISIONS = {"float32": "full", "bf16": "bf16"}
"""Localsim's word for each dtype; weights are float32 under both."""


@dataclass(frozen=True)
class Job:
    """What every contestant does a step of.

    Attributes:
        batch, size: images in a step, each of which has two views, and their side in pixels.
        projector: width of each of the projectors' three layers.
        expand: channels of the expanding readouts.
        backbone: a torchvision ResNet.
        optimizer: lars, with the learning rate and weight decay of the paper, or none: gradients are dropped.
    """

    batch: int
    size: int
    projector: int
    expand: int
    backbone: str
    optimizer: str
    device: torch.device

    def views(self, num: int) -> list[Tensor]:
        """Return views `(batch, 3, size, size)` in float32, as the loader gives them."""
        random = generator("benchmark", "views")
        shape = (self.batch, 3, self.size, self.size)
        return [torch.randn(shape, generator=random).to(self.device) for _ in range(num)]

    def apply(self, net: nn.Module) -> Callable[[], None]:
        """Return what is done with gradients that are final."""
        if self.optimizer == "none":
            return partial(net.zero_grad, set_to_none=True)
        optimizer = make_optimizer("lars", net.parameters(), lr=scaled_lr(0.2, self.batch), weight_decay=1e-6)

        def apply() -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return apply


@dataclass(frozen=True)
class Opened:
    """A network that is ready to learn: `step(dtype)` does all of one training step, from views to new weights."""

    net: nn.Module
    step: Callable[[str], None]


def in_torch(make: Callable[[Job], nn.Module], job: Job, *, channels_last: bool) -> Opened:
    """Open a network in plain torch: all losses first, then one backward pass and one step of the optimiser."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = make(job).to(device=job.device, memory_format=layout)  # type: ignore[call-overload]
    given, apply = job.views(2), job.apply(net)

    def step(dtype: str) -> None:
        views = [view.contiguous(memory_format=layout) for view in given]
        with torch.autocast(job.device.type, torch.bfloat16) if dtype == "bf16" else nullcontext():
            embeddings = [net(view) for view in views]
        total_loss(embeddings).backward()
        apply()

    return Opened(net, step)


def blockwise(job: Job) -> nn.Module:
    return Blockwise(job.backbone, job.expand, [job.projector] * 3)


def end_to_end(job: Job, *, recompute: bool = False) -> nn.Module:
    return EndToEnd(job.backbone, [job.projector] * 3, recompute=recompute)


def in_localsim(rule: str, job: Job, **settings: Any) -> Opened:
    """Open the network of a rule: every part is stepped as soon as its gradients are final, as `localsim.train` does.

    What is not given here is the rule's own, or that of the preset `imagenet`.
    """
    config = resolve(
        rule,
        "imagenet",
        {
            "backbone": job.backbone,
            "image_size": job.size,
            "batch_size": job.batch,
            "projector": [job.projector] * 3,
            "expand_width": job.expand,
            **settings,
        },
    )
    net = build_network(config).to(device=job.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        net.compile_stages()
    given, apply = job.views(config.views), job.apply(net)
    hooks = engine.Hooks(on_final=lambda _parameters: apply())
    draws = key(0, "step", 0)

    def step(dtype: str) -> None:
        views = [view.contiguous(memory_format=torch.channels_last) for view in given]
        engine.backward(net, *views, key=draws, precision=PRECISIONS[dtype], hooks=hooks)
        net.end_step()

    return Opened(net, step)


@dataclass(frozen=True)
class Contestant:
    """A row of the table.

    Attributes:
        words: for the table.
        open: makes the network.
        plain: makes the network that does the same and computes nothing twice; None: this one already does.
    """

    words: str
    open: Callable[[Job], Opened]
    plain: Callable[[Job], Opened] | None = None


def ours(words: str, rule: str, **settings: Any) -> Contestant:
    """Return a row of a rule that has `expand` readouts."""
    plain = settings | {"readout_impl": "plain", "recompute": "none", "compile": False}
    return Contestant(words, partial(in_localsim, rule, **settings), partial(in_localsim, rule, **plain))


_END_TO_END = partial(in_torch, end_to_end, channels_last=True)
CONTESTANTS = {
    "reference": Contestant("blockwise, reference formulation", partial(in_torch, blockwise, channels_last=False)),
    "reference_channels_last": Contestant(
        "the same in channels_last", partial(in_torch, blockwise, channels_last=True)
    ),
    "end_to_end": Contestant("end-to-end Barlow Twins", _END_TO_END),
    "end_to_end_recompute": Contestant(
        "the same, residual blocks recomputed",
        partial(in_torch, partial(end_to_end, recompute=True), channels_last=True),
        plain=_END_TO_END,
    ),
    "blockwise": ours("blockwise, localsim", "blockwise"),
    "blockwise_plain": ours("the same, plain readouts", "blockwise", readout_impl="plain"),
    "blockwise_recompute": ours("the same, unit blocks recomputed", "blockwise", recompute="units"),
    "blockwise_compiled": ours("the same, compiled", "blockwise", compile=True),
    "loco": Contestant("LoCo (SimCLR), localsim", partial(in_localsim, "loco")),
    "layerwise": ours("layerwise, localsim", "layerwise"),
    "greedy_infomax": Contestant(
        "Greedy InfoMax (one view, patches), localsim", partial(in_localsim, "greedy_infomax", granularity=4)
    ),
}
SLOW_TO_START = ("blockwise_compiled",)
"""Only measured when named."""


@dataclass(frozen=True)
class Cost:
    """What a step costs whenever it is run.

    Attributes:
        peak: bytes allocated at a time, above weights and the optimiser's state.
        held: bytes of tensors kept for the backward pass at a time.
        flops: of convolutions and matrix products; a multiplication and an addition are two.
        plain_flops: those of the contestant that computes nothing twice.
    """

    peak: int
    held: int
    flops: int
    plain_flops: int


def cost(one: Opened, dtype: str, device: torch.device) -> Cost:
    """Measure what a step costs; the first step has been before, so that the optimiser has its state."""
    step = partial(one.step, dtype)
    peak = peak_bytes(step, device)
    with HeldBytes(one.net.parameters()) as held:
        found = flops(step)
    return Cost(peak, held.peak, found, found)


@dataclass(frozen=True)
class Row:
    """What was measured of one contestant in one dtype; `seconds` has an entry per repeat."""

    name: str
    dtype: str
    cost: Cost
    seconds: list[float] = field(default_factory=list)


def costs(name: str, job: Job, dtypes: Sequence[str]) -> tuple[Opened, list[Row]]:
    """Open a contestant and measure what its steps cost."""
    contestant, rows = CONTESTANTS[name], []
    one = contestant.open(job)
    for dtype in dtypes:
        one.step(dtype)
        rows.append(Row(name, dtype, cost(one, dtype, job.device)))
    return one, rows


def with_plain_flops(rows: list[Row], job: Job) -> list[Row]:
    """Return the rows of a contestant with the FLOPs of the one that computes nothing twice; dtypes do not matter."""
    plain = CONTESTANTS[rows[0].name].plain
    if plain is None:
        return rows
    found = flops(partial(plain(job).step, rows[0].dtype))
    return [replace(row, cost=replace(row.cost, plain_flops=found)) for row in rows]


def measure(chosen: argparse.Namespace, job: Job) -> tuple[list[Row], dict[str, Rates]]:
    """Return every row, and by dtype the best rates of all repeats: they are to say what the machine can do."""
    names = [name for name in chosen.only if name not in chosen.without]
    kept: dict[str, Opened] = {}
    rows: list[Row] = []
    for name in names:
        one, found = costs(name, job, chosen.dtype)
        if not chosen.one_at_a_time:
            kept[name] = one
        del one
        tidy(job.device)
        rows += with_plain_flops(found, job)
        tidy(job.device)
    best = dict.fromkeys(chosen.dtype, Rates(0, 0))
    for _ in range(chosen.repeats):  # contestants take turns, so that all meet the same load
        for dtype in chosen.dtype:
            now = rates(dtype, job.device)
            best[dtype] = Rates(
                max(best[dtype].products, now.products), max(best[dtype].convolutions, now.convolutions)
            )
        for name in names:
            one = kept.get(name) or CONTESTANTS[name].open(job)
            for row in rows:
                if row.name == name:
                    step = partial(one.step, row.dtype)
                    if name not in kept or job.device.type == "cuda":
                        step()  # makes the optimiser's state, and what the allocator keeps
                    row.seconds.append(seconds(step, job.device, chosen.steps))
            del one
            if name not in kept:
                tidy(job.device)
    return rows, best


def tidy(device: torch.device) -> None:
    """Give back what nobody needs any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


COLUMNS = (
    "step", "dtype", "s/step", "images/s", "time / reference", "time / float32 reference", "peak MB",
    "peak / reference", "peak / float32 reference", "held MB", "GFLOP", "plain GFLOP", "of products", "of convolutions",
)  # fmt: skip


def lines(rows: list[Row], best: dict[str, Rates], job: Job) -> Iterator[str]:
    """Yield the table, and below it the rates that its last columns divide by."""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|---" * len(COLUMNS) + "|"
    by = {(row.name, row.dtype): row for row in rows}
    for row in rows:
        references = [by.get(("reference", dtype)) for dtype in (row.dtype, "float32")]
        # each repeat by itself: the load changes between repeats, hardly within one
        times = [
            one and statistics.median(x / y for x, y in zip(row.seconds, one.seconds, strict=True))
            for one in references
        ]
        peaks = [one and row.cost.peak / one.cost.peak for one in references]
        took = statistics.median(row.seconds)
        rate = row.cost.plain_flops / took
        cells = [
            CONTESTANTS[row.name].words,
            row.dtype,
            f"{took:.3g}",
            f"{job.batch / took:.3g}",
            *(ratio(one) for one in times),
            f"{row.cost.peak / 1e6:,.0f}",
            *(ratio(one) for one in peaks),
            f"{row.cost.held / 1e6:,.0f}",
            f"{row.cost.flops / 1e9:,.0f}",
            f"{row.cost.plain_flops / 1e9:,.0f}",
            f"{rate / best[row.dtype].products:.2f}",
            f"{rate / best[row.dtype].convolutions:.2f}",
        ]
        yield "| " + " | ".join(cells) + " |"
    yield ""
    for dtype, one in best.items():
        products, convolutions = one.products / 1e9, one.convolutions / 1e9
        yield f"{dtype}: matrix products at {products:,.0f} GFLOP/s, convolutions at {convolutions:,.0f} GFLOP/s."


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def machine(job: Job) -> str:
    """Return sentences about the work, the machine and the versions that are measured."""
    if job.device.type == "cuda":
        of = torch.cuda.get_device_name(job.device)
    else:
        info = Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
        of = (
            f"{os.cpu_count()} cores ({found[1] if found else platform.machine()}), {torch.get_num_threads()} thread(s)"
        )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchvision"))
    return (
        f"{job.backbone}, batch {job.batch}, {job.size} px, expand {job.expand}, projector 3 x {job.projector}, "
        f"optimiser {job.optimizer}. {of}, load {os.getloadavg()[0]:.1f} at the start; "
        f"Python {platform.python_version()}, {versions}."
    )


def record(about: str, rows: list[Row], best: dict[str, Rates]) -> dict[str, Any]:
    """Return everything that was measured, as plain values."""
    return {
        "about": about,
        "rates": {dtype: asdict(one) for dtype, one in best.items()},
        "rows": [{"words": CONTESTANTS[row.name].words, **asdict(row)} for row in rows],
    }


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [name for name in CONTESTANTS if name not in SLOW_TO_START]
    listed = ", ".join(CONTESTANTS)
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=usual, metavar="ROW", help=listed)
    parser.add_argument("--without", nargs="+", choices=CONTESTANTS, default=[], metavar="ROW")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--projector", type=int, default=2048, help="width of its three layers")
    parser.add_argument("--expand", type=int, default=2048, help="channels of the expanding readouts")
    parser.add_argument("--backbone", default="resnet50", help="a ResNet of torchvision")
    parser.add_argument("--optimizer", choices=("lars", "none"), default="lars")
    parser.add_argument("--dtype", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="timed in one turn")
    parser.add_argument("--one-at-a-time", action="store_true", help="keep one network only, made anew for each turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there too")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    chosen = arguments(given)
    torch.set_num_threads(chosen.threads)
    job = Job(**{each.name: getattr(chosen, each.name) for each in fields(Job)})
    about = machine(job)
    print(about, end="\n\n", flush=True)
    rows, best = measure(chosen, job)
    for line in lines(rows, best, job):
        print(line, flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(record(about, rows, best), indent=1) + "\n")


if __name__ == "__main__":
    main()
