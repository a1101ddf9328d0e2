"""Networks that have learned nothing, for beside one that has: as initialised, and with statistics of images."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import nn

from localsim.analysis.extract import calibrated, has_batch_norm
from localsim.config import Config
from localsim.data import Data
from localsim.network import LocalNetwork
from localsim.opening import open_loader

if TYPE_CHECKING:
    from localsim.runs import Run

CONTROLS = ("untrained", "calibrated")
"""As initialised, and that with the batch-norm statistics of training images, see `extract.calibrated`."""
CALIBRATION_BATCHES = 16


def calibrated_control(untrained: LocalNetwork, config: Config, data: Data) -> LocalNetwork | None:
    """Return the `calibrated` control of a run's untrained network; None without batch norm."""
    if not has_batch_norm(untrained):
        return None
    views = islice(open_loader(config, data, untrained.device).epoch(0), CALIBRATION_BATCHES)
    return calibrated(untrained, views, seed=config.seed)


def with_controls(
    run: Run, data: Data, device: torch.device, trained: LocalNetwork | None = None
) -> dict[str, LocalNetwork]:
    """Return the controls of a run and its trained network, by name, on a device; the untrained ones without heads.

    Args:
        run: with a checkpoint, unless its rule trains nothing.
        data: whose training images calibrate.
        device: where the networks are to be.
        trained: the trained network, where it is in memory already.
    """
    untrained = run.network("untrained")
    for tap in untrained.taps:
        tap.head = nn.Identity()  # nothing here reads heads, and those of ImageNet's preset take 2.4 GB
    networks = {"untrained": untrained.to(device)}
    if (control := calibrated_control(untrained, run.config, data)) is not None:
        networks["calibrated"] = control
    if len(untrained.taps):
        networks[run.config.rule] = (run.network() if trained is None else trained).to(device)
    return networks
