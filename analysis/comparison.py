"""Similarity within and between regimes: every layer of every network against every other, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from localsim import __version__
from localsim.analysis.profiles import ProfilePoint, profile_of
from localsim.analysis.regimes import Layer, Subject, common_images, open_subjects
from localsim.analysis.similarity import get_measure
from localsim.analysis.similarity.measure import Measure, Numerics, Precision, check_shape
from localsim.analysis.similarity.scoring import Score, interval_of, score_pairs
from localsim.analysis.statistics import check_resamples
from localsim.analysis.tables import as_csv
from localsim.errors import UserError, one_of
from localsim.files import write_json, write_text
from localsim.opening import open_device

IMAGES = 1000
"""Test images that networks are compared on where no number is given: a comparison takes the square of it."""


@dataclass(frozen=True)
class ComparisonRow:
    """How alike two layers are, as one line of a table: fields of `Layer`, twice, and of `Score`."""

    measure: str
    regime_a: str
    seed_a: int | None
    step_a: int | None
    layer_a: str
    depth_a: float
    regime_b: str
    seed_b: int | None
    step_b: int | None
    layer_b: str
    depth_b: float
    value: float
    low: float | None
    high: float | None
    n: int
    chance: float | None
    p: float | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """Scores of pairs of layers by one measure; prints itself as profiles over depth.

    Attributes:
        measure: what they are scores of.
        layers: of one network after another, lowest first.
        scores: by pair of layers. The first is the predictor where the measure is not symmetric; of a symmetric one
            each pair is there in one order.
        record: how it was made, as JSON holds it.
    """

    measure: Measure
    layers: tuple[Layer, ...]
    scores: Mapping[tuple[Layer, Layer], Score]
    record: Mapping[str, Any]

    @cached_property
    def finished(self) -> tuple[Layer, ...]:
        """The layers of networks as they ended, without the steps of their training."""
        return tuple(layer for layer in self.layers if layer.step is None)

    @cached_property
    def regimes(self) -> list[str]:
        """The regimes, in order."""
        return list(dict.fromkeys(layer.regime for layer in self.layers))

    def score(self, a: Layer, b: Layer) -> Score | None:
        """Return the score of two layers, or None where they were not compared."""
        found = self.scores.get((a, b))
        return self.scores.get((b, a)) if found is None and self.measure.symmetric else found

    def matrix(self) -> np.ndarray:
        """Return the scores `(L, L)` of all layers that are `finished`; row predicts column if not symmetric."""
        return np.array([[self.scores_of(a, b).value for b in self.finished] for a in self.finished])

    def scores_of(self, a: Layer, b: Layer) -> Score:
        """Return the score of two layers; UserError where they were not compared."""
        found = self.score(a, b)
        if found is None:
            raise UserError(f"{a} and {b} were not compared")
        return found

    def distances(self) -> np.ndarray:
        """Return distances `(L, L)` between the layers that are `finished`, for a map of them.

        A distance stays as it is; of a similarity s, a cosine or a share of agreement, it is the chord sqrt(2 - 2 s).
        Of an asymmetric measure both directions are averaged.
        """
        matrix = (self.matrix() + self.matrix().T) / 2
        if self.measure.kind == "similarity":
            matrix = np.sqrt(np.clip(2 - 2 * matrix, 0, None))
        np.fill_diagonal(matrix, 0)
        return matrix

    def profile(self, regime_a: str, regime_b: str, *, same_seed: bool = False) -> list[ProfilePoint]:
        """Return how alike two regimes are at each depth, see `localsim.analysis.profiles.profile_of`."""
        for regime in (regime_a, regime_b):
            if regime not in self.regimes:
                raise one_of("regime", regime, self.regimes)
        first, second = (
            [layer for layer in self.finished if layer.regime == regime] for regime in (regime_a, regime_b)
        )
        declared = self.measure
        return profile_of(
            self.score, first, second, same_seed=same_seed, symmetric=declared.symmetric,
            bounds=(declared.low, declared.high),
        )  # fmt: skip

    @property
    def rows(self) -> list[ComparisonRow]:
        """All scores as a tidy table."""
        return [
            ComparisonRow(
                self.measure.name, a.regime, a.seed, a.step, a.name, a.depth, b.regime, b.seed, b.step, b.name, b.depth,
                score.value, score.low, score.high, score.n, score.chance, score.p,
            )
            for (a, b), score in self.scores.items()
        ]  # fmt: skip

    def to_csv(self) -> str:
        """Return the rows as comma-separated values, one header line."""
        return as_csv([asdict(row) for row in self.rows], list(ComparisonRow.__dataclass_fields__))

    def to_json(self) -> dict[str, Any]:
        """Return the record, what the measure declares, and the rows, as JSON holds them."""
        names = ("name", "summary", "source", "kind", "low", "high", "symmetric", "metric", "bias")
        declared = {name: getattr(self.measure, name) for name in names}
        # JSON has no infinity
        declared |= {end: str(declared[end]) for end in ("low", "high") if not np.isfinite(declared[end])}
        declared["invariances"] = sorted(self.measure.invariances)
        return {"measure": declared, "record": dict(self.record), "rows": [asdict(row) for row in self.rows]}

    def save(self, folder: str | Path) -> Path:
        """Write table and figures, PNG and SVG, to a folder of the measure's name inside `folder`, and return it.

        Raises:
            UserError: the folder exists already.
        """
        from localsim.analysis import plots

        path = Path(folder) / self.measure.name
        if path.exists():
            raise UserError(f"{path} exists already; choose another folder, or move it away")
        write_text(path / "comparison.csv", self.to_csv())
        write_json(path / "comparison.json", self.to_json())
        for name, figure in plots.comparison_figures(self).items():
            for suffix in (".png", ".svg"):
                plots.save(figure, path / f"{name}{suffix}")
        return path

    def __str__(self) -> str:
        measure, n = self.measure, next(iter(self.scores.values())).n
        intervals = f"; 95 % intervals from {interval_of(measure)}" if self.record["resamples"] else ""
        end = "1 is alike" if measure.kind == "similarity" else "0 is alike"
        lines = [f"{measure.name}: {measure.kind}, {measure.bias}; {end}; n = {n} images{intervals}"]
        if all(layer.seed is None for layer in self.layers):
            return "\n".join([*lines, "", *_every_pair(self.scores, measure)])
        for place, a in enumerate(self.regimes):
            for b in self.regimes[place if measure.symmetric else 0 :]:
                for same_seed in (False, True):
                    if points := self.profile(a, b, same_seed=same_seed):
                        lines += ["", _title(a, b, measure, points[0]), *(f"  {point}" for point in points)]
        return "\n".join(lines)


def compare(
    *subjects: Any,
    images: Any = None,
    measure: str | Measure = "cka_debiased",
    layers: str | Mapping[str, Any] = "ends",
    controls: Sequence[str] = ("untrained",),
    over_training: bool = False,
    resamples: int = 200,
    permutations: int = 100,
    seed: int = 0,
    spatial: str = "mean",
    batch_size: int = 128,
    device: str | None = None,
    precision: str = "full",
    dtype: Precision | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Comparison:
    """Return how alike the layers of several networks are, within each and between them.

    Args:
        subjects: runs or their folders, networks or names as `features` takes them, `Features`, or mappings of layer
            names to arrays `(n, p)`.
        images: of networks: see `features`, or a number of the runs' own test images, balanced over classes; by default
            1000 of these.
        measure: a name in `localsim.analysis.similarity.MEASURES`, or a `Measure`.
        layers: of networks: `ends` (what ends the backbone's own stages, the same places in all runs of a backbone),
            `stages`, `units`, `readouts`, or the arguments of `features` that choose layers, e.g.
            `{"modules": ["layer3"]}`.
        controls: of `untrained` and `calibrated`, added once for each architecture and seed among the runs.
        over_training: also compare every snapshot of each run: with the run's own end, with its beginning, and with
            the other regimes at the same step and seed.
        resamples: draws for the 95 % intervals over images, 0 for none.
        permutations: mismatched orders of the images for the chance level, 0 for none.
        seed: of both, and of random projections.
        spatial, batch_size, device, precision, cache: see `features`.
        dtype: `float32` or `float64`; by default float64 where all that is compared is arrays in it, else float32.
        progress: show a bar on a terminal for the networks, and one for the resamples.

    Raises:
        UserError: fewer than two layers, networks that saw different images, an option that has no meaning for what is
            compared, or as `features` and `Measure` say.
    """
    chosen = get_measure(measure) if isinstance(measure, str) else measure
    if chosen.repeats:
        raise UserError(
            f"{chosen.name} takes repeated measurements (repeats, n, p), which nothing compared here has; call the "
            "measure itself, get_measure(name)(x, y)"
        )
    opened = open_subjects(subjects, controls=controls, over_training=over_training)
    if any(one.open is not None for one in opened):
        if images is None or isinstance(images, int):
            runs = [one.run for one in opened if one.run is not None]
            images = common_images(runs, IMAGES if images is None else images)
    elif images is not None or layers != "ends" or over_training:
        named = {"images": images is not None, "layers": layers != "ends", "over_training": over_training}
        given = next(name for name, is_given in named.items() if is_given)
        raise UserError(f"{given} has no meaning for arrays; allowed: with runs and networks")
    numerics = _numerics(opened, device, dtype)
    represented: dict[Layer, Any] = {}
    seen: dict[str, tuple[int, str | None]] = {}
    for subject in tqdm(opened, desc="networks", disable=None if progress else True):
        found, named_layers = subject.read(
            images, layers, spatial=spatial, batch_size=batch_size, device=device, precision=precision, cache=cache,
            seed=seed,
        )  # fmt: skip
        seen[subject.regime] = len(found.indices), found.record.get("images")
        _check_same_images(seen)
        for layer in named_layers:
            try:
                check_shape(found[layer.name])
                check_resamples(len(found[layer.name]), resamples)
                represented[layer] = chosen.represent(found[layer.name], numerics)
            except UserError as error:
                raise UserError(f"{layer}: {error}") from None
    everything = tuple(represented)
    if len(everything) < 2:
        raise UserError(f"a comparison needs two layers or more, not {len(everything)}")
    (n, _), *_ = seen.values()
    pairs = _pairs(everything, chosen)
    scores = score_pairs(chosen, represented, pairs, n, resamples, permutations, seed, progress=progress)
    record = {
        "n": n,
        "images": next((shown for _, shown in seen.values() if shown), None),
        "layers": layers if isinstance(layers, str) else dict(layers),
        "controls": list(controls),
        "resamples": resamples,
        "interval": interval_of(chosen) if resamples else None,
        "permutations": permutations,
        "seed": seed,
        "spatial": spatial,
        "precision": precision,
        "dtype": str(numerics.dtype).removeprefix("torch."),
        "unlearned": list(dict.fromkeys(one.regime for one in opened if not one.learned)),
        "data": sorted({one.run.config.data for one in opened if one.run is not None}),
        "version": __version__,
        "runs": list(dict.fromkeys(str(one.run.path) for one in opened if one.run is not None)),
    }
    return Comparison(chosen, everything, scores, record)


def _check_same_images(seen: Mapping[str, tuple[int, str | None]]) -> None:
    """Raise UserError where features are known to be of different images: by number, or by the hash of all pixels."""
    if len({n for n, _ in seen.values()}) > 1:
        counts = ", ".join(f"{regime} {n}" for regime, (n, _) in seen.items())
        raise UserError(f"the networks saw different numbers of images: {counts}; a comparison needs the same images")
    if len({shown for _, shown in seen.values() if shown}) > 1:
        raise UserError(f"{' and '.join(seen)} saw different images; a comparison needs the same in the same order")


def _numerics(opened: Sequence[Subject], device: Any, dtype: Precision | None) -> Numerics:
    """Return one precision for all layers, for they are multiplied with each other."""
    given = [values for one in opened if one.features is not None for values in one.features.values()]
    wide = all(one.open is None for one in opened) and all(values.dtype == np.float64 for values in given)
    place = "cpu" if device is None else open_device(str(device))
    return Numerics.of(np.empty(0), place, dtype or ("float64" if wide else "float32"))


def _pairs(layers: Sequence[Layer], measure: Measure) -> list[tuple[Layer, Layer]]:
    """Return which layers to compare: all that are finished with all; those of a step with what the plots need."""
    pairs = []
    for place, a in enumerate(layers):
        for b in layers[place if measure.symmetric else 0 :]:
            both_finished = a.step is None and b.step is None
            if both_finished or (a.name == b.name and a.seed == b.seed and _over_training(a, b)):
                pairs.append((a, b))
    return pairs


def _over_training(a: Layer, b: Layer) -> bool:
    if a.regime == b.regime:
        return a.step in (0, None) or b.step in (0, None)
    return a.step == b.step


def _every_pair(scores: Mapping[tuple[Layer, Layer], Score], measure: Measure) -> list[str]:
    """Return a line for each pair of different layers: of networks that are not runs, depths say little."""
    between = "with" if measure.symmetric else "predicts"
    return [f"  {a} {between} {b}  {score}" for (a, b), score in scores.items() if a != b]


def _title(a: str, b: str, measure: Measure, point: ProfilePoint) -> str:
    of = {True: " of the same seed", False: " of different seeds", None: ""}[point.same_seed]
    over = "" if point.low is None else f"; intervals over {point.over}"
    number = f"{point.seed_pairs} pair{'s' * (point.seed_pairs > 1)} of runs{of}"
    if a == b:
        how = f"{a} against itself" if measure.symmetric else f"{a} predicted from itself, in both directions"
        return f"{how}, {number}: as different as seeds are{over}"
    return f"{a} against {b}, {number}{over}" if measure.symmetric else f"{b} predicted from {a}, {number}{over}"
