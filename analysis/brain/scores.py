"""Scores of every layer of every network for every region, as tables: what `brain.score` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from localsim.analysis.brain.metrics import Ceiling, NeuralMetric
from localsim.analysis.brain.stage_choice import BestStage
from localsim.analysis.regimes import Layer
from localsim.analysis.statistics import centred_interval
from localsim.analysis.tables import as_csv
from localsim.errors import UserError, one_of
from localsim.files import write_json, write_text

EVERY = "all"
"""In the place of a recording: the mean over all recordings of a region."""

Place = tuple[str, str]
"""A recording's name and a region of it."""


@dataclass(frozen=True, eq=False)
class BrainScore:
    """How well one layer does for one region of one recording.

    Attributes:
        value: the metric's raw score, with its sign.
        draws: `(draws,)` the scores of resampled images and neurons, the same for all layers; none without resamples.
        chance: the score when every image gets the responses to another; None where it was not asked for.
        ceiling: reliability of the responses; None where nothing says how reliable they are.
        ceiled: `value` in units of the ceiling, see `NeuralMetric.ceiled`; None without one.
        n: images.
        neurons: how many, or how many matrices.
        low, high: the range of the metric.
        unceiled: why there is no ceiling, in a sentence.
    """

    value: float
    draws: np.ndarray
    chance: float | None
    ceiling: Ceiling | None
    ceiled: float | None
    n: int
    neurons: int
    low: float
    high: float
    unceiled: str = ""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of `value`, None without resamples."""
        return centred_interval(self.value, self.draws, self.low, self.high) if len(self.draws) else None

    @classmethod
    def mean(cls, scores: Sequence[BrainScore], n: int) -> BrainScore:
        """Return the mean over recordings, of n different images in all; equal images are drawn alike in each."""
        chances = [one.chance for one in scores if one.chance is not None]
        ceilings = [one.ceiling for one in scores if one.ceiling is not None]
        ceiled = [one.ceiled for one in scores if one.ceiled is not None]
        whole = len(scores)
        return cls(
            fmean(one.value for one in scores),
            np.mean([one.draws for one in scores], axis=0),
            fmean(chances) if len(chances) == whole else None,
            Ceiling(fmean(one.value for one in ceilings), ceilings[0].kind, None) if len(ceilings) == whole else None,
            fmean(ceiled) if len(ceiled) == whole else None,
            n,
            sum(one.neurons for one in scores),
            scores[0].low,
            scores[0].high,
            next((one.unceiled for one in scores if one.unceiled), ""),
        )


@dataclass(frozen=True)
class BrainRow:
    """The score of one layer for one region, as one line of a table: fields of `Layer` and `BrainScore`.

    `epoch` and `weight_updates` say how much training the weights have seen, see `training.training_behind`.
    """

    metric: str
    recording: str
    region: str
    regime: str
    seed: int | None
    step: int | None
    epoch: float | None
    weight_updates: float | None
    layer: str
    depth: float
    value: float
    low: float | None
    high: float | None
    chance: float | None
    ceiling: float | None
    ceiled: float | None
    n: int
    neurons: int


@dataclass(frozen=True, eq=False)
class BrainScores:
    """Scores by one metric of layers of networks, and of baselines, for regions of recordings.

    Attributes:
        metric: what they are scores by.
        layers: of one network after another, lowest first; baselines are layers of their own.
        scores: by recording, region and layer; recording `EVERY` is the mean over several recordings of a region.
        training: by regime, seed and step: epochs and weight updates behind the weights.
        untrained: by regime that learned: the regime of its untrained network, None if that is not among them.
        best: for each network and region, the score of the stage that other images choose; empty if not asked for.
        record: how it was made, as JSON holds it.
    """

    metric: NeuralMetric
    layers: tuple[Layer, ...]
    scores: Mapping[tuple[str, str, Layer], BrainScore]
    training: Mapping[tuple[str, int | None, int | None], tuple[float, float]]
    untrained: Mapping[str, str | None]
    best: Sequence[BestStage]
    record: Mapping[str, Any]

    @cached_property
    def regimes(self) -> list[str]:
        """The regimes, baselines among them, in order."""
        return list(dict.fromkeys(layer.regime for layer in self.layers))

    @cached_property
    def places(self) -> list[Place]:
        """Recordings and their regions; where a region has several recordings, their mean comes first."""
        found = list(dict.fromkeys((recording, region) for recording, region, _ in self.scores))
        pooled = {(group["recording"], group["region"]) for group in self.record["pooled"]}
        return sorted(found, key=lambda place: place not in pooled)

    @cached_property
    def headline(self) -> list[Place]:
        """One place for each region and time bin: the mean over recordings where there are several."""
        pooled = {(one, group["region"]) for group in self.record["pooled"] for one in group["of"]}
        return [place for place in self.places if place not in pooled]

    def score(self, recording: str, region: str, layer: Layer) -> BrainScore:
        """Return one score; UserError where there is none."""
        found = self.scores.get((recording, region, layer))
        if found is None:
            raise UserError(f"there is no score of {layer} for {region} of {recording}")
        return found

    def finished(self, regime: str) -> list[Layer]:
        """Return the layers of a regime's networks as they ended, of all its seeds.

        Raises:
            UserError: there is no such regime.
        """
        if regime not in self.regimes:
            raise one_of("regime", regime, self.regimes)
        return [layer for layer in self.layers if layer.regime == regime and layer.step is None]

    def matrix(self, regime: str, seed: int | None = None) -> dict[tuple[str, str], float]:
        """Return `{(layer, region): score}` of one network; of a region with several recordings, their mean.

        Args:
            regime, seed: which network; by default the regime's first seed.

        Raises:
            UserError: there is no such network.
        """
        layers = self.finished(regime)
        chosen = layers[0].seed if seed is None else seed
        if chosen not in (seeds := list(dict.fromkeys(layer.seed for layer in layers))):
            raise one_of(f"seed of {regime}", chosen, seeds)
        return {
            (layer.name, region): self.score(recording, region, layer).value
            for recording, region in self.headline
            for layer in layers
            if layer.seed == chosen
        }

    @property
    def rows(self) -> list[BrainRow]:
        """All scores as a tidy table."""
        rows = []
        for (recording, region, layer), one in self.scores.items():
            low, high = one.interval or (None, None)
            epoch, updates = self.training.get((layer.regime, layer.seed, layer.step), (None, None))
            rows.append(BrainRow(
                self.metric.name, recording, region, layer.regime, layer.seed, layer.step, epoch, updates, layer.name,
                layer.depth, one.value, low, high, one.chance, None if one.ceiling is None else one.ceiling.value,
                one.ceiled, one.n, one.neurons,
            ))  # fmt: skip
        return rows

    def to_csv(self) -> str:
        """Return the rows as comma-separated values, one header line."""
        return as_csv([asdict(row) for row in self.rows], list(BrainRow.__dataclass_fields__))

    def to_json(self) -> dict[str, Any]:
        """Return the record, what the metric is, the rows, differences and best stages, as JSON holds them."""
        from localsim.analysis.brain.contrasts import all_differences

        names = ("name", "summary", "source", "brainscore", "over")
        return {
            "metric": {name: getattr(self.metric, name) for name in names},
            "record": dict(self.record),
            "rows": [asdict(row) for row in self.rows],
            "differences": [asdict(row) | {"each": list(row.each)} for row in all_differences(self)],
            "best_stages": [asdict(row) for row in self.best],
        }

    def save(self, folder: str | Path) -> Path:
        """Write tables and figures, PNG and SVG, to a folder of the metric's name inside `folder`, and return it.

        Raises:
            UserError: the folder exists already.
        """
        from localsim.analysis import plots
        from localsim.analysis.brain.contrasts import BrainDifference, all_differences
        from localsim.analysis.brain.figures import brain_figures

        path = Path(folder) / self.metric.name
        if path.exists():
            raise UserError(f"{path} exists already; choose another folder, or move it away")
        write_text(path / "scores.csv", self.to_csv())
        found = [row.to_row() for row in all_differences(self)]
        write_text(path / "differences.csv", as_csv(found, list(BrainDifference.__dataclass_fields__)))
        if self.best:
            write_text(path / "best_stages.csv", as_csv([one.to_row() for one in self.best]))
        write_json(path / "brain.json", self.to_json())
        for name, figure in brain_figures(self).items():
            for suffix in (".png", ".svg"):
                plots.save(figure, path / f"{name}{suffix}")
        return path

    def __str__(self) -> str:
        from localsim.analysis.brain.printing import as_text

        return as_text(self)
