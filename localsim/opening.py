"""What a configuration names on this machine: a device, images, a loader of views."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from localsim.config import Config
from localsim.data import AUGMENTATIONS, Data, ViewLoader, load_data
from localsim.errors import UserError, one_of


def open_device(name: str) -> torch.device:
    """Return the device; `auto` is a CUDA device where there is one. UserError if it is not available.

    On CUDA, deterministic algorithms are asked for, process-wide.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} is not available ({reason}); allowed: auto, cpu, cuda, cuda:N") from None
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device


def open_data(config: Config) -> Data:
    """Return the images of a configuration; see `localsim.data.load_data`."""
    return load_data(
        config.data,
        root=Path(config.data_root) if config.data_root else None,
        image_size=config.image_size,
        train_images=config.train_images,
        test_images=config.test_images,
    )


def open_loader(config: Config, data: Data, device: torch.device, share: tuple[int, int] = (0, 1)) -> ViewLoader:
    """Return the loader of augmented training views, or of a share of each batch, see `ViewLoader`.

    Raises:
        UserError: an unknown augmentation, or too few images.
    """
    if config.augmentation not in AUGMENTATIONS:
        raise one_of("augmentation", config.augmentation, AUGMENTATIONS)
    return ViewLoader(
        data.train,
        AUGMENTATIONS[config.augmentation],
        size=config.image_size,
        batch_size=config.batch_size,
        seed=config.seed,
        mean=data.mean,
        std=data.std,
        num_views=config.views,
        workers=config.workers,
        device=device,
        share=share,
    )
