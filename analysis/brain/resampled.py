"""The recording's side of a comparison of pairs of images, whole and resampled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from localsim.analysis.brain.matrices import Matrix, ranks, response_rdm, silent, u_centred, upper
from localsim.analysis.brain.recordings import Recording, Seeds
from localsim.analysis.statistics import half_samples
from localsim.errors import UserError
from localsim.rng import key

KEPT_BYTES = 2**28
"""Of a recording's resamples, so many are kept for all networks; what is beyond is made anew for each layer."""


@dataclass(frozen=True, eq=False)
class ResponsePairs:
    """Responses `(n, neurons)` as pairs of images, whole and resampled.

    A resample is half of the images, and neurons drawn with replacement. Images to which all drawn neurons respond
    alike have no correlation and are left out of it; where fewer than 4 are left, neurons are drawn anew.
    """

    responses: np.ndarray
    kind: str  # rdm or cka
    whose: str
    seeds: Seeds
    draws: int

    def whole(self) -> np.ndarray:
        if self.kind == "rdm":
            return ranks(response_rdm(self.responses, self.whose), self.whose)
        return u_centred(_products(self.responses), self.whose)

    def resamples(self, first: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield images and their pairs of length 1, from some number on."""
        n, neurons = self.responses.shape
        for number, half in enumerate(half_samples(n, self.draws, self.seeds.images)):
            if number < first:
                continue
            rng = np.random.default_rng(key(self.seeds.units, "neurons", number))
            for _ in range(100):
                images, drawn = half, self.responses[half][:, rng.integers(neurons, size=neurons)]
                if self.kind == "rdm":
                    told = ~silent(drawn)
                    images, drawn = half[told], drawn[told]
                if len(images) >= 4 and (drawn != drawn[0]).any():
                    break
            else:
                raise UserError(f"too few neurons of {self.whose} respond for an interval over neurons; use draws=0")
            if self.kind == "rdm":
                yield images, ranks(upper(1 - np.corrcoef(drawn)), self.whose)
            else:
                yield images, u_centred(_products(drawn), self.whose)


def _products(responses: np.ndarray) -> np.ndarray:
    centred = responses - responses.mean(0)
    return centred @ centred.T


@dataclass(frozen=True, eq=False)
class SubjectPairs:
    """RDMs `(subjects, n, n)` as ranks of pairs, whole and resampled.

    A resample is half of the images, and where there are several subjects, these drawn with replacement. Compared is
    their mean RDM (`averaged`), or each, of which the mean is taken: as the score is linear in the unit vectors, a
    mean of scores is one with their mean.
    """

    rdms: np.ndarray
    averaged: bool
    whose: str
    seeds: Seeds
    draws: int

    @cached_property
    def each(self) -> np.ndarray:
        """The ranks of every subject's pairs `(subjects, pairs)`."""
        return np.stack([ranks(upper(one), self.whose) for one in self.rdms])

    def whole(self) -> np.ndarray:
        return self._compared(self.rdms)

    def resamples(self, first: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield images and what a layer's pairs are multiplied with, from some number on."""
        subjects, n, _ = self.rdms.shape
        for number, images in enumerate(half_samples(n, self.draws, self.seeds.images)):
            if number < first:
                continue
            rng = np.random.default_rng(key(self.seeds.units, "subjects", number))
            drawn = rng.integers(subjects, size=subjects)
            yield images, self._compared(self.rdms[np.ix_(drawn, images, images)])

    def _compared(self, rdms: np.ndarray) -> np.ndarray:
        if self.averaged:
            return ranks(upper(rdms.mean(0)), self.whose)
        return np.stack([ranks(upper(one), self.whose) for one in rdms]).mean(0)


@dataclass(frozen=True, eq=False)
class Resampled:
    """The recording's side of a comparison of pairs, kept for all layers as far as `KEPT_BYTES` allow."""

    source: ResponsePairs | SubjectPairs

    @cached_property
    def whole(self) -> np.ndarray:
        return self.source.whole()

    def score(self, layer: Matrix) -> float:
        """Return the correlation of the layer's pairs with the recording's."""
        return float(np.clip(layer.unit() @ self.whole, -1, 1))

    def scores(self, layer: Matrix) -> np.ndarray:
        """Return the score of every resample `(draws,)`."""
        kept = self._kept
        scores = [layer.unit(images) @ pairs.astype(np.float32) / len(pairs) ** 0.5 for images, pairs in kept]
        scores += [layer.unit(images) @ pairs for images, pairs in self.source.resamples(len(kept))]
        return np.array(scores)

    @cached_property
    def _kept(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The first resamples in float16, of mean square 1: its rounding changes a score of 1000 pairs by 1e-5."""
        room = KEPT_BYTES // max(1, len(self.whole) // 2)  # a quarter of the pairs, of 2 bytes
        made = islice(self.source.resamples(), room)
        return [(images, (pairs * len(pairs) ** 0.5).astype(np.float16)) for images, pairs in made]


def by_subject(recording: Recording) -> tuple[list[str], np.ndarray]:
    """Return the subjects and the mean of each one's RDMs `(subjects, n, n)`, of responses or of matrices.

    Matrices of one subject, such as its sessions, are averaged: subjects are what varies between experiments.

    Raises:
        UserError: a subject's responses that have no RDM.
    """
    names = sorted(set(recording.subjects))
    places = [[place for place, one in enumerate(recording.subjects) if one == name] for name in names]
    if recording.rdms is not None:
        return names, np.stack([recording.rdms[chosen].mean(0) for chosen in places])
    means, n = recording.means(), len(recording)
    found = np.zeros((len(names), n, n))
    for name, chosen, square in zip(names, places, found, strict=True):
        square[np.triu_indices(n, 1)] = response_rdm(means[:, chosen], f"subject {name} of {recording.name}")
        square += square.T.copy()
    return names, found
