"""Stages are placed as well as they can be, which all placements tried one by one show."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config

from localsim.cost import cost
from localsim.errors import UserError
from localsim.placement import consecutive_groups, place_stages, stage_costs

COSTS = st.lists(st.integers(0, 20), min_size=1, max_size=9)


def every_placement(num, groups):
    for cuts in combinations(range(1, num), groups - 1):
        yield tuple(range(start, stop) for start, stop in pairwise((0, *cuts, num)))


def heaviest(costs, groups):
    return max(sum(costs[stage] for stage in group) for group in groups)


@settings(deadline=None)
@given(COSTS, st.data())
def test_no_other_placement_has_a_lighter_heaviest_process(costs, data):
    processes = data.draw(st.integers(1, len(costs)))
    placed = place_stages(costs, processes)
    assert placed in set(every_placement(len(costs), processes))
    assert heaviest(costs, placed) == min(heaviest(costs, one) for one in every_placement(len(costs), processes))


def test_placements_by_hand():
    assert place_stages([5, 1, 1, 1], 2) == (range(1), range(1, 4))
    assert place_stages([1, 1, 1, 5], 2) == (range(3), range(3, 4))
    assert place_stages([1, 2, 3, 4], 4) == tuple(range(stage, stage + 1) for stage in range(4))
    assert place_stages([0.0, 0.0], 1) == (range(2),)
    # among equals the group on top begins earliest
    assert place_stages([2, 0, 2], 2) == (range(1), range(1, 3))


def test_groups_may_weigh_other_than_the_sum_of_what_is_in_them():
    assert consecutive_groups(4, 2, lambda start, stop: (stop - start) ** 2) == (range(2), range(2, 4))
    assert consecutive_groups(4, 2, lambda start, stop: float(stop == 4 and start > 1)) == (range(1), range(1, 4))


@pytest.mark.parametrize("processes", [0, 3, -1])
def test_more_processes_than_stages_are_one_sentence(processes):
    with pytest.raises(UserError, match=f"2 stages cannot be spread over {processes} processes; allowed: 1 to 2"):
        place_stages([1.0, 2.0], processes)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_costs_are_finite_and_not_negative(bad):
    with pytest.raises(ValueError, match="a stage cannot cost"):
        place_stages([1.0, bad], 2)


# ResNet-20 on images of 16 px, see test_cost: multiply-adds per image by stage, and those of a stage's first layer
STAGES = (
    16 * 16 * 9 * (16 * 3 + 6 * 16 * 16),
    8 * 8 * 9 * (32 * 16 + 5 * 32 * 32),
    4 * 4 * 9 * (64 * 32 + 5 * 64 * 64),
)
FIRSTS = (16 * 16 * 9 * 16 * 3, 8 * 8 * 9 * 32 * 16, 4 * 4 * 9 * 64 * 32)
TAPS = (16 * 10, 32 * 10, 64 * 10)


def test_stage_costs_by_hand():
    """Forward, and backward a gradient for weights and one for inputs, which no stage's first layer needs."""
    found = stage_costs(tiny_config("greedy_supervised", granularity=3))
    by_hand = [2 * 8 * (3 * stage - first + 3 * tap) for stage, first, tap in zip(STAGES, FIRSTS, TAPS, strict=True)]
    assert found == by_hand
    # one loss: the images alone need no gradient, the lower stages have no taps
    found = stage_costs(tiny_config("end_to_end", objective="cross_entropy", granularity=3))
    assert found == [
        2 * 8 * (3 * STAGES[0] - FIRSTS[0]),
        2 * 8 * 3 * STAGES[1],
        2 * 8 * (3 * STAGES[2] + 3 * TAPS[2]),
    ]


def test_copies_do_their_rows_and_every_loss_on_the_whole_batch():
    whole, half = (stage_costs(tiny_config("blockwise", objective="simclr"), copies) for copies in (1, 2))
    losses = [2 * a - b for a, b in zip(half, whole, strict=True)]
    # SimCLR compares both views of 8 images with each other, 8 numbers each; either factor gets a gradient
    assert losses == [2 * 16 * 16 * 8 * 3] * 3


def test_costs_of_a_sequential_schedule_are_those_of_all_phases():
    phases = stage_costs(tiny_config(schedule="sequential"))
    assert len(phases) == 3
    # the lowest stage runs forward in every phase
    assert phases[0] > stage_costs(tiny_config())[0]


def test_costs_add_up_to_those_of_the_step():
    predicted = cost(tiny_config("loco"))
    assert sum(stage_costs(tiny_config("loco"))) == predicted.forward_flops + predicted.backward_flops
