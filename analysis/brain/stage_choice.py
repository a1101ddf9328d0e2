"""The score of a network's best stage for a region, where other images choose the stage than those it is scored on.

The largest of several scores is larger than what that stage would reach on new images: noise chooses too. Here each
fold of the images is scored by the stage that the others prefer, so that the mean over folds is fair, and how often
each stage is chosen says how sure the choice is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from localsim.analysis.brain.metrics import NeuralMetric, Predictor, Target
from localsim.analysis.brain.recordings import MIN_IMAGES, Recording
from localsim.analysis.regimes import Layer
from localsim.errors import UserError
from localsim.rng import key

FOLDS = 5


@dataclass(frozen=True)
class BestStage:
    """What the best stage of one network reaches for one region.

    Attributes:
        metric, recording, region: of the scores.
        regime, seed: of the network.
        layer: the stage that was chosen most often.
        chosen: in how many of the folds each stage was chosen; stages that never were are left out.
        value: mean over folds of the chosen stage's score on the fold, raw.
        n, neurons: images and neurons.
    """

    metric: str
    recording: str
    region: str
    regime: str
    seed: int | None
    layer: str
    chosen: Mapping[str, int]
    value: float
    n: int
    neurons: int

    def to_row(self) -> dict[str, Any]:
        """Return the fields as one line of a table."""
        return asdict(self) | {"chosen": " ".join(f"{name}:{times}" for name, times in self.chosen.items())}

    def __str__(self) -> str:
        times = ", ".join(f"{name} {count} of {FOLDS}" for name, count in self.chosen.items())
        return f"{self.value:.3f}, chosen by other images: {times}"


def best_stage(
    metric: NeuralMetric, predictors: Mapping[Layer, Predictor], recording: Recording, seed: int = 0
) -> BestStage:
    """Return the cross-validated score of the best of one network's layers.

    Images are dealt to `FOLDS` folds. For each, the layer with the highest score on the other images is taken, with the
    metric's own cross-validation among these, and its score on the fold, with fits to the others, counts. Metrics that
    compare pairs of images see pairs within the fold only: theirs is a score of a fifth of the images, and noisier.

    Args:
        metric: by which to choose and to score.
        predictors: what the metric makes of each layer.
        recording: of one region.
        seed: of the folds.

    Raises:
        UserError: as `check_folds` says.
    """
    layers = list(predictors)
    picked: list[Layer] = []
    reached = []
    for train, test, target in _folds(metric, recording, seed):
        inner = [metric.compare(predictors[layer].take(train), target).value for layer in layers]
        picked.append(layers[int(np.argmax(inner))])
        reached.append(metric.held_out(predictors[picked[-1]], recording, train, test))
    counts = Counter(layer.name for layer in picked)
    chosen = {layer.name: counts[layer.name] for layer in layers if layer.name in counts}
    one = layers[0]
    return BestStage(
        metric.name, recording.name, recording.areas[0], one.regime, one.seed, counts.most_common(1)[0][0], chosen,
        fmean(reached), len(recording), len(recording.regions),
    )  # fmt: skip


def check_folds(metric: NeuralMetric, recording: Recording, seed: int = 0) -> None:
    """Raise UserError where a region of a recording has too few images for the metric to be applied to folds."""
    for _ in _folds(metric, recording, seed):
        pass


def _folds(metric: NeuralMetric, recording: Recording, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray, Target]]:
    """Yield for each fold the other images, those in it, and the target by which the others choose."""
    n = len(recording)
    if n < FOLDS * MIN_IMAGES:
        raise UserError(
            f"recording {recording.name} has {n} images, too few to choose a stage by some and score it on others; "
            f"allowed: {FOLDS * MIN_IMAGES} or more"
        )
    order = np.random.default_rng(key(seed, "best stage", recording.name, n)).permutation(n)
    for fold in range(FOLDS):
        test = np.sort(order[fold::FOLDS])
        train = np.setdiff1d(np.arange(n), test)
        try:
            yield train, test, metric.target(_telling(recording.take(train)))
        except UserError as error:
            raise UserError(
                f"the best stage is chosen by {FOLDS - 1} of {FOLDS} folds of the {n} images: {error}"
            ) from None


def _telling(recording: Recording) -> Recording:
    """Return the recording without neurons that respond to no image but those left out, if others remain."""
    if recording.responses is None:
        return recording
    means = recording.means()
    varies = (means != means[0]).any(0)
    return recording if varies.all() or not varies.any() else recording.pick(np.flatnonzero(varies))
