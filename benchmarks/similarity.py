"""Time and peak memory of similarity matrices: localsim beside torch_cka, rsatoolbox, scikit-learn and plain numpy.

    python benchmarks/similarity.py
    python benchmarks/similarity.py --images 1000 --only rsa predictivity
    OMP_NUM_THREADS=1 python benchmarks/similarity.py          # where other programs run on the machine

What the rows and columns mean, and how to read them: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from localsim.analysis.extraction import feature_batches, features
from localsim.analysis.similarity import Measure, get_measure, score_pairs
from localsim.analysis.similarity.alignment import cka_measure
from localsim.analysis.similarity.measure import Numerics
from localsim.analysis.similarity.prediction import PENALTIES, Layer
from localsim.rng import key

LAYERS = ["layer1", "layer2", "layer3", "layer4"]
UNITS = [f"{layer}.{i}" for layer, units in zip(LAYERS, (3, 4, 6, 3), strict=True) for i in range(units)]
BATCH = 250
FOLDS = 5  # as `predictivity` has by default

Work = Callable[[], np.ndarray]
"""Does what is timed, and returns the scores."""


@dataclass(frozen=True)
class Task:
    """What contestants do.

    Attributes:
        words: for the table.
        data: which of `DATA` it is done with.
        contestants: by name of the package, `open(folder)`, which imports and opens what is needed and returns the
            work. The first is localsim.
    """

    words: str
    data: str
    contestants: dict[str, Callable[[Path], Work]]


def make_images(n: int, size: int) -> np.ndarray:
    """Return images `(n, 3, size, size)` uint8: coarse patches of colour under fine noise."""
    random = np.random.default_rng(key(0, "benchmark", "images"))
    coarse = random.integers(0, 216, (n, 3, 8, 8), dtype=np.uint8)
    side = -(-size // 8)
    patches = coarse.repeat(side, axis=2).repeat(side, axis=3)[:, :, :size, :size]
    return patches + random.integers(0, 40, patches.shape, dtype=np.uint8)


def make_pooled(folder: Path, chosen: argparse.Namespace) -> None:
    """Write features `(n, p)` of four stages of two networks, means over space; p = 256, 512, 1024, 2048."""
    images = make_images(chosen.images, chosen.image_size)
    for name in "ab":
        features(network(name), images, modules=LAYERS, batch_size=BATCH, to=folder / name)


def make_wide(folder: Path, chosen: argparse.Namespace) -> None:
    """Write features `(n, p)` of one layer of two networks, of 50 latent dimensions that both share, and noise."""
    latent = np.random.default_rng(key(0, "benchmark", "latent")).standard_normal((chosen.wide_images, 50), np.float32)
    for name in "ab":
        random = np.random.default_rng(key(0, "benchmark", name))
        (folder / name).mkdir(parents=True)
        where, shape = folder / name / "layer1.npy", (chosen.wide_images, chosen.wide)
        made = np.lib.format.open_memmap(where, mode="w+", dtype=np.float32, shape=shape)
        weights = random.standard_normal((50, chosen.wide), np.float32)
        for start in range(0, len(made), 100):
            rows = latent[start : start + 100] @ weights
            made[start : start + 100] = np.maximum(rows + 5 * random.standard_normal(rows.shape, np.float32), 0)
        made.flush()


def save_images(folder: Path, chosen: argparse.Namespace) -> None:
    """Write the images themselves: their features are part of the work."""
    folder.mkdir(parents=True)
    np.save(folder / "images.npy", make_images(chosen.images, chosen.image_size))


DATA = {"pooled": make_pooled, "wide": make_wide, "images": save_images}


def network(name: str) -> torch.nn.Module:
    """Return an untrained ResNet-50, of its own seed for `a` and `b`, whose batch norms have seen some images.

    Without their statistics activations grow from unit to unit until all images look the same but for rounding.
    """
    from torchvision.models import resnet50

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(ord(name))
        net = resnet50()
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        net.train()(torch.from_numpy(make_images(64, 64)).float() / 255)
        return net.eval()


def opened(folder: Path, name: str) -> list[np.ndarray]:
    """Return the memory-mapped features of a network, lowest layer first."""
    return [np.load(file, mmap_mode="r") for file in sorted((folder / name).glob("layer*.npy"))]


def with_localsim(measure: Measure) -> Callable[[Path], Work]:
    def open_(folder: Path) -> Work:
        a, b = opened(folder, "a"), opened(folder, "b")
        return lambda: localsim_matrix(measure, a, b)

    return open_


def localsim_matrix(measure: Measure, a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
    numerics = Numerics.of(a[0])
    layers = {(of, i): measure.represent(x, numerics) for of, net in (("a", a), ("b", b)) for i, x in enumerate(net)}
    return scores_of(measure, layers, len(a[0]))


def scores_of(measure: Measure, layers: dict[tuple[str, int], Any], n: int) -> np.ndarray:
    """Return the scores `(layers of a, layers of b)`."""
    a, b = ([name for name in layers if name[0] == of] for of in "ab")
    scores = score_pairs(measure, layers, [(x, y) for x in a for y in b], n)
    return np.array([[scores[x, y].value for y in b] for x in a])


def localsim_networks(modules: list[str], folder: Path) -> Work:
    """One batch after another: its features and their inner products, which are all that is kept of it."""
    images, nets = np.load(folder / "images.npy"), {name: network(name) for name in "ab"}
    measure = cka_measure(debiased=True, batch=BATCH)

    def work() -> np.ndarray:
        layers: dict[tuple[str, int], tuple[Any, ...]] = {}
        for name, net in nets.items():
            for made in feature_batches(net, images, modules=modules, spatial="flatten", batch_size=BATCH):
                for i, module in enumerate(modules):
                    x = made.pop(module)
                    layers[name, i] = layers.get((name, i), ()) + measure.represent(x, Numerics.of(x))
        return scores_of(measure, layers, len(images))

    return work


def torch_cka_networks(modules: list[str], folder: Path) -> Work:
    """torch_cka as it is, but without gradients: it does not switch them off, and would keep every activation."""
    from torch.utils.data import DataLoader, TensorDataset
    from torch_cka import CKA

    images, (a, b) = torch.from_numpy(np.load(folder / "images.npy")), (network(name) for name in "ab")

    def batch(rows: list[Any]) -> tuple[torch.Tensor]:
        return (torch.stack([row[0] for row in rows]).float() / 255,)

    def work() -> np.ndarray:
        alike = CKA(a, b, model1_name="a", model2_name="b", model1_layers=modules, model2_layers=modules)
        loaders = [DataLoader(TensorDataset(images), batch_size=BATCH, collate_fn=batch) for _ in "ab"]
        with torch.no_grad():
            alike.compare(*loaders)
        return alike.export()["CKA"].numpy()

    return work


def numpy_cka(folder: Path) -> Work:
    """The formula pair by pair, as in most notebooks; in float64, since features are not centred."""
    a, b = opened(folder, "a"), opened(folder, "b")

    def hsic(k: np.ndarray, m: np.ndarray) -> float:  # Song et al. 2012, eq. 5, of matrices with a zero diagonal
        n = len(k)
        rows, totals = k.sum(0) @ m.sum(0), k.sum() * m.sum()
        return ((k * m).sum() + totals / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))

    def cka(x: np.ndarray, y: np.ndarray) -> float:
        k, m = (z @ z.T for z in (x.astype(np.float64), y.astype(np.float64)))
        np.fill_diagonal(k, 0)
        np.fill_diagonal(m, 0)
        return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))

    return lambda: np.array([[cka(x, y) for y in b] for x in a])


def rsatoolbox_rsa(folder: Path) -> Work:
    from rsatoolbox.data.dataset import Dataset
    from rsatoolbox.rdm.calc import calc_rdm
    from rsatoolbox.rdm.compare import compare

    a, b = opened(folder, "a"), opened(folder, "b")

    def work() -> np.ndarray:
        data: list[Any] = [[Dataset(x) for x in net] for net in (a, b)]
        first, second = (calc_rdm(sets, method="correlation") for sets in data)
        return compare(first, second, method="spearman")

    return work


def sklearn_predictivity(folder: Path) -> Work:
    """RidgeCV on the folds of localsim and with its penalties; it chooses by the error of leaving one image out."""
    from sklearn.linear_model import RidgeCV

    a, b = opened(folder, "a"), opened(folder, "b")
    n = len(a[0])
    tests = [fold.numpy() for fold in Layer.of(torch.arange(float(n))[:, None], FOLDS, 0).folds]

    def r2(x: np.ndarray, y: np.ndarray) -> float:
        left = total = 0.0
        for test in tests:
            train = np.setdiff1d(np.arange(n), test)
            size = (x[train] - x[train].mean(0)).var(0, dtype=np.float64).sum()
            fitted = RidgeCV(np.array(PENALTIES) * size).fit(x[train], y[train]).predict(x[test])
            left += np.square(y[test] - fitted).sum(dtype=np.float64)
            total += np.square(y[test] - y[train].mean(0)).sum(dtype=np.float64)
        return 1 - left / total

    return lambda: np.array([[r2(x, y) for y in b] for x in a])


def with_networks(modules: list[str]) -> Task:
    return Task(
        f"minibatch CKA of flattened maps, batches of {BATCH}, forward passes included",
        "images",
        {"localsim": partial(localsim_networks, modules), "torch_cka": partial(torch_cka_networks, modules)},
    )


TASKS = {
    "cka_minibatch": with_networks(LAYERS),
    "cka_minibatch_units": with_networks(UNITS),
    "cka": Task(
        "debiased CKA",
        "pooled",
        {"localsim": with_localsim(get_measure("cka_debiased")), "numpy": numpy_cka},
    ),
    "rsa": Task(
        "RSA, correlation distance, Spearman",
        "pooled",
        {"localsim": with_localsim(get_measure("rsa")), "rsatoolbox": rsatoolbox_rsa},
    ),
    "predictivity": Task(
        f"ridge predictivity, {FOLDS} folds",
        "pooled",
        {"localsim": with_localsim(get_measure("predictivity")), "scikit-learn": sklearn_predictivity},
    ),
    "cka_wide": Task(
        "debiased CKA",
        "wide",
        {"localsim": with_localsim(get_measure("cka_debiased")), "numpy": numpy_cka},
    ),
    "rsa_wide": Task(
        "RSA, correlation distance, Spearman",
        "wide",
        {"localsim": with_localsim(get_measure("rsa")), "rsatoolbox": rsatoolbox_rsa},
    ),
}


@dataclass(frozen=True)
class Outcome:
    """Of one run: seconds by the clock and of the processor, bytes of peak resident memory above what was there before
    (0 where unknown), scores."""

    seconds: float
    busy: float
    peak: int
    scores: np.ndarray


def measured(task: str, contestant: str, folder: Path) -> Outcome:
    """Do the work once and return what it took; call it in a process of its own."""
    work = TASKS[task].contestants[contestant](folder)
    before = resident_peak(reset=True)
    start, busy = time.perf_counter(), time.process_time()
    scores = work()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return Outcome(seconds, busy, resident_peak() - before, np.asarray(scores, np.float64))


def resident_peak(*, reset: bool = False) -> int:
    """Return the largest resident size so far, in bytes, perhaps after setting it to the present one; else 0."""
    process = Path("/proc/self")
    if not (process / "clear_refs").exists():  # Linux only
        return 0
    if reset:
        (process / "clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
    return 1024 * int(found[1]) if found else 0


def alone(task: str, contestant: str, folder: Path) -> Outcome:
    """Return `measured` of a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, task, contestant, folder).result()


def installed(contestant: str) -> bool:
    return importlib.util.find_spec({"scikit-learn": "sklearn"}.get(contestant, contestant)) is not None


def lines(task: str, folder: Path, chosen: argparse.Namespace) -> Iterator[str]:
    """Yield the table's lines of a task: repeats go round the contestants, so that each meets the same load."""
    names = [name for name in TASKS[task].contestants if installed(name) and name not in chosen.without]
    runs: dict[str, list[Outcome]] = {name: [] for name in names}
    for _ in range(chosen.repeats):
        for name in names:
            runs[name].append(alone(task, name, folder))
    own = median(runs[names[0]])
    shape = " x ".join(map(str, own.scores.shape))
    wide = TASKS[task].data == "wide"
    n = chosen.wide_images if wide else chosen.images
    what = f"{TASKS[task].words}; {shape} layers, n = {n:,}" + (f", p = {chosen.wide:,}" if wide else "")
    for name, outcomes in runs.items():
        one = median(outcomes)
        ratios = " | ".join(
            f"{x / y:.1f}" if y else "?"
            for x, y in ((one.seconds, own.seconds), (one.busy, own.busy), (one.peak, own.peak))
        )
        far = float(np.abs(one.scores - own.scores).max())
        yield (
            f"| {what} | {name} | {one.seconds:.1f} | {one.busy:.1f} | {one.peak / 1e6:.0f} | {ratios} | {far:.0e} |"
        )
        what = ""


def median(outcomes: list[Outcome]) -> Outcome:
    """Return medians of what the runs took, each by itself, and their scores, which are the same in all."""
    seconds, busy, peak = (
        statistics.median(getattr(one, of) for one in outcomes) for of in ("seconds", "busy", "peak")
    )
    return Outcome(seconds, busy, int(peak), outcomes[0].scores)


def machine() -> str:
    """Return a sentence about the machine and the versions that are measured."""
    names = ["torch", "torchvision", "numpy", "scipy", "torch_cka", "rsatoolbox", "scikit-learn"]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if installed(name))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GB of memory, {torch.get_num_threads()} "
        f"thread(s), load {os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, {versions}."
    )


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--wide", type=int, default=100_000, help="dimensions of the wide layers")
    parser.add_argument("--wide-images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), metavar="ROW", help=", ".join(TASKS))
    parser.add_argument("--without", nargs="+", default=[], metavar="CONTESTANT", help="contestants to leave out")
    parser.add_argument("--scratch", type=Path, help="a folder with room for the features, about 6 GB by default")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    chosen = arguments(given)
    print(machine(), end="\n\n", flush=True)
    print("| what | by | seconds | CPU seconds | peak MB | seconds / ours | CPU / ours | peak / ours | difference |")
    print("|---" * 9 + "|", flush=True)
    for data in dict.fromkeys(TASKS[task].data for task in chosen.only):
        folder = Path(tempfile.mkdtemp(prefix="localsim-benchmark-", dir=chosen.scratch)) / data
        try:
            DATA[data](folder, chosen)
            for task in chosen.only:
                if TASKS[task].data == data:
                    for line in lines(task, folder, chosen):
                        print(line, flush=True)
        finally:
            shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
