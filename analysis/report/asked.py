"""What is asked of the sections that compute something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

IMAGES = 500
"""Test images that similarity and geometry are of where no number is given: half of what `localsim compare` takes."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of the sections that compute something.

    Attributes:
        images: test images, balanced over classes, or all if they are fewer.
        measure: of similarity.
        brain: folders that `localsim brain` saved.
        device: that the networks run on; None: the runs'.
        cache: where features are kept.
        progress: whether to show bars on a terminal.
    """

    images: int = IMAGES
    measure: str = "cka_debiased"
    brain: Sequence[str] = ()
    device: str | None = None
    cache: str | None = None
    progress: bool = False
