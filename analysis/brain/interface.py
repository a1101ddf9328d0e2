"""What a neural metric is, what it compares and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from localsim.analysis.brain.ceilings import Ceiling
from localsim.analysis.brain.held_out import HeldOut
from localsim.analysis.brain.recordings import Recording, Seeds
from localsim.analysis.statistics import check_resamples
from localsim.errors import UserError
from localsim.rng import key


class Predictor(Protocol):
    """A layer, as far as a metric needs it."""

    def __len__(self) -> int:
        """How many images."""
        ...

    def take(self, images: np.ndarray) -> Predictor:
        """Return the layer's response to some of the images `(m,)`, by their places, each once."""
        ...


@dataclass(frozen=True)
class Outcome:
    """A layer's score.

    Attributes:
        value: Brain-Score's raw score: mean over splits of the median over neurons of r, Spearman's r, or CKA.
        each: of the regressions `(neurons,)`, mean over splits of each neuron's r, NaN for a neuron that varies in no
            test set; for rsa of each subject; else None.
        draws: the score of each resample, `(draws,)`.
    """

    value: float
    each: np.ndarray | None
    draws: np.ndarray


@dataclass(frozen=True, eq=False)
class Target:
    """One region of a recording, ready to be compared with layers.

    Attributes:
        recording: of one region.
        content: what the metric compares with.
        find_ceiling: gives the ceiling, or a sentence that says why there is none.
    """

    recording: Recording
    content: Any
    find_ceiling: Callable[[], Ceiling | str]

    @cached_property
    def ceiling_or_reason(self) -> Ceiling | str:
        """The ceiling, or why there is none, in a sentence."""
        return self.find_ceiling()

    @property
    def ceiling(self) -> Ceiling | None:
        """What scores are divided by; None where the trials were averaged or do not agree (`ceiling_or_reason`)."""
        found = self.ceiling_or_reason
        return None if isinstance(found, str) else found


@dataclass(frozen=True, kw_only=True)
class NeuralMetric:
    """How a layer is compared with a region, with what has to be known to read the number.

    Attributes:
        name: in tables and on the command line.
        summary: one sentence.
        source: paper and section.
        brainscore: what computes the same number in brainscore-vision 2.4.2.
        takes: recordings with responses, with RDMs, or both.
        low, high: the range of its values.
        over: what an interval of it is over, in words.
        resamples: how many draws an interval takes if nothing is said.
        shuffles: in how many orders images are mismatched for the chance level: fewer where each takes a fit.
        squared: whether it is squared before it is divided by the ceiling.
        options: what it was made with, such as the number of splits.
        represent: features `(n, p)` (an array, also memory-mapped, or a tensor) and `device=` to a predictor. UserError
            where the features are constant, not finite or no table.
        prepare: one region of a recording, a number of draws and their seeds to what `target` returns.
        score: a predictor and a target's content to an outcome.
    """

    name: str
    summary: str
    source: str
    brainscore: str
    takes: Literal["responses", "rdms", "both"]
    over: str
    resamples: int
    shuffles: int
    options: Mapping[str, float] = field(default_factory=dict)
    squared: bool = True
    low: float = -1.0
    high: float = 1.0
    represent: Callable[..., Any]
    prepare: Callable[[Recording, int, Seeds], Target]
    score: Callable[[Any, Any], Outcome]

    def target(self, recording: Recording, *, draws: int = 0, seed: int = 0) -> Target:
        """Return one region, ready to be compared.

        Args:
            recording: of one region.
            draws: resamples for an interval: 0, or 20 or more.
            seed: of the resamples. Which images are drawn depends on it and the images alone, so that recordings,
                regions and time bins of the same images share their draws; which neurons, on recording and region too.

        Raises:
            UserError: a recording that does not fit the metric.
        """
        if len(recording.areas) != 1:
            raise UserError(
                f"recording {recording.name} has {len(recording.areas)} regions, {', '.join(recording.areas)}; "
                "allowed: one at a time, recording.of(region)"
            )
        if recording.responses is None and self.takes == "responses":
            raise UserError(
                f"recording {recording.name} has RDMs only, which {self.name} cannot use; allowed: rdm, rsa"
            )
        if draws < 0:
            raise UserError(f"{draws} draws are not possible; allowed: 0 (none), or 20 or more")
        check_resamples(len(recording), draws)
        shown = key(seed, recording.images_hash) if draws else 0
        units = key(seed, recording.name, recording.areas[0], len(recording), len(recording.regions))
        return self.prepare(recording, draws, Seeds(shown, units))

    def compare(self, predictor: Predictor, target: Target) -> Outcome:
        """Return the score of a layer for a region.

        Raises:
            UserError: another number of images, or nothing that can be compared.
        """
        if len(predictor) != len(target.recording):
            raise UserError(
                f"the layer has {len(predictor)} images, recording {target.recording.name} {len(target.recording)}; "
                "allowed: the same images in the same order"
            )
        return self.score(predictor, target.content)

    def held_out(self, predictor: Predictor, recording: Recording, train: np.ndarray, test: np.ndarray) -> float:
        """Return the score of a layer on the images `test`, of which nothing was known before.

        Regressions are fitted to the images `train`; the other metrics, which fit nothing, have no use for these.

        Args:
            predictor: of all images.
            recording: of one region, all images.
            train, test: places of images.

        Raises:
            UserError: too few images to be fitted or tested.
        """
        target = self.target(recording)
        if not isinstance(target.content, HeldOut):
            return self.compare(predictor.take(test), self.target(recording.take(test))).value
        return self.compare(predictor, replace(target, content=replace(target.content, folds=[(train, test)]))).value

    def ceiled(self, value: float, ceiling: float) -> float:
        """Return the score as a share of the ceiling: `sign(value) value^2 / ceiling`, of rsa `value / ceiling`.

        Brain-Score's square loses the sign; here it is kept.

        Raises:
            UserError: a ceiling that is not above 0.
        """
        if not ceiling > 0:
            raise UserError(f"a score cannot be a share of a ceiling of {ceiling}; allowed: above 0")
        return float(np.sign(value) * value**2 / ceiling if self.squared else value / ceiling)
