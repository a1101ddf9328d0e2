"""Every layer of every network against every region of every recording, with controls and intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from localsim import __version__
from localsim.analysis import controls as networks
from localsim.analysis.brain.asked import check_recordings, metric_for, open_recordings
from localsim.analysis.brain.baselines import BASELINES
from localsim.analysis.brain.metrics import NeuralMetric, Predictor, Target
from localsim.analysis.brain.readers import Reader, baseline_reader, network_reader, predictors_of, told_where
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.brain.scores import EVERY, BrainScore, BrainScores, Place
from localsim.analysis.brain.stage_choice import BestStage, best_stage
from localsim.analysis.brain.training import training_behind
from localsim.analysis.regimes import Layer, Subject, open_subjects, untrained_twins
from localsim.analysis.spatial import POOLED
from localsim.assembly import build_credit, build_trunk
from localsim.credit import Credit
from localsim.errors import UserError, one_of
from localsim.rng import key

SHUFFLED = "shuffled"
CONTROLS = (*networks.CONTROLS, *BASELINES, SHUFFLED)
"""Untrained networks, baselines that have learned nothing, and responses given to other images than their own."""
DEFAULT_CONTROLS = ("untrained", *BASELINES, SHUFFLED)


def score(
    *subjects: Any,
    recordings: str | Path | Recording | Sequence[str | Path | Recording],
    metric: str | NeuralMetric | None = None,
    layers: str | Mapping[str, Any] = "ends",
    regions: Sequence[str] | None = None,
    bins: str = "mean",
    controls: Sequence[str] = DEFAULT_CONTROLS,
    over_training: bool = False,
    choose_stage: bool = False,
    resamples: int | None = None,
    seed: int = 0,
    spatial: str = POOLED,
    image_size: int | None = None,
    batch_size: int = 128,
    device: str | None = None,
    precision: str = "full",
    cache: str | Path | None = None,
    progress: bool = False,
) -> BrainScores:
    """Return how well every layer of several networks predicts, or resembles, what was recorded from every region.

    Features of a network are taken once per recording, reduced as they come, and serve all its layers' scores, their
    intervals, their chance levels and all regions. Nothing is chosen on the data that it is scored on.

    Args:
        subjects: runs or their folders, networks or names as `features` takes them, or, for one recording, `Features`
            or mappings of layer names to arrays `(n, p)`.
        recordings: folders, see `load_recordings`, or `Recording`s.
        metric: of `metrics.METRICS`, or one made by `get_metric`; by default `ridgecv`, for RDMs `rdm`.
        layers: see `localsim.analysis.compare`.
        regions: which; by default all.
        bins: `mean` over time bins, or `each` as a recording of its own.
        controls: of `CONTROLS`; by default all but `calibrated`.
        over_training: also score every snapshot of each run, and its untrained network as step 0.
        choose_stage: also score each network's best stage, chosen by other images, see `best_stage`.
        resamples: draws of images and neurons for 95 % intervals, 0 for none; by default as many as the metric says.
        seed: of draws, shuffled responses, folds, random projections and untrained networks by name.
        spatial: how maps become vectors, see `localsim.analysis.spatial`; recorded with the scores. The baselines are
            reduced as `BASELINES` says.
        image_size: pixels to show the images at, whole; by default what each network was trained on.
        batch_size, device, precision, cache: see `features`.
        progress: show a bar on a terminal.

    Raises:
        UserError: recordings that cannot be read or have the same name, a metric that needs what they do not hold, an
            unknown control or region, arrays for several recordings, or as `features` says.
    """
    controls = tuple(dict.fromkeys(controls))
    for control in controls:
        if control not in CONTROLS:
            raise one_of("control", control, CONTROLS)
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size is {image_size}; allowed: pixels, from 1")
    recorded = open_recordings(recordings, bins=bins, regions=regions)
    chosen = metric_for(recorded, metric)
    resamples = chosen.resamples if resamples is None else resamples
    check_recordings(recorded, chosen, resamples=resamples, choose_stage=choose_stage, seed=seed)
    places = [(one.name, region) for one in recorded for region in one.areas]
    pooled = _pooled(recorded, places, bins)
    of_networks = [name for name in controls if name in networks.CONTROLS]
    opened = open_subjects(subjects, controls=of_networks, over_training=over_training, seed=seed) if subjects else []
    runs = [one for one in opened if one.run is not None]
    training = _training(runs) if over_training else {}
    shuffle_seed = seed if SHUFFLED in controls else None
    found: dict[tuple[str, str, Layer], BrainScore] = {}
    best: list[BestStage] = []
    settings = {"batch_size": batch_size, "device": device, "precision": precision, "cache": cache, "seed": seed}
    together = _by_images(recorded)
    readers = [network_reader(one, layers, spatial, image_size, len(together), settings) for one in opened]
    readers += [baseline_reader(name, settings) for name in controls if name in BASELINES]
    if not readers:
        raise UserError("there is nothing to score; give a run, a network, or one of the controls pixels and gabor")
    with tqdm(total=len(together) * len(readers), desc="networks", disable=None if progress else True) as bar:
        for same in together:
            targets = (
                _Targets.of(chosen, one.of(region), resamples, seed, shuffle_seed)
                for one in same
                for region in one.areas
            )
            made, stages = _score_images(chosen, same[0], list(targets), readers, device, choose_stage, seed, bar)
            found |= made
            best += stages
    everything = tuple(dict.fromkeys(layer for _, _, layer in found))
    record = {
        "recordings": {one.name: _described(one) for one in recorded},
        "metric": {"options": dict(chosen.options), "shuffles": chosen.shuffles},
        "regions": list(dict.fromkeys(region for _, region in places)),
        "pooled": [
            {"recording": name, "region": region, "of": [one for one, _ in members]}
            for (name, region), members in pooled.items()
        ],
        "bins": bins,
        "layers": layers if isinstance(layers, str) else dict(layers),
        "controls": list(controls),
        "baselines": [name for name in controls if name in BASELINES],
        "end_to_end": list(
            dict.fromkeys(one.regime for one in runs if one.learned and one.step is None and _is_end_to_end(one))
        ),
        "unlearned": list(dict.fromkeys(one.regime for one in opened if not one.learned)),
        "resamples": resamples,
        "interval": chosen.over if resamples else None,
        "seed": seed,
        "spatial": spatial,
        "image_size": image_size,
        "precision": precision,
        "version": __version__,
        "runs": list(dict.fromkeys(str(one.run.path) for one in runs if one.run is not None)),
    }
    sizes = {one.name: (one.images_hash, len(one)) for one in recorded}
    for place, members in pooled.items():
        n = sum(dict(sizes[name] for name, _ in members).values())  # images that several share count once
        for layer in everything:
            found[*place, layer] = BrainScore.mean([found[*member, layer] for member in members], n)
    return BrainScores(chosen, everything, found, training, untrained_twins(opened), best, record)


def _score_images(
    metric: NeuralMetric,
    shown: Recording,
    targets: Sequence[_Targets],
    readers: Sequence[Reader],
    device: str | None,
    choose_stage: bool,
    seed: int,
    bar: tqdm,
) -> tuple[dict[tuple[str, str, Layer], BrainScore], list[BestStage]]:
    """Return the scores, and the best stages, of all networks for what was recorded to the same images.

    The targets, whose resamples may take much memory, are gone when it returns.
    """
    found: dict[tuple[str, str, Layer], BrainScore] = {}
    best: list[BestStage] = []
    for read in readers:
        predictors = predictors_of(metric, *read(shown), device)
        network = {layer: own for layer, own in predictors.items() if layer.step is None and layer.depth > 0}
        for layer, predictor in predictors.items():  # all regions of a layer in turn: they share its decompositions
            for target in targets:
                recording = target.own.recording
                found[recording.name, recording.areas[0], layer] = told_where(
                    layer, lambda p=predictor, t=target: t.score(metric, p)
                )
        if choose_stage and network:
            best += [best_stage(metric, network, target.own.recording, seed) for target in targets]
        bar.update()
    return found, best


@dataclass(frozen=True)
class _Targets:
    """What one region's responses are to be compared with, as they are and given to other images."""

    own: Target
    shuffled: Sequence[Target]

    @classmethod
    def of(
        cls, metric: NeuralMetric, recording: Recording, resamples: int, seed: int, shuffle_seed: int | None
    ) -> _Targets:
        own = metric.target(recording, draws=resamples, seed=seed)
        seeds = [] if shuffle_seed is None else [key(shuffle_seed, "shuffle", n) for n in range(metric.shuffles)]
        return cls(own, [metric.target(recording.shuffled(one)) for one in seeds])

    def score(self, metric: NeuralMetric, predictor: Predictor) -> BrainScore:
        outcome = metric.compare(predictor, self.own)
        chances = [metric.compare(predictor, one).value for one in self.shuffled]
        chance = fmean(chances) if chances else None
        ceiling, recording, reason = self.own.ceiling, self.own.recording, self.own.ceiling_or_reason
        ceiled = None if ceiling is None else metric.ceiled(outcome.value, ceiling.value)
        return BrainScore(
            outcome.value, outcome.draws, chance, ceiling, ceiled, len(recording), len(recording.regions), metric.low,
            metric.high, reason if isinstance(reason, str) else "",
        )  # fmt: skip


def _by_images(recorded: Sequence[Recording]) -> list[list[Recording]]:
    """Return together what belongs to the same images, such as time bins: networks see these once."""
    found: dict[int, list[Recording]] = {}
    for one in recorded:
        found.setdefault(id(one.images), []).append(one)
    return list(found.values())


def _pooled(recorded: Sequence[Recording], places: Iterable[Place], bins: str) -> dict[Place, list[Place]]:
    """Return which recordings' scores to average: those of one region, and one time bin, where there are several."""
    # bins of unknown times are no one's but their recording's
    spans = {one.name: (one.bins or one.name) if bins == "each" else None for one in recorded}
    together: dict[tuple[str, Any], list[Place]] = {}
    for recording, region in places:
        together.setdefault((region, spans[recording]), []).append((recording, region))
    made = {}
    for (region, span), members in together.items():
        if len(members) > 1:
            when = "" if span is None else f" {span[0][0]:g}-{span[0][1]:g} ms"
            made[f"{EVERY}{when}", region] = members
    for name, _ in made:
        if name in spans:
            raise UserError(f"a recording is called {name!r}, as the mean over recordings is; give it another name")
    return made


def _described(recording: Recording) -> dict[str, Any]:
    return {
        "n": len(recording),
        "of": "matrices" if recording.responses is None else "neurons",
        "citation": recording.citation,
        "degrees": recording.degrees,
        "images": recording.images_hash,
        "answers": recording.answers_hash,
    }


def _is_end_to_end(subject: Subject) -> bool:
    """Return whether a single loss on top changes everything by exact gradients, whatever the rule is called."""
    assert subject.run is not None
    config = subject.run.config
    num = len(build_trunk(config)[1])
    return config.transport == "exact" and build_credit(config, num) == Credit.end_to_end(num)


def _training(subjects: Sequence[Subject]) -> dict[tuple[str, int | None, int | None], tuple[float, float]]:
    made: dict[tuple[str, int | None, int | None], tuple[float, float]] = {}
    runs = {str(one.run.path): one.run for one in subjects if one.run is not None and one.learned}
    for path, run in runs.items():
        own = [one for one in subjects if one.run is not None and str(one.run.path) == path and one.learned]
        behind = training_behind(run, [run.step if one.step is None else one.step for one in own])
        for one in own:
            made[one.regime, one.seed, one.step] = behind[run.step if one.step is None else one.step]
    return made
