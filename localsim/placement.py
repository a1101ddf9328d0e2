"""Which process runs which stages: consecutive groups of about equal cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from localsim.errors import UserError

if TYPE_CHECKING:
    from localsim.config import Config
    from localsim.step_profile import StepProfile


def place_stages(costs: Sequence[float], processes: int) -> tuple[range, ...]:
    """Return for every process, from the one at the bottom, the stages that it runs: the largest sum is the smallest.

    Args:
        costs: of every stage from the input up, in any unit; finite and not negative.
        processes: how many; each gets at least one stage.

    Raises:
        UserError: there are more processes than stages, or fewer than one.
        ValueError: a cost is negative or not finite.
    """
    if bad := [cost for cost in costs if not (math.isfinite(cost) and cost >= 0)]:
        raise ValueError(f"a stage cannot cost {bad[0]}")
    if not 1 <= processes <= len(costs):
        raise UserError(
            f"{len(costs)} stages cannot be spread over {processes} processes; allowed: 1 to {len(costs)}, "
            "or a finer granularity"
        )
    sums = list(accumulate(costs, initial=0.0))
    return consecutive_groups(len(costs), processes, lambda start, stop: sums[stop] - sums[start])


def consecutive_groups(num: int, groups: int, weigh: Callable[[int, int], float]) -> tuple[range, ...]:
    """Return the split of 0..num-1 into consecutive groups, none empty, whose heaviest weighs least.

    With `best(k, stop)` the smallest possible heaviest of k groups over the first `stop`,

        best(k, stop) = min over start of max(best(k - 1, start), weigh(start, stop)),

    and among equals the last group begins earliest, so that the result is one and the same on every machine.

    Args:
        num: how many there are to split, at least as many as groups.
        groups: how many groups.
        weigh: the weight of a group `(start, stop)`.
    """
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for k in range(1, groups + 1):
        before = best[-1]
        best.append(
            {
                stop: min((max(before[start][0], weigh(start, stop)), start) for start in before if start < stop)
                for stop in range(k, num + 1)
            }
        )
    ends = [num]
    for k in range(groups, 0, -1):
        ends.append(best[k][ends[-1]][1])
    return tuple(range(start, stop) for start, stop in pairwise(reversed(ends)))


def stage_costs(config: Config, copies: int = 1) -> list[float]:
    """Return the FLOPs of a step by stage: its forward and backward passes, and those of the taps that read it.

    A tap's FLOPs are those of readout, head and objective. Counted on tensors without memory (see `localsim.cost`),
    within seconds for a ResNet-50 in four stages and a batch of 2048, and the same on every process. Of a sequential
    schedule, all phases are summed.

    Args:
        config: see `localsim.presets.resolve`.
        copies: processes that share every batch: each does its rows, and every loss on the whole batch.

    Raises:
        UserError: see `localsim.step_profile.profiles`.
    """
    from localsim.step_profile import profiles  # builds the network

    return flops_by_stage(profiles(config, copies))


def flops_by_stage(phases: Sequence[StepProfile]) -> list[float]:
    """Return what `stage_costs` does, of profiles that there are already."""
    return [float(sum(phase.flops_of_stage(stage) for phase in phases)) for stage in range(len(phases[0].stages))]
