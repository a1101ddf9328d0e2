"""From a recording's images to the features of networks and baselines, and to what a metric makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from localsim.analysis.brain.baselines import BASELINES
from localsim.analysis.brain.metrics import NeuralMetric, Predictor
from localsim.analysis.brain.recordings import Recording
from localsim.analysis.extraction import features
from localsim.analysis.feature_store import Features
from localsim.analysis.regimes import Layer, Subject
from localsim.errors import UserError

Reader = Callable[[Recording], tuple[Features, list[Layer]]]
"""From a recording, whose images are shown, to features and the layers that they are of."""


def network_reader(
    subject: Subject, layers: Any, spatial: str, size: int | None, image_sets: int, settings: Mapping[str, Any]
) -> Reader:
    """Return the reader of a network.

    Args:
        subject: the network, or features of it.
        layers: see `localsim.analysis.compare`.
        spatial: how maps become vectors.
        size: pixels to show whole images at; None: what the network was trained on.
        image_sets: how many sets of images are to be shown, of which features that are given have one.
        settings: of `features`.
    """

    def read(recording: Recording) -> tuple[Features, list[Layer]]:
        if subject.open is None:
            if image_sets > 1:
                raise UserError(f"{subject.regime} is features of one set of images; give a single recording with it")
            assert subject.features is not None
            if len(subject.features.indices) != len(recording):
                raise UserError(
                    f"{subject.regime} has features of {len(subject.features.indices)} images, but {recording.name} "
                    f"has {len(recording)}"
                )
            return subject.read(None, "ends")
        shown = subject.open().whole(size)
        return replace(subject, open=lambda: shown).read(recording.images, layers, spatial=spatial, **settings)

    return read


def baseline_reader(name: str, settings: Mapping[str, Any]) -> Reader:
    """Return the reader of one of `BASELINES`, with a layer of depth 0; `settings` are those of `features`."""
    baseline = BASELINES[name]

    def read(recording: Recording) -> tuple[Features, list[Layer]]:
        made = features(
            baseline.source, recording.images, modules=baseline.modules, spatial=baseline.spatial, **settings
        )
        return made, [Layer(name, None, None, layer, 0.0) for layer in made.names]

    return read


def predictors_of(
    metric: NeuralMetric, found: Features, layers: Sequence[Layer], device: str | None
) -> dict[Layer, Predictor]:
    """Return what a metric makes of each layer; a UserError names the layer."""
    return {
        layer: told_where(layer, lambda own=found[layer.name]: metric.represent(own, device=device)) for layer in layers
    }


def told_where(layer: Layer, compute: Callable[[], Any]) -> Any:
    """Return what `compute` does; a UserError of it names the layer."""
    try:
        return compute()
    except UserError as error:
        raise UserError(f"{layer}: {error}") from None
