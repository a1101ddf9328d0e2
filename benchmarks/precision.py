"""Prints whether bfloat16 training follows float32: loss curves of both, beside how far seeds are apart.

`python benchmarks/precision.py` trains a rule with several seeds in both precisions. A seed decides initialisation,
order of images, views and noise, so the two runs of one seed differ by rounding alone. For every tap the losses are
averaged over windows of steps; per window, *difference* is that of the means over seeds, bfloat16 minus float32, and
*seeds* is the standard deviation between float32 runs of different seeds. Rounding is harmless where the first is not
above the second.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

import localsim
from localsim.runs import read_metrics


def losses(arguments: argparse.Namespace, precision: str, seed: int, out: Path) -> dict[str, np.ndarray]:
    """Return the loss of every step by tap, of a run that ends after so many steps."""
    run = localsim.run(
        arguments.rule, preset=arguments.preset, data=arguments.data, backbone=arguments.backbone, granularity=4,
        image_size=arguments.size, batch_size=arguments.batch, expand_width=arguments.width,
        projector=[arguments.width] * 3, precision=precision, seed=seed, max_steps=arguments.steps, log_every=1,
        epochs=arguments.epochs, warmup_epochs=arguments.epochs / 20, probe_protocol="none", channels_last=True,
        on_collapse="continue", out=out, quiet=True,
    )  # fmt: skip
    rows = read_metrics(run.path)
    return {tap: np.array([row["loss"][tap] for row in rows]) for tap in rows[0]["loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="blockwise")
    parser.add_argument("--preset", default=None)
    parser.add_argument("--data", default=None, help="a data set or folder (default: the embedded images)")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=512, help="of expand and projector")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--epochs", type=int, default=2, help="of the learning-rate schedule, of which the steps are part"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=5)
    arguments = parser.parse_args()
    curves: dict[str, list[dict[str, np.ndarray]]] = {"full": [], "bf16": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            for precision, made in curves.items():
                made.append(losses(arguments, precision, seed, Path(folder) / f"{precision}-{seed}"))
    print(
        "| tap | steps | float32 | bfloat16 | difference | seeds | difference / seeds |\n|---|---|---|---|---|---|---|"
    )
    for tap in curves["full"][0]:
        full, bf16 = (np.stack([curve[tap] for curve in curves[name]]) for name in ("full", "bf16"))
        for part in np.array_split(np.arange(full.shape[1]), arguments.windows):
            per_seed = full[:, part].mean(1)
            spread, gap = per_seed.std(ddof=1), bf16[:, part].mean() - per_seed.mean()
            print(f"| {tap} | {part[0] + 1} to {part[-1] + 1} | {per_seed.mean():.4f} | {bf16[:, part].mean():.4f} "
                  f"| {gap:+.4f} | {spread:.4f} | {abs(gap) / spread:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
