"""Which taps act when: the simultaneous schedule and the sequential one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_same_tensors, checkpoint_tensors, timeless, tiny_config, train_in
from torch import Tensor, nn

from localsim import runs
from localsim.assembly import build_network
from localsim.credit import Credit
from localsim.errors import TrainingFailed, UserError
from localsim.network import LocalNetwork
from localsim.schedule import Phase, Schedule
from localsim.sources import set_modes

ENDS = (3, 7, 10)
"""Where the phases of three taps end in a tiny run of ten steps."""


def state_after(folder: Path, step: int, rule: str = "blockwise", **options) -> dict[str, Tensor]:
    """Return weights and buffers after so many steps of a tiny sequential run; 0 for the untrained network."""
    options = {"schedule": "sequential", **options}
    net = train_in(folder, rule, max_steps=step, **options) if step else build_network(tiny_config(rule, **options))
    return {name: x.clone() for name, x in net.state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Return the parts, such as `stages.0` or `taps.2`, in which a tensor differs."""
    return {".".join(name.split(".")[:2]) for name, x in before.items() if not torch.equal(x, after[name])}


# -- phases and rates -------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(epochs=st.integers(1, 9), steps=st.integers(1, 12), taps=st.integers(1, 8))
def test_phases_divide_the_steps_evenly_with_one_tap_each(epochs, steps, taps):
    config = tiny_config(schedule="sequential", epochs=epochs, warmup_epochs=0)
    if epochs * steps < taps:
        with pytest.raises(UserError, match=f"{epochs * steps} steps are too few to train {taps} taps one after"):
            Schedule.of(config, steps, taps)
        return
    schedule = Schedule.of(config, steps, taps)
    assert [phase.taps for phase in schedule.phases] == [(tap,) for tap in range(taps)]
    assert [phase.number for phase in schedule.phases] == list(range(taps))
    covered = [step for phase in schedule.phases for step in range(phase.start, phase.stop)]
    assert covered == list(range(epochs * steps))
    lengths = [phase.stop - phase.start for phase in schedule.phases]
    assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 2
    for phase in schedule.phases:
        assert {schedule.phase(step) for step in range(phase.start, phase.stop)} == {phase}


@settings(deadline=None)
@given(taps=st.integers(1, 4), warmup=st.floats(0, 1), steps=st.integers(8, 20))
def test_the_learning_rate_warms_up_and_falls_anew_in_every_phase(taps, warmup, steps):
    settings = {"epochs": 2, "warmup_epochs": warmup, "lr": 0.5, "final_lr_factor": 0.01}
    schedule = Schedule.of(tiny_config(schedule="sequential", **settings), steps, taps)
    warm = round(warmup * steps / taps)
    for phase in schedule.phases:
        rates = [schedule.rate(step) for step in range(phase.start, phase.stop)]
        for done, rate in enumerate(rates):
            q = (1 + math.cos(math.pi * (done - warm) / (len(rates) - warm))) / 2
            assert rate == pytest.approx(0.5 * done / warm if done < warm else 0.5 * (q + 0.01 * (1 - q)), rel=1e-12)
        assert rates[warm] == max(rates) == 0.5


def test_a_simultaneous_schedule_is_one_phase_of_all_taps():
    schedule = Schedule.of(tiny_config(), 5, 3)
    assert schedule.phases == (Phase(0, 0, 10, (0, 1, 2)),)
    one = Schedule.of(tiny_config(schedule="sequential"), 5, 1)
    assert one.phases == (Phase(0, 0, 10, (0,)),)
    assert [one.rate(step) for step in range(10)] == [schedule.rate(step) for step in range(10)]


def test_a_phase_that_would_be_all_warm_up_is_refused_at_the_start():
    config = tiny_config(schedule="sequential", epochs=2, warmup_epochs=1.5)
    with pytest.raises(UserError, match="warm-up would take 1 of 1 steps; give a smaller warmup_epochs or more epochs"):
        Schedule.of(config, 2, 3)


# -- what a phase changes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> list[dict[str, Tensor]]:
    """The network before the first phase of a sequential blockwise run, and after every phase."""
    folder = tmp_path_factory.mktemp("phases")
    return [state_after(folder / str(step), step) for step in (0, *ENDS)]


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_a_phase_changes_one_stage_and_its_tap_and_no_statistics_below(states, phase):
    before, after = states[phase], states[phase + 1]
    assert changed(before, after) == {f"stages.{phase}", f"taps.{phase}"}
    moved = {name for name, x in before.items() if not torch.equal(x, after[name])}
    assert {name for name in before if name.startswith(f"stages.{phase}") and "running" in name} <= moved
    assert {name for name in before if name.startswith(f"stages.{phase}") and "conv" in name} <= moved


def test_a_stage_that_two_taps_share_is_trained_in_two_phases(tmp_path):
    states = [state_after(tmp_path / str(step), step, "loco", objective="barlow_twins") for step in (0, 5, 10)]
    assert changed(states[0], states[1]) == {"stages.0", "stages.1", "taps.0"}
    assert changed(states[1], states[2]) == {"stages.1", "stages.2", "taps.1"}


def test_end_to_end_is_the_same_in_sequence(tmp_path):
    for schedule in ("simultaneous", "sequential"):
        train_in(tmp_path / schedule, "end_to_end", schedule=schedule)
    one, other = (tmp_path / "simultaneous", tmp_path / "sequential")
    assert_same_tensors(checkpoint_tensors(one), checkpoint_tensors(other))
    assert timeless(runs.read_metrics(one)) == timeless(runs.read_metrics(other))


def test_frozen_stages_are_in_evaluation_mode_and_all_others_in_training_mode():
    net = build_network(tiny_config("loco"))

    def modes(*taps: int) -> list[bool]:
        set_modes(net.eval(), Phase(0, 0, 1, taps))
        assert net.training and all(tap.training for tap in net.taps)
        return [stage.training for stage in net.stages]

    assert modes(0) == [True, True, True]
    assert modes(1) == [False, True, True]
    assert modes(0, 1) == [True, True, True]


def test_a_tap_that_changes_no_stage_freezes_what_lies_below_its_own():
    credit = Credit(np.array([[0, 0, 0], [0, 0, 0], [0, 0, 1]]), (0, 1, 2))
    net = build_network(tiny_config(credit=credit.to_config()))
    for tap in range(3):
        set_modes(net, Phase(tap, tap, tap + 1, (tap,)))
        assert [stage.training for stage in net.stages] == [stage >= tap for stage in range(3)]


# -- resume -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["views", "feature_cache"])
def whole(request, tmp_path_factory) -> tuple[Path, dict]:
    """A sequential run that nothing disturbed, and its settings."""
    options = {"schedule": "sequential", "feature_cache": request.param, "noise": "all:0.25", "log_every": 2}
    path = tmp_path_factory.mktemp("whole")
    train_in(path, **options)
    return path, options


@pytest.mark.parametrize("stopped_at", [2, 3, 4, 5, 6, 7, 9])
def test_a_sequential_run_stopped_anywhere_and_resumed_is_the_uninterrupted_one(whole, tmp_path, stopped_at):
    path, options = whole
    train_in(tmp_path, **options, max_steps=stopped_at)
    assert runs.checkpoint_step(tmp_path) == stopped_at
    train_in(tmp_path, **options)
    assert_same_tensors(checkpoint_tensors(tmp_path), checkpoint_tensors(path))
    assert timeless(runs.read_metrics(tmp_path)) == timeless(runs.read_metrics(path))
    assert not (tmp_path / "cache").exists()


class _Crash(Exception):
    pass


@pytest.mark.parametrize("crash_at", [4, 8])
def test_a_sequential_run_that_crashed_is_resumed_from_its_checkpoint(whole, tmp_path, monkeypatch, crash_at):
    """Phases end after steps 3, 7 and 10, epochs after 5 and 10: the last checkpoint is a phase's end both times."""
    path, options = whole
    append = runs.append_metrics

    def crash(path: Path, row: dict) -> None:
        append(path, row)
        if row["step"] == crash_at:
            raise _Crash

    with monkeypatch.context() as patched, pytest.raises(_Crash):
        patched.setattr(runs, "append_metrics", crash)
        train_in(tmp_path, **options)
    assert runs.checkpoint_step(tmp_path) == {4: 3, 8: 7}[crash_at]
    train_in(tmp_path, **options)
    assert_same_tensors(checkpoint_tensors(tmp_path), checkpoint_tensors(path))
    assert timeless(runs.read_metrics(tmp_path)) == timeless(runs.read_metrics(path))
    assert not (tmp_path / "cache").exists()


# -- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True], ids=["views", "feature_cache"])
def test_lines_of_metrics_hold_the_tap_that_acts_and_the_stages_that_ran(tmp_path, cached):
    train_in(tmp_path, schedule="sequential", feature_cache=cached)
    rows = runs.read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 11))
    for row in rows:
        phase = sum(row["step"] > end for end in ENDS)
        ran = {f"stage{stage + 1}" for stage in range(phase if cached else 0, phase + 1)}
        assert set(row["loss"]) == set(row["embedding_rank"]) == {f"stage{phase + 1}"}
        assert set(row["online_probe"]) == set(row["effective_rank"]) == ran


def test_a_phase_ends_with_a_line_whatever_log_every(tmp_path):
    train_in(tmp_path / "seldom", schedule="sequential", log_every=100)
    train_in(tmp_path / "often", schedule="sequential")
    often = runs.read_metrics(tmp_path / "often")
    seldom = runs.read_metrics(tmp_path / "seldom")
    assert [row["step"] for row in seldom] == list(ENDS)
    for phase, row in enumerate(seldom):
        losses = [line["loss"][f"stage{phase + 1}"] for line in often if f"stage{phase + 1}" in line["loss"]]
        assert row["loss"] == {f"stage{phase + 1}": pytest.approx(sum(losses) / len(losses), rel=1e-12)}


# -- collapse ---------------------------------------------------------------------------------------------------------


class _Constant(nn.Module):
    """A head whose embeddings are all equal."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * 0 + 1


def collapses(tap: int):
    def alter(net: LocalNetwork) -> None:
        net.taps[tap].head = _Constant(net.taps[tap].head)

    return alter


@pytest.mark.parametrize("schedule", ["simultaneous", "sequential"])
def test_a_run_told_to_goes_on_although_a_tap_has_collapsed(tmp_path, schedule):
    with pytest.raises(TrainingFailed, match="tap stage2 has collapsed at step"):
        train_in(tmp_path / "stopped", alter=collapses(1), schedule=schedule)
    train_in(tmp_path / "gone on", alter=collapses(1), schedule=schedule, on_collapse="continue")
    assert runs.checkpoint_step(tmp_path / "gone on") == 10
    ranks = [row["embedding_rank"].get("stage2") for row in runs.read_metrics(tmp_path / "gone on")]
    assert {rank for rank in ranks if rank is not None} == {0.0}


def test_a_tap_suspected_when_its_phase_ended_does_not_keep_the_others_from_their_checkpoints(tmp_path):
    train_in(tmp_path, alter=collapses(0), schedule="sequential", log_every=2, checkpoint_minutes=0, max_steps=9)
    # checks at steps 2 and 3 suspect the first tap; without another of its own it is never sure
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["00000008", "00000009"]
