"""Epochs and weight updates, counted by hand."""

from __future__ import annotations

import pytest
import torch
from tiny import STEPS_PER_EPOCH, tiny_config, train_in

from localsim.analysis.brain.training import training_behind
from localsim.runs import load_run, start_run, writing


def trained(path, rule: str = "blockwise", **settings):
    train_in(path, rule, **{"epochs": 2, "max_steps": 1, "warmup_epochs": 0, **settings})
    run = load_run(path)
    net = run.network("untrained")
    sizes = [sum(p.numel() for p in stage.parameters()) for stage in net.stages]
    return run, net, sizes


def test_all_stages_at_once(tmp_path):
    """Every step changes all stages, once each, whatever the number of losses."""
    for rule in ("blockwise", "end_to_end"):
        run, net, sizes = trained(tmp_path / rule, rule)
        heads = sum(p.numel() for tap in net.taps for p in tap.parameters())
        assert sum(sizes) == sum(p.numel() for p in net.parameters()) - heads > 0
        assert training_behind(run, [0, 1, 5, 10]) == {
            step: (step / STEPS_PER_EPOCH, float(step * sum(sizes))) for step in (0, 1, 5, 10)
        }


def test_one_stage_after_the_other(tmp_path):
    """The first half of the steps changes the first of two stages, the second half the other."""
    run, _, (first, second) = trained(tmp_path / "run", granularity=2, schedule="sequential")
    assert first != second
    found = training_behind(run, [0, 3, 5, 7, 10])
    assert {step: updates for step, (_, updates) in found.items()} == {
        0: 0, 3: 3 * first, 5: 5 * first, 7: 5 * first + 2 * second, 10: 5 * (first + second),
    }  # fmt: skip
    assert [epochs for epochs, _ in found.values()] == [0, 0.6, 1, 1.4, 2]


def test_a_loss_that_reaches_further_down_changes_more(tmp_path):
    run, _, (first, second) = trained(tmp_path / "run", granularity=2, schedule="sequential", reach=2)
    found = training_behind(run, [5, 6])
    assert found[6][1] - found[5][1] == first + second, "the second loss changes both stages"
    assert found[5][1] == 5 * first


def test_what_was_counted_is_what_training_changes(tmp_path):
    """Stages that a step counts have other weights after it, and no others have."""
    run, before, sizes = trained(tmp_path / "run", granularity=2, schedule="sequential")
    after = run.network()
    moved = [
        any(not torch.equal(a, b) for a, b in zip(x.parameters(), y.parameters(), strict=True))
        for x, y in zip(before.stages, after.stages, strict=True)
    ]
    assert moved == [True, False]
    assert training_behind(run, [run.step])[run.step][1] == pytest.approx(
        sum(size for size, changed in zip(sizes, moved, strict=True) if changed)
    )


def test_a_run_without_losses_changes_nothing(tmp_path):
    with writing(tmp_path / "run"):
        start_run(tmp_path / "run", tiny_config("untrained"))
    assert training_behind(load_run(tmp_path / "run"), [0]) == {0: (0.0, 0.0)}
