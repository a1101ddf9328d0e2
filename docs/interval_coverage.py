"""Prints how often the intervals of `localsim brain` cover the truth, on simulated recordings.

`python docs/interval_coverage.py` draws recordings with new images, new neurons (for rsa, new subjects) and new noise,
scores two feature sets that see different parts of what drives the neurons, and counts how many 95 % intervals of their
difference hold the mean difference over all recordings. Takes minutes.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from localsim.analysis.brain.metrics import get_metric
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.statistics import centred_interval
from localsim.data import ImageSet

CASES = (("ridgecv", 80, 15, 0), ("ridgecv", 160, 40, 0), ("ridgecv", 400, 50, 0), ("pls", 120, 20, 0),
         ("pls", 400, 50, 0), ("rdm", 80, 30, 0), ("cka", 80, 30, 0), ("rsa", 80, 30, 0.5),
         ("ridgecv", 160, 40, 0.5))  # fmt: skip
"""Metric, images, neurons, and how much subjects differ in what their neurons are driven by."""
SUBJECTS = 4
DRAWS = 200


def recording(number: int, n: int, neurons: int, differ: float) -> tuple[Recording, np.ndarray]:
    """Return a recording of its own images and neurons, and what drives the neurons `(n, 12)`."""
    rng = np.random.default_rng(number)
    latent = rng.normal(size=(n, 12)) * np.linspace(1, 0.3, 12)
    owners = np.arange(neurons) % SUBJECTS
    tuning = rng.normal(size=(12, neurons)) * (1 + differ * rng.normal(size=(12, SUBJECTS)))[:, owners]
    responses = latent @ tuning + 2 * rng.normal(size=(n, neurons))
    images = ImageSet(torch.full((n, 3, 1, 1), number % 256, dtype=torch.uint8), None, None)
    subjects = tuple(f"S{owner}" for owner in owners)
    return Recording(f"recording {number}", images, responses, regions="V4", subjects=subjects), latent


def simulated(metric: str, n: int, neurons: int, differ: float, repeats: int) -> tuple[float, float]:
    """Return the share of intervals that cover, and their mean half width over 1.96 standard deviations."""
    fixed = np.random.default_rng(0)
    views = [(seen, fixed.normal(size=(12, 30))) for seen in (np.arange(12) < 9, np.arange(12) >= 4)]
    judge = get_metric(metric)
    values, ends = [], []
    for number in range(repeats):
        made, latent = recording(number, n, neurons, differ)
        target = judge.target(made, draws=DRAWS, seed=number)
        one, other = (judge.compare(judge.represent(latent * seen @ mixed), target) for seen, mixed in views)
        values.append(one.value - other.value)
        ends.append(centred_interval(values[-1], one.draws - other.draws))
    low, high = np.array(ends).T
    covered = (low <= np.mean(values)) & (np.mean(values) <= high)
    return float(covered.mean()), float((high - low).mean() / 2 / (1.96 * np.std(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=100, help="recordings per line (default 100)")
    repeats = parser.parse_args().repeats
    print(f"| metric | images | neurons | subjects differ by | covered, of {repeats} | half width / 1.96 sd |")
    print("|---|---|---|---|---|---|")
    for metric, n, neurons, differ in CASES:
        covered, width = simulated(metric, n, neurons, differ, repeats)
        print(f"| {metric} | {n} | {neurons} | {differ} | {round(covered * repeats)} | {width:.2f} |", flush=True)


if __name__ == "__main__":
    main()
