"""Where others take part in a step of the engine: those that watch it, and those that run other stages of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from localsim.network import Embedding
from localsim.signals import Signal


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Functions that the engine calls while it works; tensors handed to them are detached.

    Args:
        on_stage: `(stage, outputs per view, stages whose graphs are alive)` after a stage's forward pass.
        on_tap: `(tap, embeddings per view, loss)` after a tap's loss, before its gradient; may raise to stop the step.
        on_final: `(parameters)` as soon as the gradients of a stage or a tap are final and in `.grad`.
    """

    on_stage: Callable[[int, list[Tensor], tuple[int, ...]], None] | None = None
    on_tap: Callable[[int, tuple[Embedding, ...], Tensor], None] | None = None
    on_final: Callable[[list[nn.Parameter]], None] | None = None


class Links(Protocol):
    """What a process that runs some of the stages hears from those that run the others, and tells them.

    Their outputs go up by `Hooks.on_stage`.
    """

    def context(self, stage: int) -> list[Tensor]:
        """Return for every view the output of a stage that runs elsewhere, or the images as `IMAGES`."""
        ...

    def receive_signals(self) -> list[Signal]:
        """Return the signals that come down to this process's highest stage."""
        ...

    def send_signals(self, signals: list[Signal]) -> None:
        """Send down the signals for the stage below this process's lowest."""
        ...
