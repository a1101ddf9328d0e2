"""Training on several processes of this machine, beside what `localsim.scaling` predicts.

    python benchmarks/parallel.py
    python benchmarks/parallel.py --processes 2 --repeats 5 --rule loco
    python benchmarks/parallel.py --cuts layer3.0 --set batch_size=32 --json parallel.json

What the columns mean, and how to read them: docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tracked import machine as about_machine

from localsim.config import Config
from localsim.machines import in_one_node, message_rates
from localsim.options import settings
from localsim.placement import flops_by_stage, place_stages, stage_costs
from localsim.presets import resolve
from localsim.scaling import Prediction, predict
from localsim.step_profile import profiles_of_shares

SMALL = {
    # real training on the embedded images, without what comes before and after
    "image_size": 32,
    "batch_size": 64,
    "precision": "full",
    "probe_protocol": "none",
    "workers": 0,
    "epochs": 100,
    "warmup_epochs": 1,
}


@dataclass(frozen=True)
class Way:
    """A way to run: `parallel` is `data` or `blocks:P`."""

    processes: int
    parallel: str

    @property
    def groups(self) -> int:
        return int(self.parallel.partition(":")[2] or 1)


def ways(numbers: Sequence[int], kinds: Sequence[str], num_stages: int) -> list[Way]:
    """Return one process, and every kind on every larger number: `blocks` with as many groups of stages as can be."""
    several = [
        Way(number, f"blocks:{min(number, num_stages)}" if kind == "blocks" else kind)
        for number in sorted(numbers)
        for kind in kinds
        if number > 1
    ]
    return [Way(1, "data"), *several]


def command(way: Way, config_words: Sequence[str], steps: int, every: int, out: Path) -> list[str]:
    """Return the command line of one run."""
    run = ["localsim", "run", *config_words, "--set", f"max_steps={steps}", "--set", f"log_every={every}"]
    run += ["--out", str(out), "--device", "cpu"]
    if way.processes == 1:
        return [sys.executable, "-m", *run]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(way.processes), "-m"]
    # data-parallel is what several processes do when nothing else is said
    return [sys.executable, "-m", *launch, *run, *(["--parallel", way.parallel] if way.groups > 1 else [])]


def rate(way: Way, config_words: Sequence[str], steps: int, every: int, threads: int) -> float:
    """Return the images per second of a run: the median of its lines but for the first, which has the start in it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        done = subprocess.run(
            command(way, config_words, steps, every, out),
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{way.parallel} on {way.processes} processes failed:\n{done.stderr[-2000:]}")
        lines = (out / "metrics.jsonl").read_text().splitlines()
    rates = [row["images_per_second"] for row in map(json.loads, lines) if "images_per_second" in row]
    return statistics.median(rates[1:])


def best_cut(rule: str, given: dict[str, Any]) -> str:
    """Return the unit block at which two stages of most equal FLOPs meet, the taps that read them included."""
    from localsim.assembly import build_trunk

    names = [unit.name for unit in build_trunk(resolve(rule, "quick", {**given, "granularity": 2}))[0].units]
    heaviest = {name: max(stage_costs(resolve(rule, "quick", {**given, "cuts": name}))) for name in names[1:]}
    return min(heaviest, key=lambda name: heaviest[name])


def predicted(config: Config, tried: Sequence[Way], alone: float) -> list[Prediction]:
    """Return predictions from the speed of one process, all it does included, and of messages between two."""
    shared = profiles_of_shares(config, {way.processes // way.groups for way in tried} | {1})
    flops = sum(phase.flops for phase in shared[1]) * alone / config.batch_size
    latency, bandwidth = message_rates("gloo")
    here = in_one_node("measured", "one process and two messages", flops, float("inf"), bandwidth, latency)
    found = []
    for way in tried:
        (profile,) = shared[way.processes // way.groups]
        found.append(predict(profile, here, place_stages(flops_by_stage([profile]), way.groups)))
    print(f"Messages between two processes: {bandwidth / 1e9:.2g} GB/s, {latency * 1e6:.0f} us.\n")
    return found


def lines(tried: Sequence[Way], rates: dict[Way, list[float]], made: Sequence[Prediction]) -> list[str]:
    """Return the table as Markdown."""
    alone = statistics.median(rates[tried[0]])
    heads = ("processes", "parallel", "groups", "images/s", "range", "times one", "predicted times one", "ratio")
    table = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for way, one in zip(tried, made, strict=True):
        found = statistics.median(rates[way])
        # within a repeat, so that what else the machine does is the same for both
        times = statistics.median(a / b for a, b in zip(rates[way], rates[tried[0]], strict=True))
        cells = [
            str(way.processes),
            way.parallel if way.processes > 1 else "",
            "+".join(str(len(group)) for group in one.groups),
            f"{found:.1f}",
            f"{min(rates[way]):.1f} to {max(rates[way]):.1f}",
            f"{times:.2f}",
            f"{one.images_per_second / alone:.2f}",
            f"{times * alone / one.images_per_second:.2f}",
        ]
        table.append("| " + " | ".join(cells) + " |")
    return table


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], metavar="N")
    parser.add_argument("--parallel", nargs="+", default=["data", "blocks"], choices=["data", "blocks"])
    parser.add_argument("--rule", default="blockwise")
    parser.add_argument("--granularity", type=int, help="stages; by default two, of about equal arithmetic")
    parser.add_argument("--cuts", help="or the unit blocks at which stages begin")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10, help="steps in a line of metrics")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there too")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    chosen = arguments(given)
    wanted = {**SMALL, **settings(chosen.set)}
    if chosen.granularity is not None:
        wanted["granularity"] = chosen.granularity
    else:
        wanted["cuts"] = chosen.cuts or best_cut(chosen.rule, wanted)
    config = resolve(chosen.rule, "quick", wanted)
    words = ["--rule", chosen.rule, "--preset", "quick"]
    words += [word for name, value in wanted.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    tried = ways(chosen.processes, chosen.parallel, len(stage_costs(config)))
    print(f"{chosen.rule}, {json.dumps(wanted)}; {chosen.threads} thread(s) a process.")
    print(about_machine(torch.device("cpu")), end="\n\n", flush=True)
    rates: dict[Way, list[float]] = {way: [] for way in tried}
    for _ in range(chosen.repeats):
        for way in tried:
            rates[way].append(rate(way, words, chosen.steps, chosen.every, chosen.threads))
    made = predicted(config, tried, statistics.median(rates[tried[0]]))
    print("\n".join(lines(tried, rates, made)))
    if chosen.json:
        record = [
            {**asdict(way), "images_per_second": rates[way], "predicted": one.images_per_second}
            for way, one in zip(tried, made, strict=True)
        ]
        chosen.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
