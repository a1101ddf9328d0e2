"""Runs that end within a second, images and passes: what tests of backbones, training and run folders share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from localsim import runs
from localsim.cli import main
from localsim.config import Config
from localsim.data import ViewLoader
from localsim.experiment import prepare
from localsim.network import LocalNetwork
from localsim.presets import resolve
from localsim.rules import get_rule
from localsim.train import train

STEPS_PER_EPOCH = 5
TINY: dict[str, Any] = {
    "backbone": "resnet20",
    "image_size": 16,
    "expand_width": 8,
    "projector": [8, 8],
    "batch_size": 8,
    "train_images": 8 * STEPS_PER_EPOCH,
    "test_images": 40,
    "epochs": 2,
    "zero_init_residual": False,
    "optimizer": "adamw",
    "lr": 3e-3,
    "warmup_epochs": 0.4,
    "weight_decay": 1e-4,
    "precision": "full",
    "device": "cpu",
    "log_every": 1,
}


def tiny_settings(rule: str) -> dict[str, Any]:
    """Return the settings that have a meaning for the rule, for images that are cut into patches with small ones."""
    chosen = get_rule(rule)
    patches = {"patches": "8:4"} if "patches" in chosen.settings else {}
    return {name: value for name, value in {**TINY, **patches}.items() if name not in chosen.meaningless}


def tiny_config(rule: str = "blockwise", **settings: Any) -> Config:
    return resolve(rule, None, {**tiny_settings(rule), **settings})


def tiny_loader(config: Config) -> ViewLoader:
    return prepare(config).loader


def tiny_state(net: LocalNetwork, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Return what a checkpoint keeps of a network, with a monitor that has seen nothing."""
    return {
        "trunk": net.trunk_state_dict(),
        "taps": net.taps.state_dict(),
        "optimizer": {} if optimizer is None else optimizer.state_dict(),
        "monitor": {},
    }


class LargestMade(TorchDispatchMode):
    """A context that notes how many entries the largest tensor has that an operation inside it returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def images(num: int = 2, size: int = 32) -> torch.Tensor:
    """Return the same normally distributed images every time."""
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(1))


def through(units: Iterable[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """Return what comes out of unit blocks, one after the other."""
    for unit in units:
        x = unit(x)
    return x


def train_in(
    path: Path, rule: str = "blockwise", *, alter: Callable[[LocalNetwork], None] | None = None, **settings: Any
) -> LocalNetwork:
    """Train in the run folder `path`, from its newest checkpoint or from the start, without probes and plots."""
    config = tiny_config(rule, **settings)
    prepared = prepare(config)
    net = prepared.net
    if alter:
        alter(net)
    with runs.writing(path):
        if not (path / "config.json").exists():
            runs.start_run(path, config)
        train(net, prepared.loader, config, path, num_classes=10, progress=False)
    return net


def exit_code(text: str) -> int:
    """Return the exit code of a command line, in this process."""
    try:
        return main(text.split())
    except SystemExit as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code


def checkpoint_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all weights and buffers of the newest checkpoint."""
    folder = runs.newest_checkpoint(path)
    assert folder is not None
    files = ("trunk.safetensors", "taps.safetensors")
    return {f"{file}: {name}": x for file in files for name, x in runs.load_tensors(folder / file).items()}


def assert_same_tensors(here: dict[str, torch.Tensor], there: dict[str, torch.Tensor]) -> None:
    """Assert equality bit for bit."""
    assert here.keys() == there.keys()
    assert [name for name, x in here.items() if not torch.equal(x, there[name])] == []


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of metrics without what the clock decides."""
    return [{name: value for name, value in row.items() if name != "images_per_second"} for row in rows]


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process of its own, single-threaded, that can import this module."""
    return subprocess.Popen(
        [sys.executable, "-c", "import torch; torch.set_num_threads(1)\n" + code, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
