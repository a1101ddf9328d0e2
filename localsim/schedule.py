"""When what is trained: which taps act in which steps, and the learning rate of every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from localsim.config import Config
from localsim.errors import UserError
from localsim.network import LocalNetwork
from localsim.optim import learning_rate, make_optimizer, scaled_lr


@dataclass(frozen=True)
class Phase:
    """A stretch of training, steps `start` to `stop` (not included), in which some of the taps act."""

    number: int
    start: int
    stop: int
    taps: tuple[int, ...]


def acting_together(config: Config, num_taps: int) -> list[tuple[int, ...]]:
    """Return the taps of every phase: all at once, or one after the other from the lowest up."""
    taps = range(num_taps)
    return [tuple(taps)] if config.schedule == "simultaneous" else [(tap,) for tap in taps]


@dataclass(frozen=True)
class Schedule:
    """Which taps act, and the learning rate, as pure functions of the step.

    A simultaneous schedule is one phase, a sequential one a phase per tap, of equal length, from the lowest tap up. In
    every phase the learning rate warms up and falls anew.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    last_step: int
    final_factor: float
    phases: tuple[Phase, ...]

    @classmethod
    def of(cls, config: Config, steps_per_epoch: int, num_taps: int) -> Schedule:
        """Return the schedule that a configuration means on a data set of so many steps.

        Raises:
            UserError: there are fewer steps than taps to train one after the other, or a phase is all warm-up.
        """
        total = config.epochs * steps_per_epoch
        groups = acting_together(config, num_taps)
        if total < len(groups):
            raise UserError(
                f"{total} steps are too few to train {num_taps} taps one after the other; "
                "give more epochs or images, or a coarser cut"
            )
        ends = [round(total * (number + 1) / len(groups)) for number in range(len(groups))]
        shortest = min(stop - start for start, stop in zip([0, *ends], ends, strict=False))
        warmup = round(config.warmup_epochs * steps_per_epoch / len(groups))
        if warmup >= shortest:
            raise UserError(
                f"warm-up would take {warmup} of {shortest} steps; give a smaller warmup_epochs or more epochs"
            )
        return cls(
            peak=scaled_lr(config.lr, config.batch_size) if config.lr_scaling == "linear" else config.lr,
            warmup_steps=warmup,
            total_steps=total,
            last_step=min(total, config.max_steps or total),
            final_factor=config.final_lr_factor,
            phases=tuple(
                Phase(number, start, stop, taps)
                for number, (start, stop, taps) in enumerate(zip([0, *ends], ends, groups, strict=False))
            ),
        )

    def phase(self, step: int) -> Phase:
        """Return the phase that the step after `step` finished ones belongs to."""
        return next(phase for phase in self.phases if step < phase.stop)

    def optimizer(self, net: LocalNetwork, config: Config) -> torch.optim.Optimizer:
        """Return the optimiser of the parts of a network that are here; UserError if the configuration means none."""
        here = [parameter for parameter in net.parameters() if not parameter.is_meta]
        return make_optimizer(
            config.optimizer, here, lr=self.peak, weight_decay=config.weight_decay, momentum=config.momentum
        )

    def rate(self, step: int) -> float:
        """Return the learning rate of the step that follows `step` finished ones."""
        phase = self.phase(step)
        return learning_rate(
            step - phase.start,
            base=self.peak,
            total_steps=phase.stop - phase.start,
            warmup_steps=self.warmup_steps,
            final_factor=self.final_factor,
        )
