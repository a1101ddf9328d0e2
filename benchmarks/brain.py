"""Time and peak memory of scoring runs against recordings: localsim beside Brain-Score's own wrapper.

    OMP_NUM_THREADS=1 python benchmarks/brain.py RUN... --recordings DIR --sample
    OMP_NUM_THREADS=1 python benchmarks/brain.py RUN... --recordings DIR --full
    python benchmarks/brain.py --sample                     # a small network and made-up neurons

`--sample` prints a part of the work done by everybody, one run against one recording; `--full` all of it, by localsim.
What the rows and columns mean, and how to read them: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from similarity import Outcome, Work, make_images, median, resident_peak
from torch import nn

from localsim import load_run
from localsim.analysis.brain import assemblies
from localsim.analysis.brain.loading import load_recordings
from localsim.analysis.brain.preparing import brainscore_at_hand, quiet
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.brain.scores import BrainScores
from localsim.analysis.brain.scoring import DEFAULT_CONTROLS, score
from localsim.analysis.sources import Source
from localsim.analysis.stimuli import shown
from localsim.data import ImageSet
from localsim.data.images import decode
from localsim.errors import UserError, one_of
from localsim.network import LocalNetwork
from localsim.rng import key

GRID = 4  # maps are pooled to 4 x 4 regions on both sides, which is localsim's default
METRICS = ("pls", "ridgecv")


@dataclass(frozen=True)
class Job:
    """What is scored.

    Attributes:
        runs: folders; none: one small network, drawn by a seed.
        recordings: a folder; None: made-up neurons.
        names: of the recordings to take; None: all.
        metric: of `METRICS`.
        data_root: where the runs' own images lie, if no longer where they were trained.
    """

    runs: tuple[str, ...]
    recordings: str | None
    names: tuple[str, ...] | None
    metric: str
    data_root: str | None = None

    def networks(self) -> list[Any]:
        """Return what `score` is given."""
        if not self.runs:
            return [small()]
        return [load_run(run).moved(data_root=self.data_root) for run in self.runs]

    def layers(self) -> Any:
        return "stages" if self.runs else {"modules": list(small().network._modules)}

    def opened(self) -> list[Recording]:
        """Return the recordings with their images."""
        found = [made_up()] if self.recordings is None else load_recordings(self.recordings)
        known = [one.name for one in found]
        for name in self.names or ():
            if name not in known:
                raise one_of("recording", name, known)
        return found if self.names is None else [one for one in found if one.name in self.names]


def small() -> Source:
    """Return a network of two layers, one with maps that are pooled and one with maps of 3 x 3, which are kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(0, "benchmark", "network") % 2**31)
        first = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        second = nn.Sequential(nn.Conv2d(6, 12, 3, 6, 1), nn.ReLU())
        return Source("small", nn.Sequential(OrderedDict(first=first, second=second)), size=32)


def made_up(images: int = 120, neurons: int = 7, trials: int = 4) -> Recording:
    """Return noisy responses to patches of colour, of neurons that add up those of each half with their own weights."""
    pixels = make_images(images, 40)
    random = np.random.default_rng(key(0, "benchmark", "neurons"))
    halves = pixels.reshape(images, 3, 40, 2, 20).mean((2, 4)).reshape(images, 6)
    signal = (halves - halves.mean(0)) @ random.standard_normal((6, neurons))
    noise = random.standard_normal((images, neurons, trials))
    return Recording(
        "made up",
        ImageSet(torch.from_numpy(pixels), None, None),
        (signal / signal.std(0))[:, :, None] + 0.5 * noise,
        regions=("V4",) * neurons,
        degrees=8,
    )


def values(found: BrainScores) -> np.ndarray:
    """Return the scores, network after network and recording after recording, lowest layer first."""
    means = {group["recording"] for group in found.record["pooled"]}
    places = dict.fromkeys((name, region) for name, region, _ in found.scores if name not in means)
    networks = dict.fromkeys((layer.regime, layer.seed) for layer in found.layers)
    order = [
        (*place, layer)
        for network in networks
        for place in places
        for layer in found.layers
        if (layer.regime, layer.seed) == network
    ]
    return np.array([found.scores[one].value for one in order])


def localsim(job: Job, folder: Path) -> Work:
    """Scores alone, as Brain-Score gives them: no intervals, no controls."""
    networks, recordings, layers = job.networks(), job.opened(), job.layers()
    for one in networks:
        Source.of(one)  # reads the runs' own data set, for how images are shown
    options: dict[str, Any] = {"metric": job.metric, "layers": layers, "controls": [], "resamples": 0}
    return lambda: values(score(*networks, recordings=recordings, **options))


def brainscore(job: Job, folder: Path, *, once: bool) -> Work:
    """Brain-Score's benchmark objects and models, its cache off: it goes by names, which checkpoints share.

    Args:
        job, folder: what, and where to write.
        once: take the features of all layers of a network in one pass, and score them as `PrecomputedFeatures`;
            otherwise every layer is a `ModelCommitment`, as the documentation has it, and `LayerScores` does.
    """
    brainscore_at_hand()
    with quiet():
        from brainscore_vision.benchmark_helpers import PrecomputedFeatures  # type: ignore[import-not-found]
        from brainscore_vision.model_helpers.brain_transformation import ModelCommitment  # type: ignore[import-not-found]

        sources = [Source.of(one).whole() for one in job.networks()]
        benchmarks = [
            (one, region, assemblies.benchmark(one, region, job.metric, folder=folder / "stimuli"))
            for one in job.opened()
            for region in one.areas
        ]

    def scores_of(wrapper: Any, modules: list[str], region: str, benchmark: Any, degrees: float) -> Iterator[float]:
        stimuli = benchmark._assembly.stimulus_set
        kept = wrapper(stimuli, layers=modules) if once else None
        for module in modules:
            if kept is not None:
                model = PrecomputedFeatures(kept[:, kept["layer"].values == module], degrees)
            else:
                model = ModelCommitment(
                    identifier=f"{wrapper.identifier}-{module}",
                    activations_model=wrapper,
                    layers=[module],
                    region_layer_map={region: module},
                    visual_degrees=degrees,
                )
            yield float(benchmark(model).attrs["raw"])

    def work() -> np.ndarray:
        found: list[float] = []
        for source in sources:
            wrapper, modules = wrapped(source), modules_of(source)
            for one, region, benchmark in benchmarks:
                # as wide as the benchmark's images, which are then shown as they are
                found += scores_of(wrapper, modules, region, benchmark, one.degrees or assemblies.DEGREES)
        return np.array(found)

    def quietly() -> np.ndarray:
        with quiet():
            return work()

    return quietly


def wrapped(source: Source) -> Any:
    """Return a network in Brain-Score's wrapper, shown images as localsim shows them, with pooled maps.

    Brain-Score's own bound on memory, LayerPCA, needs images of ImageNet.
    """
    from brainscore_vision.model_helpers.activations.pytorch import PytorchWrapper  # type: ignore[import-not-found]

    look = {"size": source.size, "mean": source.mean, "std": source.std, "grey": source.grey, "crop": source.crop}

    def show(paths: list[str]) -> np.ndarray:
        return shown([decode(Path(path)) for path in paths], **look, device=torch.device("cpu")).numpy()

    def pool(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for name, maps in batch.items():
            if maps.ndim == 4 and maps.shape[-1] > GRID:
                batch[name] = F.adaptive_avg_pool2d(torch.from_numpy(maps), GRID).numpy()
        return batch

    made = PytorchWrapper(model=source.network, preprocessing=show, identifier=source.name)
    made.register_batch_activations_hook(pool)
    return made


def modules_of(source: Source) -> list[str]:
    """Return the names of the modules that end a network's stages.

    Raises:
        UserError: the network cuts images into patches, whose maps the wrapper does not put together.
    """
    net = source.network
    if not isinstance(net, LocalNetwork):
        return list(net._modules)
    if net.patches is not None:
        raise UserError(f"{source.name} cuts images into patches, which Brain-Score's wrapper cannot; give other runs")
    return [point.where for point in source.points.stages]


CONTESTANTS: dict[str, Callable[[Job, Path], Work]] = {
    "localsim": localsim,
    "Brain-Score, features once": partial(brainscore, once=True),
    "Brain-Score, layer by layer": partial(brainscore, once=False),
}


def everything(job: Job, folder: Path, *, controls: tuple[str, ...], resamples: int) -> Work:
    """All that `localsim brain` does before it writes, from folders on."""

    def work() -> np.ndarray:
        recordings: Any = job.recordings if job.recordings is not None and job.names is None else job.opened()
        options: dict[str, Any] = {"metric": job.metric, "layers": job.layers()}
        return values(score(*job.networks(), recordings=recordings, controls=controls, resamples=resamples, **options))

    return work


FULL: dict[str, Callable[[Job, Path], Work]] = {
    "scores": partial(everything, controls=(), resamples=0),
    "and controls": partial(everything, controls=DEFAULT_CONTROLS, resamples=0),
    "and intervals": partial(everything, controls=DEFAULT_CONTROLS, resamples=1000),
}


def measured(contestant: Callable[[Job, Path], Work], job: Job, folder: Path) -> Outcome:
    """Do the work once and return what it took; call it in a process of its own.

    The same is done to the small network before, so that what is imported on the way is not measured.
    """
    tempfile.tempdir = str(folder)  # Brain-Score leaves images there
    contestant(Job((), None, None, job.metric), folder)()
    work = contestant(job, folder)
    before = resident_peak(reset=True)
    start, busy = time.perf_counter(), time.process_time()
    scores = work()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return Outcome(seconds, busy, resident_peak() - before, scores)


def alone(contestant: Callable[[Job, Path], Work], job: Job) -> Outcome:
    """Return `measured` of a fresh process, which writes to a folder that is removed."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="localsim-benchmark-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        pool = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
        return pool.submit(measured, contestant, job, folder).result()


def sample_lines(chosen: argparse.Namespace, job: Job) -> Iterator[str]:
    """Yield the table of a part of the work; repeats go round the contestants, so that each meets the same load."""
    one = job.opened()[0]
    names = [name for name in CONTESTANTS if name not in chosen.without and (name == "localsim" or installed())]
    yield "| what | by | seconds | CPU seconds | peak MB | seconds / ours | CPU / ours | peak / ours | difference |"
    yield "|---" * 9 + "|"
    for metric in chosen.metrics:
        part = Job(job.runs[:1], job.recordings, (one.name,), metric, job.data_root)
        runs: dict[str, list[Outcome]] = {name: [] for name in names}
        for _ in range(chosen.repeats):
            for name in names:
                runs[name].append(alone(CONTESTANTS[name], part))
        own = median(runs["localsim"])
        what = f"{metric}; 1 run x {len(own.scores)} layers, {one.name}: {len(one)} images, {len(one.names)} neurons"
        for name, outcomes in runs.items():
            found = median(outcomes)
            # each repeat by itself: the load changes between repeats, hardly within one
            pairs = [
                np.divide((x.seconds, x.busy, x.peak), (y.seconds, y.busy, y.peak or np.nan))
                for x, y in zip(outcomes, runs["localsim"], strict=True)
            ]
            ratios = " | ".join(f"{ratio:.1f}" for ratio in np.median(pairs, axis=0))
            far = float(np.abs(found.scores - own.scores).max())
            took = f"{found.seconds:.1f} | {found.busy:.1f} | {found.peak / 1e6:.0f}"
            yield f"| {what} | {name} | {took} | {ratios} | {far:.0e} |"
            what = ""


def full_lines(chosen: argparse.Namespace, job: Job) -> Iterator[str]:
    """Yield the table of all of the work by localsim, one measurement each."""
    yield "| what | localsim | numbers | seconds | CPU seconds | peak MB |"
    yield "|---" * 6 + "|"
    recordings = job.opened()
    for metric in chosen.metrics:
        what = f"{metric}; {max(1, len(job.runs))} runs, {len(recordings)} recordings"
        for name in chosen.rows:
            found = alone(FULL[name], Job(job.runs, job.recordings, job.names, metric, job.data_root))
            took = f"{found.seconds:.1f} | {found.busy:.1f} | {found.peak / 1e6:.0f}"
            yield f"| {what} | {name} | {len(found.scores)} | {took} |"
            what = ""


def installed() -> bool:
    return importlib.util.find_spec("brainscore_vision") is not None


def machine() -> str:
    """Return a sentence about the machine and the versions that are measured."""
    names = ["torch", "numpy", "scipy", "scikit-learn", "xarray", "brainscore-vision"]
    there = [name for name in names if name not in ("xarray", "brainscore-vision") or installed()]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in there)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), OMP_NUM_THREADS {threads}, load "
        f"{os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, {versions}."
    )


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders; --sample takes the first")
    parser.add_argument("--recordings", metavar="DIR", help="--sample takes the first, or --recording")
    parser.add_argument("--recording", metavar="NAME", help="take only this one")
    parser.add_argument("--data-root", metavar="DIR", help="where the runs' own images lie")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), metavar="METRIC")
    parser.add_argument("--repeats", type=int, default=3, help="of --sample")
    parser.add_argument("--without", nargs="+", default=[], choices=list(CONTESTANTS)[1:], metavar="CONTESTANT")
    parser.add_argument("--rows", nargs="+", default=list(FULL), choices=list(FULL), metavar="ROW", help="of --full")
    tables = parser.add_mutually_exclusive_group(required=True)
    tables.add_argument("--sample", action="store_true", help="one run against one recording, by everybody")
    tables.add_argument("--full", action="store_true", help="all runs against all recordings, by localsim")
    found = parser.parse_args(given)
    if bool(found.runs) != bool(found.recordings):
        parser.error("give both runs and --recordings, or neither for made-up ones")
    return found


def main(given: list[str] | None = None) -> None:
    chosen = arguments(given)
    print(machine(), end="\n\n", flush=True)
    names = None if chosen.recording is None else (chosen.recording,)
    job = Job(tuple(chosen.runs), chosen.recordings, names, chosen.metrics[0], chosen.data_root)
    for line in (sample_lines if chosen.sample else full_lines)(chosen, job):
        print(line, flush=True)


if __name__ == "__main__":
    main()
