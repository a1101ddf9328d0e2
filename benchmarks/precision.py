"""Loss curves in bfloat16 beside those in float32, and how far they are apart compared with different seeds.

    python benchmarks/precision.py                          # blockwise, ResNet-50, the embedded images
    python benchmarks/precision.py --rule end_to_end --seeds 5

What the columns mean: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tracked import machine

import localsim
from localsim.precision import PRECISIONS
from localsim.runs import read_metrics


def losses(chosen: argparse.Namespace, precision: str, seed: int, out: Path) -> dict[str, np.ndarray]:
    """Return the loss of every step by tap, of a run that ends after so many steps."""
    run = localsim.run(
        chosen.rule, preset=chosen.preset, data=chosen.data, backbone=chosen.backbone, granularity=4,
        image_size=chosen.size, batch_size=chosen.batch, expand_width=chosen.width,
        projector=[chosen.width] * 3, precision=precision, seed=seed, max_steps=chosen.steps, log_every=1,
        epochs=chosen.epochs, warmup_epochs=chosen.epochs / 20, probe_protocol="none", channels_last=True,
        on_collapse="continue", out=out, quiet=True,
    )  # fmt: skip
    rows = read_metrics(run.path)
    return {tap: np.array([row["loss"][tap] for row in rows]) for tap in rows[0]["loss"]}


def lines(curves: dict[str, list[dict[str, np.ndarray]]], windows: int) -> Iterator[str]:
    """Yield the table's lines: of every tap, in windows of steps; `curves` are those of every seed, by precision."""
    for tap in curves["full"][0]:
        full, bf16 = (np.stack([curve[tap] for curve in curves[name]]) for name in PRECISIONS)
        for part in np.array_split(np.arange(full.shape[1]), windows):
            per_seed = full[:, part].mean(1)
            spread, gap = per_seed.std(ddof=1), bf16[:, part].mean() - per_seed.mean()
            yield (
                f"| {tap} | {part[0] + 1} to {part[-1] + 1} | {per_seed.mean():.4f} | {bf16[:, part].mean():.4f} "
                f"| {gap:+.4f} | {spread:.4f} | {abs(gap) / spread:.2f} |"
            )


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="blockwise")
    parser.add_argument("--preset", default=None)
    parser.add_argument("--data", default=None, help="a data set or folder (default: the embedded images)")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=512, help="of expand and projector")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=2, help="of the learning-rate schedule; steps are part of it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=5)
    chosen = parser.parse_args(given)
    if chosen.seeds < 2:
        parser.error(f"--seeds is {chosen.seeds}; without at least 2 nothing says how far seeds are apart")
    if not 1 <= chosen.windows <= chosen.steps:
        parser.error(f"--windows is {chosen.windows}; it must be between 1 and --steps, {chosen.steps}")
    return chosen


def main(given: list[str] | None = None) -> None:
    chosen = arguments(given)
    print(machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")), end="\n\n", flush=True)
    curves: dict[str, list[dict[str, np.ndarray]]] = {precision: [] for precision in PRECISIONS}
    with tempfile.TemporaryDirectory(prefix="localsim-benchmark-") as folder:
        for seed in range(chosen.seeds):
            for precision, made in curves.items():
                made.append(losses(chosen, precision, seed, Path(folder) / f"{precision}-{seed}"))
    print("| tap | steps | float32 | bfloat16 | difference | seeds | difference / seeds |")
    print("|---" * 7 + "|")
    for line in lines(curves, chosen.windows):
        print(line)


if __name__ == "__main__":
    main()
