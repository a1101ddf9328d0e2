"""Predictions for several processes: closed forms on steps made by hand, and profiles against real steps and counts."""

from __future__ import annotations

import dataclasses
import math
import re
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config
from torch import nn

from localsim import engine
from localsim.assembly import build_network
from localsim.cli import make_parser
from localsim.cost import cost
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.machines import MACHINES, Machine, machine
from localsim.memory import HeldBytes
from localsim.scaling import FLOAT, SPENT, messages, predict, predictions
from localsim.step_profile import StepProfile, Work, profiles

# -- machines and steps made by hand ----------------------------------------------------------------------------------


def a_machine(**numbers) -> Machine:
    usual = {
        "flops": 1.0,
        "memory": math.inf,
        "bandwidth": math.inf,
        "latency": 0.0,
        "node": 1000,
        "bandwidth_between": math.inf,
        "latency_between": 0.0,
    }
    return Machine(name="made", source="by hand", **{**usual, **numbers})


def stage(index, flops, *, backward=False, **more) -> Work:
    return Work(kind="stage", index=index, stage=index, backward=backward, flops=flops, **more)


def tap(index, flops, *, backward=False, **more) -> Work:
    return Work(kind="tap", index=index, stage=index, backward=backward, flops=flops, **more)


def local_step(forward, back, *, norms=(), final=0) -> list[Work]:
    """Return the script of one loss per stage: a stage runs, its loss fires, it goes back."""
    script = []
    for index, (up, down) in enumerate(zip(forward, back, strict=True)):
        script += [stage(index, up, normed=tuple(norms)), tap(index, 0, embeddings=())]
        script += [stage(index, down, backward=True, norm_gradients=tuple(norms), final=final)]
    return script


def global_step(forward, back, *, final=0) -> list[Work]:
    """Return the script of one loss at the top."""
    up = [stage(index, flops) for index, flops in enumerate(forward)]
    down = [stage(index, flops, backward=True, final=final) for index, flops in enumerate(back)]
    return [*up, tap(len(forward) - 1, 0), *reversed(down)]


def a_profile(script, num_stages, processes=1, up=0, down=0, state=1) -> StepProfile:
    """Return a profile of one loss at the top where gradients come down, else of one per stage."""
    return StepProfile(
        rule="made",
        stages=tuple(f"stage {index}" for index in range(num_stages)),
        credit=Credit.end_to_end(num_stages) if down else Credit.blockwise(num_stages),
        batch_size=8 * processes,
        processes=processes,
        rows=8,
        script=tuple(script),
        parameters=(10,) * num_stages,
        up_bytes=(up,) * (num_stages - 1),
        down_bytes=(down,) * (num_stages - 1),
        image_bytes=0,
        held=tuple(tuple(100 for _ in range(start, num_stages)) for start in range(num_stages)),
        reads=(),
        state=state,
    )


def apart(num) -> tuple[range, ...]:
    return tuple(range(index, index + 1) for index in range(num))


def test_collectives_within_a_node_by_hand():
    here = a_machine(bandwidth=10.0, latency=0.5)
    assert here.gather_seconds(20, 4) == 3 * 20 / 10 + 2 * 0.5
    assert here.sum_seconds(20, 4) == 2 * (3 / 4 * 20 / 10 + 2 * 0.5)
    assert here.sum_seconds(20, 2) == 20 / 10 + 2 * 0.5
    assert here.gather_seconds(20, 1) == here.sum_seconds(20, 1) == 0
    assert here.gather_seconds(0, 5) == 3 * 0.5  # rounds are whole


def test_collectives_over_nodes_by_hand():
    here = a_machine(bandwidth=10.0, latency=0.5, node=4, bandwidth_between=2.0, latency_between=3.0)
    # 2 nodes of 4: 20 bytes come from the other node, then 2 x 20 from each of 3 in the same one
    assert here.gather_seconds(20, 8) == 20 / 2 + 3.0 + 3 * 2 * 20 / 10 + 2 * 0.5
    # a quarter of the sum is each one's to exchange
    assert here.sum_seconds(20, 8) == 2 * (3 / 4 * 20 / 10 + 2 * 0.5 + 1 / 2 * 5 / 2 + 3.0)
    assert here.gather_seconds(20, 4) == dataclasses.replace(here, node=1000).gather_seconds(20, 4)
    assert (here.link(4), here.link(5)) == ((10.0, 0.5), (2.0, 3.0))


WORK = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@settings(deadline=None)
@given(WORK, WORK, st.booleans())
def test_one_process_sends_nothing_and_takes_its_arithmetic(forward, back, together):
    back = [*back, *[1] * len(forward)][: len(forward)]
    script = (global_step if together else local_step)(forward, back, final=3)
    made = predict(a_profile(script, len(forward), up=5, down=5), a_machine(memory=20.0), [range(len(forward))])
    updates = len(forward) * FLOAT * 3 * 5 / 20  # weights, gradient and momentum read, two of them written
    assert made.seconds == pytest.approx(sum(forward) + sum(back) + updates)
    assert (made.messages, made.processes, made.parallel) == ((), 1, "data")
    assert sum(made.spent.values()) == pytest.approx(made.seconds)
    assert made.images_per_second == pytest.approx(8 / made.seconds)


def test_sums_of_gradients_hide_behind_the_next_stage_and_not_behind_the_end():
    # 4 * 10 bytes among 2 at 4 bytes/s: 10 s
    here = a_machine(bandwidth=4.0)
    labels = 3 * here.gather_seconds(8 * (8 + 2) / 3, 2)
    for second, hidden in ((20, 10), (4, 4)):
        script = local_step([1, second], [1, 1], final=10)
        made = predict(a_profile(script, 2, processes=2), here, [range(2)])
        assert made.spent["gradients"] == pytest.approx(20 - hidden)
        assert made.seconds == pytest.approx(labels + 1 + 1 + second + 1 + 20 - hidden)
    # one loss at the top: the upper stage's sum travels while the lower one goes back
    made = predict(a_profile(global_step([1, 1], [3, 1], final=10), 2, processes=2), here, [range(2)])
    assert made.seconds == pytest.approx(labels + 1 + 1 + 1 + 20)


def test_batch_norms_and_embeddings_are_waited_for():
    here = a_machine(bandwidth=2.0, latency=0.25)
    script = [stage(0, 1, normed=(3, 3)), tap(0, 1, embeddings=(16,)), stage(0, 1, backward=True, norm_gradients=(3,))]
    made = predict(a_profile(script, 1, processes=4), here, [range(1)])
    assert made.spent["norms"] == pytest.approx(2 * here.gather_seconds(4 * 7, 4) + here.sum_seconds(4 * 6, 4))
    labels = 3 * here.gather_seconds(8 * (8 + 2) / 3, 4)
    assert made.spent["embeddings"] == pytest.approx(here.gather_seconds(4 * 16, 4) + labels)
    assert made.seconds == pytest.approx(3 + sum(made.spent[name] for name in ("norms", "embeddings")))


@settings(deadline=None)
@given(WORK, st.integers(0, 3))
def test_a_pipeline_without_signals_down_is_as_fast_as_its_slowest_process(work, up):
    """Which takes in what comes from below before it works."""
    script = local_step(work, [2 * one for one in work])
    made = predict(a_profile(script, len(work), up=up), a_machine(bandwidth=1.0), apart(len(work)))
    taken = [3 * one + (up if index else 0) for index, one in enumerate(work)]
    assert made.seconds == pytest.approx(max(taken))


@settings(deadline=None)
@given(WORK, st.integers(1, 3))
def test_one_loss_at_the_top_leaves_one_process_working_at_a_time(work, size):
    script = global_step(work, [2 * one for one in work])
    made = predict(a_profile(script, len(work), up=size, down=size), a_machine(bandwidth=1.0), apart(len(work)))
    assert made.seconds == pytest.approx(3 * sum(work) + 2 * size * (len(work) - 1))
    assert made.spent["compute"] == pytest.approx(3 * max(work))


def test_a_signal_across_one_of_two_borders_ties_only_the_two():
    # the lower two stages have one loss, on the second of them; the third has its own
    script = [stage(0, 2), stage(1, 3), stage(1, 3, backward=True), stage(0, 2, backward=True)]
    script += [stage(2, 4), stage(2, 4, backward=True)]
    credit = Credit([[1, 1, 0], [0, 0, 1]], (1, 2))
    profile = dataclasses.replace(a_profile(script, 3, up=0), up_bytes=(1, 1), down_bytes=(1, 0), credit=credit)
    made = predict(profile, a_machine(), apart(3))
    assert made.seconds == pytest.approx(10)
    slow = dataclasses.replace(profile, script=(*script[:-2], stage(2, 9), stage(2, 9, backward=True)))
    assert predict(slow, a_machine(), apart(3)).seconds == pytest.approx(18)


def test_overlapping_blocks_wait_for_the_next_stage_alone():
    """What a loss says to the stage below is sent before that loss's own stage hears from above."""
    script = [stage(0, 1), tap(0, 0), stage(1, 2), tap(1, 0), stage(1, 3, backward=True), stage(0, 4, backward=True)]
    script += [stage(2, 5), tap(2, 0), stage(2, 6, backward=True), stage(1, 7, backward=True)]
    credit = Credit([[1, 1, 0], [0, 1, 1]], (1, 2))
    profile = dataclasses.replace(a_profile(script, 3), up_bytes=(1, 1), down_bytes=(1, 1), credit=credit)
    made = predict(profile, a_machine(), apart(3))
    # the second process: its forward pass, both of the third's (it sends down meanwhile, 3 < 5 + 6), its parameters
    assert made.seconds == pytest.approx(2 + 5 + 6 + 7)
    # where the third loss has a part in what the first process hears, the first waits for all of it
    chain = dataclasses.replace(profile, credit=Credit([[1, 1, 0], [1, 1, 1]], (1, 2)))
    assert predict(chain, a_machine(), apart(3)).seconds == pytest.approx(1 + 2 + 5 + 6 + 7 + 4)
    # two processes: the second sends down before it runs the third stage
    two = predict(profile, a_machine(), [range(1), range(1, 3)])
    assert two.seconds == pytest.approx(2 + 3 + 5 + 6 + 7)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=4),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
    st.floats(0.1, 10),
    st.floats(1, 10),
)
def test_more_bandwidth_and_less_latency_are_never_slower(work, together, copies, bandwidth, better):
    forward, back = zip(*work, strict=True)
    script = global_step(forward, back, final=5) if together else local_step(forward, back, norms=(2,), final=5)
    profile = a_profile(script, len(work), processes=copies, up=3, down=3 * together)
    slow = a_machine(bandwidth=bandwidth, latency=better)
    fast = a_machine(bandwidth=bandwidth * better, latency=1.0)
    for groups in ([range(len(work))], apart(len(work))):
        assert predict(profile, fast, groups).seconds <= predict(profile, slow, groups).seconds * (1 + 1e-9)


def test_memory_by_hand():
    script = local_step([1, 1], [1, 1], final=10)
    alone = predict(a_profile(script, 2), a_machine(), [range(2)])
    # 20 weights and as much momentum, the gradients of one stage, what autograd holds
    assert alone.memory == 4 * (20 * 2 + 10) + 100
    # half of the weights; two batches that come in
    split = predict(a_profile(script, 2, up=7), a_machine(), apart(2))
    assert split.memory == 4 * (10 * 2 + 10) + 100 + 2 * 7
    # the sum of gradients travels in a copy, and that of the stage before is still on its way
    shared = predict(a_profile(script, 2, processes=2), a_machine(), [range(2)])
    assert shared.memory == 4 * (20 * 2 + 10 + 10) + 100
    assert predict(a_profile(script, 2, state=2), a_machine(), [range(2)]).memory == alone.memory + 4 * 20


# -- profiles against real steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("blockwise", {}),
        ("loco", {}),
        ("end_to_end", {}),
        ("deep_supervision", {"recompute": "units"}),
        ("greedy_infomax", {}),
        ("clapp_dfb", {}),
        ("loco", {"transport": "direct_feedback"}),
        ("loco", {"schedule": "sequential"}),
        ("blockwise", {"readout": "expand", "readout_impl": "fused", "channels_last": True, "precision": "bf16"}),
    ],
    ids=str,
)
def test_the_parts_of_a_step_are_its_cost(rule, more):
    config = tiny_config(rule, **more)
    whole, phases = cost(config), profiles(config)
    assert max(phase.held_by(range(len(whole.stages))) for phase in phases) == whole.held_bytes
    assert tuple(map(max, zip(*(phase.up_bytes for phase in phases), strict=True))) == whole.up_bytes
    assert tuple(map(max, zip(*(phase.down_bytes for phase in phases), strict=True))) == whole.down_bytes
    assert sum(phases[0].parameters) == whole.trunk_parameters + whole.tap_parameters
    for backward, flops in ((False, whole.forward_flops), (True, whole.backward_flops)):
        assert max(sum(work.flops for work in one.script if work.backward == backward) for one in phases) == flops


def test_what_a_process_holds_is_what_its_part_of_a_real_step_holds():
    config = tiny_config("blockwise")
    (profile,) = profiles(config)
    net = build_network(config).train()
    maps = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    for index, part in enumerate(net.stages):
        for stop in range(index + 1, len(net.stages) + 1):
            taps = [tap for tap, one in enumerate(net.taps) if index <= one.stage < stop]
            with HeldBytes(net.parameters()) as held:
                engine.backward(net, *maps, taps=taps, start=index)
            assert profile.held_by(range(index, stop)) == held.peak
        maps = [part(one).detach() for one in maps]


def test_messages_of_a_tiny_network_by_hand():
    """ResNet-20 in three stages, projectors 8-8 behind readouts of 8 channels, 8 images of two views; 4 processes."""
    config = tiny_config("blockwise", noise="none", readout="expand")
    net = build_network(config)
    (profile,) = profiles(config, 4)
    whole = {message.kind: message for message in messages(profile, [range(3)], 0)}
    # 19 batch norms in the trunk; one in each readout and one between the two layers of each projector
    channels = 7 * [16] + 6 * [32] + 6 * [64] + 6 * [8]
    norms = 4 * 2 * sum((2 * wide + 1) + 2 * wide for wide in channels)
    assert (whole["norms"].number, whole["norms"].bytes) == (2 * 2 * len(channels), norms)
    assert (whole["embeddings"].number, whole["embeddings"].bytes) == (3 * 2, 3 * 2 * 2 * 8 * 4)
    trained = sum(p.numel() for p in net.parameters())
    assert (whole["gradients"].number, whole["gradients"].bytes) == (2 * 3, 4 * trained)
    assert set(whole) == {"labels", "norms", "embeddings", "gradients"}

    part = {message.kind: message for message in messages(profile, [range(1), range(1, 3)], 0)}
    assert part["activations up"].bytes == 4 * 2 * 2 * 16 * 16 * 16  # two views of two images
    lowest = sum(p.numel() for module in (net.stages[0], net.taps[0]) for p in module.parameters())
    assert part["gradients"].bytes == 4 * lowest
    upper = {message.kind for message in messages(profile, [range(1), range(1, 3)], 1)}
    assert "activations up" not in upper and "signals down" not in upper
    (tied,) = profiles(tiny_config("loco"))
    told = {message.kind: message.bytes for message in messages(tied, [range(2), range(2, 3)], 1)}
    assert told == {"signals down": 4 * 2 * 8 * 32 * 8 * 8}


@pytest.mark.parametrize("rule", ["blockwise", "loco", "end_to_end", "deep_supervision"])
def test_every_gradient_is_final_once(rule):
    config = tiny_config(rule)
    net = build_network(config)
    (profile,) = profiles(config)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (*net.stages, *net.taps)]
    assert sorted(work.final for work in profile.script if work.final) == sorted(sizes)
    norms = [module.num_features for module in net.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert sorted(c for work in profile.script for c in work.normed) == sorted(config.views * norms)


def test_signals_cross_batch_norms_once_more_where_they_are_sent_on():
    """LoCo's middle stage: what its own loss tells the stage below, and later what both tell itself."""
    (profile,) = profiles(tiny_config("loco"))
    passes = [work for work in profile.script if (work.kind, work.index, work.backward) == ("stage", 1, True)]
    assert [len(work.norm_gradients) for work in passes] == [2 * 6, 2 * 6]
    assert [work.final > 0 for work in passes] == [False, True]


def test_a_process_that_shares_a_batch_does_its_rows_and_all_of_the_losses():
    config = tiny_config("blockwise", objective="simclr")
    (whole,), (part,) = profiles(config), profiles(config, 4)

    def flops(profile, *kinds):
        return sum(work.flops for work in profile.script if work.kind in kinds)

    assert 4 * flops(part, "stage", "tap") == flops(whole, "stage", "tap")
    assert flops(part, "loss") == flops(whole, "loss")
    assert (part.rows, profiles(config, 3)[0].rows) == (2, 3)
    assert not any(work.embeddings for work in whole.script)
    with pytest.raises(UserError, match="9 processes cannot share a batch of 8 images; allowed: 1 to 8"):
        profiles(config, 9)


# -- predictions ------------------------------------------------------------------------------------------------------


def test_every_way_that_fits_is_predicted_or_the_one_that_is_asked_for():
    config, here = tiny_config(), a_machine(flops=1e9)
    found = [(one.processes, one.parallel) for one in predictions(config, [1, 4, 6], here)]
    assert found == [(1, "data"), *((4, way) for way in ("data", "blocks:2")),
                     *((6, way) for way in ("data", "blocks:2", "blocks:3"))]  # fmt: skip
    (one,) = predictions(config, [6], here, "blocks")
    assert (one.parallel, len(one.groups), one.processes) == ("blocks:3", 3, 6)
    assert set(one.spent) == set(SPENT)
    for words, number, sentence in (
        ("blocks:3", 4, "parallel blocks:3 cannot divide 3 stages among 4 processes"),
        ("stages", 4, "unknown parallel 'stages'; allowed: data, blocks, blocks:P"),
        ("data", 16, "16 processes cannot share a batch of 8 images"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            predictions(config, [number], here, words)


def test_taps_that_read_other_stages_are_predicted_for_divided_batches_only():
    config, here = tiny_config("clapp_dfb"), a_machine(flops=1e9)
    assert [one.parallel for one in predictions(config, [2], here)] == ["data"]
    with pytest.raises(UserError, match=r"taps that read what other stages made; .*; allowed: --parallel data"):
        predictions(config, [2], here, "blocks")


def test_named_machines_say_what_is_assumed():
    config = tiny_config(precision="bf16")
    for name in ("a100", "a100-ethernet", "h100"):
        assert "Assumed, not measured" in machine(name, config).source
    # NVIDIA's figure for the A100, dense bfloat16: 312 TFLOP/s
    assert machine("a100", config).flops == 0.25 * 312e12 > machine("a100", tiny_config(precision="full")).flops
    own = machine("1e12,2e9,1e-5", config)
    assert (own.flops, own.bandwidth, own.latency, own.bandwidth_between) == (1e12, 2e9, 1e-5, 2e9)
    for bad in ("a1000", "1e12,2e9", "1e12,2e9,-1", "0,1,1", "nan,1,1", "1,2,3,4"):
        with pytest.raises(UserError, match=r"--machine is .*; allowed: a100, a100-ethernet, h100, here, or FLOPS"):
            machine(bad, config)
    assert MACHINES == ("a100", "a100-ethernet", "h100", "here")


def test_this_machine_is_measured():
    here = machine("here", tiny_config(batch_size=4))
    assert "measured just now on cpu" in here.source or "cuda" in here.source
    assert 1e6 < here.flops < 1e16 and 1e6 < here.bandwidth < 1e13 and 1e-8 < here.latency < 1
    assert here.bandwidth == here.bandwidth_between


# -- the guide --------------------------------------------------------------------------------------------------------

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_guide_shows_the_tables_that_its_script_prints():
    """The quick ones of them; else: put there what `python docs/scaling_table.py` prints."""
    script = runpy.run_path(str(DOCS / "scaling_table.py"))
    shown = (DOCS / "scaling.md").read_text()
    assert all(line in shown for line in script["heads"]())
    for learning, preset, numbers, name in script["QUICK"]:
        for line in script["lines"](learning, preset, numbers, [name])[name]:
            assert line in shown, line
    for title, learnings, _, numbers, _ in script["TABLES"]:
        _, _, after = shown.partition(title)
        table = after.partition("\n\n")[2].partition("\n\n")[0].splitlines()
        rows = sum(len(one.ways) * len(numbers) for one in learnings)
        assert len(table) == 2 + rows


def test_the_commands_of_the_guide_are_commands():
    lines = re.search(r"```bash\n(.*?)```", (DOCS / "scaling.md").read_text(), flags=re.S)
    assert lines is not None
    for line in lines[1].splitlines():
        told = make_parser().parse_args(line.split()[1:])
        assert told.processes and told.machine in (None, *MACHINES)
