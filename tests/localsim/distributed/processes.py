"""Functions and whole runs on several processes that talk through gloo."""

from __future__ import annotations

import importlib
import inspect
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import localsim
from localsim.backbones import UnitBlock, register_backbone
from localsim.distributed.peers import Peers


def make_small() -> nn.Module:
    widths = (3, 8, 8, 16, 16)
    layers = [
        nn.Sequential(nn.Conv2d(a, b, 3, 1 + (b > a > 3), 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in pairwise(widths)
    ]
    return nn.Sequential(*layers)


def split_small(model: nn.Module) -> tuple[list[UnitBlock], list[int]]:
    return [UnitBlock(f"block{name}", [(name, part)]) for name, part in model.named_children()], [0, 2]


def small_backbone() -> str:
    """Return the name of a backbone of four unit blocks, known from now on: a step of it asks others few times."""
    register_backbone("small", make_small, split_small)
    return "small"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def on_processes(num: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
    """Return what `function(rank, size, *arguments)` returns on each of `num` new processes, with torchrun's variables.

    An exception in one of them is raised here, with its traceback as the message.
    """
    context = mp.get_context("spawn")
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num)}
    pipes, workers = [], []
    for rank in range(num):
        here, there = context.Pipe(duplex=False)
        told = {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        # by name: pytest imports test modules under names that a new process cannot import
        where = Path(inspect.getfile(function)).stem, function.__name__
        worker = context.Process(target=_work, args=(there, rank, num, told, where, arguments), daemon=True)
        worker.start()
        there.close()
        pipes.append(here)
        workers.append(worker)
    answers = [_answer(pipe, timeout) for pipe in pipes]
    for worker in workers:
        worker.join(10)
        worker.kill()
    errors = [f"process {rank}: {value}" for rank, (kind, value) in enumerate(answers) if kind == "error"]
    assert not errors, "\n".join(errors)
    return [value for _, value in answers]


def _answer(pipe: Connection, timeout: float) -> tuple[str, Any]:
    try:
        return pipe.recv() if pipe.poll(timeout) else ("error", f"no answer within {timeout:g} s")
    except EOFError:
        return "error", "it ended without an answer"


def _work(
    pipe: Connection,
    rank: int,
    size: int,
    variables: dict[str, str],
    where: tuple[str, str],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        function = getattr(importlib.import_module(where[0]), where[1])
        pipe.send(("value", function(rank, size, *arguments)))
    except BaseException as error:
        pipe.send(("error", "".join(traceback.format_exception(error))))


def make_peers(rank: int, size: int) -> Peers:
    """Join the group of all processes as peers that share every batch."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return Peers(dist.group.WORLD, dist.new_group(), rank, size)


def train_together(rank: int, size: int, settings: list[dict[str, Any]]) -> None:
    """Train one run after the other, each with its settings; through `on_processes`, on all processes together."""
    small_backbone()
    for chosen in settings:
        localsim.run(quiet=True, **chosen)
