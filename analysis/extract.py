"""Features of frozen networks: the pooled output of every stage, and what every tap's readout makes of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from localsim.data import Batch
from localsim.network import LocalNetwork
from localsim.precision import autocast
from localsim.rng import keyed

RAW, READOUT = "raw", "readout"


def batch_features(net: LocalNetwork, images: Tensor, *, precision: str = "full") -> dict[tuple[int, str], Tensor]:
    """Return the features of one batch from every stage, in one forward pass without gradients.

    Args:
        net: in evaluation mode, so that batch norm and noise treat every image alike.
        images: `(n, 3, height, width)`.
        precision: `full` or `bf16` autocast.

    Returns:
        `{(stage, "raw"): (n, channels)}`, the stage's map averaged over positions, and `{(stage, "readout"): (n, d)}`
        for stages with a tap whose readout gives a vector, that vector; float32. Of several taps on a stage the first
        is taken.

    Raises:
        ValueError: the network is in training mode.
    """
    if net.training:
        raise ValueError("features are taken in evaluation mode; call net.eval() first")
    features: dict[tuple[int, str], Tensor] = {}
    with torch.no_grad(), autocast(precision, net.device.type)():
        for stage, h in enumerate(net.stage_outputs(images)):
            features[stage, RAW] = net.pooled(h).float()
            for tap in net.taps:
                if tap.stage == stage and (stage, READOUT) not in features:
                    read = tap.readout(h)
                    if read.ndim == 2:  # maps and patches are read by heads, not by probes
                        features[stage, READOUT] = read.float()
    return features


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether a network measures statistics of batches, so that it can be calibrated."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def calibrated(net: LocalNetwork, batches: Iterable[Batch], *, seed: int = 0) -> LocalNetwork:
    """Return a copy whose batch-norm statistics are those of the given images; no weight is changed.

    An untrained network in evaluation mode normalises by placeholders (mean 0, variance 1), a trained one by what it
    measured. The copy is the fairer control: what it scores above the untrained network is owed to those statistics,
    not to learning. Statistics are averaged over the batches with equal weight, in training mode, noise included.

    Args:
        net: any network; it stays as it is.
        batches: images as in training; their first view is used.
        seed: of the noise.
    """
    twin = copy.deepcopy(net).train()
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for number, batch in enumerate(batches):
            with keyed(seed, "calibrate", number, device=net.device):
                for stage, h in enumerate(twin.stage_outputs(batch.views[0])):
                    for tap in twin.taps:
                        if tap.stage == stage:
                            tap.readout(h)
    return twin.eval()


def stream_features(
    net: LocalNetwork, batches: Iterable[Batch], *, precision: str = "full"
) -> Iterator[tuple[dict[tuple[int, str], Tensor], Batch]]:
    """Yield the features of one batch after another, with the batch."""
    for batch in batches:
        yield batch_features(net, batch.views[0], precision=precision), batch


def collect_features(
    net: LocalNetwork, batches: Iterable[Batch], *, precision: str = "full"
) -> tuple[dict[tuple[int, str], Tensor], Tensor | None]:
    """Return the features of all batches as `{(stage, kind): (n, d)}` on the CPU, and the labels `(n,)` or None."""
    parts: dict[tuple[int, str], list[Tensor]] = {}
    labels: list[Tensor] = []
    for features, batch in stream_features(net, batches, precision=precision):
        for name, values in features.items():
            parts.setdefault(name, []).append(values.cpu())
        if batch.labels is not None:
            labels.append(batch.labels.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}, torch.cat(labels) if labels else None
