"""What was shown and what was recorded: responses of neurons to images, or dissimilarities between images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from localsim.data import ImageSet
from localsim.errors import UserError, one_of
from localsim.rng import key

MIN_IMAGES = 4
_HASHES: WeakKeyDictionary[ImageSet, str] = WeakKeyDictionary()


class Seeds(NamedTuple):
    """Of resamples: `images` is the same wherever the same images were shown, `units` (neurons, subjects) is not."""

    images: int
    units: int


@dataclass(frozen=True, eq=False)
class Recording:
    """Images and what was recorded while they were shown: responses, or only dissimilarity matrices (RDMs).

    Attributes:
        name: for tables; recordings that are analysed together have different ones.
        images: n of them, in the order of the rows below; an array of them, uint8 `(n, 3, H, W)`, becomes an ImageSet.
        responses: `(n, neurons, trials, bins)` float64 in `unit`, NaN where a trial was not given; one trial where
            trials were averaged before. None where there are RDMs.
        rdms: `(matrices, n, n)` float64, symmetric, zero on the diagonal: of several subjects or sessions, or None.
        regions: area of each neuron or matrix, or one word for all.
        subjects: whose each neuron or matrix is, or one word for all.
        names: of each neuron or matrix.
        stimuli: of each image; by default its number.
        groups: category of each image, by which cross-validation is stratified as Brain-Score's `object_name` is; or
            None.
        bins: start and end of each time bin in milliseconds after the image's onset; None where unknown.
        unit: of the responses.
        degrees: width of the images in degrees of visual angle, or None. Brain-Score asks for it.
        repeats: how many trials each image had, where they were averaged before; for people.
        citation: what to cite.
    """

    name: str
    images: ImageSet
    responses: np.ndarray | None = None
    rdms: np.ndarray | None = None
    regions: tuple[str, ...] = ()
    subjects: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    stimuli: tuple[str, ...] = ()
    groups: tuple[str, ...] | None = None
    bins: tuple[tuple[float, float], ...] | None = None
    unit: str = "spikes"
    degrees: float | None = None
    repeats: str = ""
    citation: str = ""

    def __post_init__(self) -> None:
        if (self.responses is None) == (self.rdms is None):
            raise UserError(f"recording {self.name} needs either responses or rdms")
        if not self.name.strip():
            raise UserError("a recording has no name; allowed: any text, for tables")
        if self.degrees is not None and not 0 < self.degrees < 180:
            raise UserError(f"degrees of {self.name} is {self.degrees}; allowed: above 0 and below 180")
        self._check_images()
        n = len(self.images)
        if n < MIN_IMAGES:
            raise UserError(f"recording {self.name} has {n} images; allowed: {MIN_IMAGES} or more")
        if self.bins is not None:
            object.__setattr__(self, "bins", tuple((float(start), float(end)) for start, end in self.bins))
            if not all(start < end for start, end in self.bins):
                raise UserError(f"bins of {self.name} are {self.bins}; allowed: each ends after it starts")
        count = self._check_responses(n) if self.responses is not None else self._check_rdms(n)
        defaults = {
            "regions": ("unknown",) * count,
            "subjects": ("unknown",) * count,
            "names": tuple(str(number) for number in range(1, count + 1)),
            "stimuli": tuple(f"{number:0{len(str(n))}d}" for number in range(1, n + 1)),
        }
        for field in ("regions", "subjects"):
            if isinstance(word := getattr(self, field), str):
                object.__setattr__(self, field, (word,) * count)  # the same for all
        for field, default in defaults.items():
            object.__setattr__(self, field, tuple(map(str, getattr(self, field))) or default)
        if self.groups is not None:
            object.__setattr__(self, "groups", tuple(map(str, self.groups)))
        for field, wanted in {"regions": count, "subjects": count, "names": count, "stimuli": n, "groups": n}.items():
            given = getattr(self, field)
            if given is not None and len(given) != wanted:
                raise UserError(f"recording {self.name} has {len(given)} {field}, but needs {wanted}")
        if len(set(self.stimuli)) != n:
            twice = next(one for one in self.stimuli if self.stimuli.count(one) > 1)
            raise UserError(f"recording {self.name} has two images called {twice!r}; average their responses first")

    def _check_images(self) -> None:
        given = self.images
        if isinstance(given, np.ndarray | Tensor):
            object.__setattr__(self, "images", ImageSet(torch.as_tensor(given), None, None))
        elif not isinstance(given, ImageSet):
            raise UserError(
                f"images of {self.name} are of type {type(given).__name__}; allowed: an ImageSet or an array"
            )
        shown = self.images.images
        if shown is not None and (shown.ndim != 4 or shown.shape[1] != 3 or shown.dtype != torch.uint8):
            dtype = str(shown.dtype).removeprefix("torch.")
            raise UserError(
                f"images of {self.name} are {dtype} of shape {tuple(shown.shape)}; allowed: uint8 (images, 3, height, "
                "width), grey ones three times"
            )

    def _check_responses(self, n: int) -> int:
        given = np.asarray(self.responses, dtype=np.float64)
        if not 2 <= given.ndim <= 4 or 0 in given.shape or len(given) != n:
            raise UserError(
                f"responses of {self.name} have shape {given.shape}; allowed: ({n} images, neurons), with trials as "
                "third and time bins as fourth axis"
            )
        given = given.reshape(*given.shape, *(1,) * (4 - given.ndim))
        object.__setattr__(self, "responses", given)
        if np.isinf(given).any():
            raise UserError(f"responses of {self.name} hold infinite values; allowed: numbers, and NaN for no trial")
        never = np.isnan(given).all(2)
        if never.any():
            image, neuron, _ = np.argwhere(never)[0]
            raise UserError(
                f"recording {self.name} has no response of neuron {neuron + 1} to image {image + 1}; leave out images "
                "or neurons until every neuron has a trial of every image"
            )
        if self.bins is not None and len(self.bins) != given.shape[3]:
            raise UserError(f"recording {self.name} has {len(self.bins)} bins, but its responses {given.shape[3]}")
        return given.shape[1]

    def _check_rdms(self, n: int) -> int:
        given = np.asarray(self.rdms, dtype=np.float64)
        given = given[None] if given.ndim == 2 else given
        object.__setattr__(self, "rdms", given)
        if given.ndim != 3 or given.shape[1:] != (n, n):
            raise UserError(f"rdms of {self.name} have shape {given.shape}; allowed: (matrices, {n}, {n})")
        if not np.isfinite(given).all():
            raise UserError(f"rdms of {self.name} hold values that are not finite")
        if not np.allclose(given, given.swapaxes(1, 2), atol=1e-5) or not np.allclose(
            np.diagonal(given, axis1=1, axis2=2), 0, atol=1e-5
        ):
            raise UserError(f"rdms of {self.name} are not symmetric with zeros on the diagonal")
        return len(given)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def images_hash(self) -> str:
        """SHA-256 of all images in order: of their pixels, or of their files' bytes."""
        shown = self.images
        if shown not in _HASHES:  # regions and time bins share it
            digest = hashlib.sha256()
            for image in shown.images if shown.images is not None else ():
                digest.update(f"{tuple(image.shape)}".encode())
                digest.update(image.contiguous().numpy().data)
            for path in shown.paths or ():
                digest.update(hashlib.sha256(path.read_bytes()).digest())
            _HASHES[shown] = digest.hexdigest()
        return _HASHES[shown]

    def __repr__(self) -> str:
        what = (
            f"{self.responses.shape[1]} neurons x {self.trials} trials x {self.responses.shape[3]} bins"
            if self.responses is not None
            else f"{len(self.regions)} RDMs"
        )
        return f"Recording {self.name}: {len(self)} images, {what}, {', '.join(self.areas)}"

    @property
    def areas(self) -> list[str]:
        """The regions, each once, in order of appearance."""
        return list(dict.fromkeys(self.regions))

    @property
    def trials(self) -> int:
        """The most trials any image has; 1 where they were averaged, 0 for RDMs."""
        return 0 if self.responses is None else self.responses.shape[2]

    @property
    def answers_hash(self) -> str:
        """SHA-256 of the responses or RDMs."""
        answers = self.responses if self.responses is not None else self.rdms
        assert answers is not None
        return hashlib.sha256(f"{answers.shape}".encode() + np.ascontiguousarray(answers).tobytes()).hexdigest()

    def of(self, region: str) -> Recording:
        """Return the neurons or matrices of one region; UserError where there is none."""
        if region not in self.regions:
            raise one_of(f"region of {self.name}", region, self.areas)
        return self.pick([place for place, area in enumerate(self.regions) if area == region])

    def pick(self, places: Sequence[int] | np.ndarray) -> Recording:
        """Return some neurons or matrices, by their places."""
        chosen = list(map(int, places))
        parts = {name: tuple(getattr(self, name)[i] for i in chosen) for name in ("regions", "subjects", "names")}
        if self.responses is not None:
            return replace(self, responses=self.responses[:, chosen], **parts)
        assert self.rdms is not None
        return replace(self, rdms=self.rdms[chosen], **parts)

    def take(self, images: Sequence[int] | np.ndarray) -> Recording:
        """Return some images, by their places, in that order."""
        chosen = np.asarray(images, dtype=np.int64)
        return replace(
            self,
            images=self.images.subset(chosen),
            stimuli=tuple(self.stimuli[i] for i in chosen),
            groups=None if self.groups is None else tuple(self.groups[i] for i in chosen),
            **self._rows(chosen),
        )

    def shuffled(self, seed: int = 0) -> Recording:
        """Return the recording with what belongs to each image given to another: the chance level of any score."""
        order = np.random.default_rng(key(seed, "images shuffled", len(self))).permutation(len(self))
        rows = np.empty(len(self), dtype=np.int64)
        rows[order] = np.roll(order, 1)  # one cycle through all images: none keeps its own
        return replace(self, **self._rows(rows))

    def _rows(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if self.responses is not None:
            return {"responses": self.responses[images]}
        assert self.rdms is not None
        return {"rdms": self.rdms[:, images[:, None], images]}

    def means(self) -> np.ndarray:
        """Return responses `(n, neurons)`, averaged over the trials that were given and over time bins.

        Raises:
            UserError: there are only RDMs.
        """
        if self.responses is None:
            raise UserError(f"recording {self.name} has RDMs only; allowed: metrics that compare RDMs, such as rdm")
        return np.nanmean(self.responses, axis=2).mean(2)

    def by_bin(self) -> list[Recording]:
        """Return a recording for each time bin, named after it."""
        if self.responses is None or self.responses.shape[3] == 1:
            return [self]
        found = []
        for place in range(self.responses.shape[3]):
            span = None if self.bins is None else self.bins[place]
            label = f"bin {place + 1}" if span is None else f"{span[0]:g}-{span[1]:g} ms"
            one = self.responses[:, :, :, place : place + 1]
            found.append(
                replace(self, name=f"{self.name} {label}", responses=one, bins=None if span is None else (span,))
            )
        return found
