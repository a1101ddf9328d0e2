"""The engine run in part: some of the taps, and from a stage in the middle on."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import KEY, credits, engine_gradients, make_net, make_views

from localsim import build, engine
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.network import IMAGES, LocalNetwork

NET = settings(max_examples=25, deadline=None)


def assert_equal(ours, reference):
    assert ours.keys() == reference.keys()
    assert [name for name in ours if not torch.equal(ours[name], reference[name])] == []


def alone(net: LocalNetwork, tap: int) -> LocalNetwork:
    """Return a network of the same stages with one of the taps and its row alone."""
    row = Credit(net.credit.matrix[[tap]], (net.taps[tap].stage,))
    return copy.deepcopy(LocalNetwork(list(net.stages), [net.taps[tap]], row))


def below(net: LocalNetwork, views, start: int) -> list[torch.Tensor]:
    """Return what enters stage `start`, computed without the engine."""
    with torch.no_grad():
        return [list(net.stage_outputs(view))[start - 1] for view in views]


@NET
@given(credits(), st.data(), st.booleans())
def test_one_tap_learns_as_if_there_were_no_other(credit, data, eager):
    net, views = make_net(credit), make_views()
    tap = data.draw(st.integers(0, credit.num_taps - 1))
    single = alone(net, tap)
    ours = engine_gradients(net, views, taps=[tap], eager=eager)
    reference = engine_gradients(single, views)
    renamed = {name.replace("taps.0.", f"taps.{tap}."): grad for name, grad in reference.items()}
    assert_equal(ours, renamed)
    assert any(name.startswith(f"taps.{tap}.") for name in ours)
    allowed = {f"stages.{stage}." for stage in range(credit.num_stages) if credit.matrix[tap, stage]}
    assert {name[: len("stages.0.")] for name in ours if name.startswith("stages")} == allowed


@NET
@given(credits(), st.data())
def test_some_taps_give_their_losses_and_run_no_stage_above_the_highest(credit, data):
    chosen = sorted(data.draw(st.sets(st.integers(0, credit.num_taps - 1), min_size=1)))
    net, views = make_net(credit), make_views()
    whole = engine.backward(copy.deepcopy(net), *views, key=KEY)
    ran = []
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    hooks = engine.Hooks(on_stage=lambda stage, *_rest: ran.append(stage))
    losses = engine.backward(net, *views, key=KEY, taps=chosen, hooks=hooks)
    assert list(losses) == sorted(chosen, key=lambda tap: net.taps[tap].stage)
    assert all(torch.equal(losses[tap], whole[tap]) for tap in chosen), (
        "noise and dropout are drawn by place, not order"
    )
    top = max(net.taps[tap].stage for tap in chosen)
    assert ran == list(range(top + 1))
    for name, buffer in net.named_buffers():
        kind, index, *_ = name.split(".")
        runs = int(index) <= top if kind == "stages" else int(index) in chosen
        assert torch.equal(buffer, before[name]) != runs, name


@NET
@given(credits())
def test_all_taps_named_are_all_taps(credit):
    net, views = make_net(credit), make_views()
    assert_equal(engine_gradients(net, views, taps=range(credit.num_taps)), engine_gradients(net, views))


@NET
@given(credits(), st.data(), st.booleans())
def test_entering_above_frozen_stages_changes_no_bit(credit, data, eager):
    tap = data.draw(st.integers(0, credit.num_taps - 1))
    lowest = credit.lowest(tap)
    start = data.draw(st.integers(0, credit.taps[tap] if lowest is None else lowest))
    net, views = make_net(credit), make_views()
    for stage in range(start):
        net.stages[stage].eval()
    entering = below(net, views, start) if start else views
    ran = []
    hooks = engine.Hooks(on_stage=lambda stage, *_rest: ran.append(stage))
    part = engine_gradients(net, entering, taps=[tap], start=start, eager=eager, hooks=hooks)
    assert ran == list(range(start, net.taps[tap].stage + 1))
    assert_equal(part, engine_gradients(net, views, taps=[tap], eager=eager))


def test_a_tap_that_reaches_below_the_entrance_is_refused():
    net = make_net(Credit.overlapping(4))  # taps on stages 1, 2, 3
    entering = below(net, make_views(), 2)
    engine.backward(net, *entering, key=KEY, taps=[2], start=2)
    for start, taps in ((2, [1]), (3, [2]), (2, None), (2, [1, 2])):
        with pytest.raises(UserError, match=f"a tap needs what is below stage {start + 1}, where the views enter"):
            engine.backward(net, *entering, key=KEY, taps=taps, start=start)


def test_a_tap_that_changes_no_stage_still_needs_its_own():
    net = make_net(Credit(np.array([[0, 0, 0], [0, 0, 1]]), (0, 2)))
    entering = below(net, make_views(), 1)
    with pytest.raises(UserError, match="a tap needs what is below stage 2, where the views enter"):
        engine.backward(net, *entering, key=KEY, taps=[0], start=1)


def test_a_tap_that_reads_the_images_is_refused_above_them():
    net = make_net(Credit.blockwise(3), contexts={2: IMAGES})
    views = make_views()
    engine.backward(net, *views, key=KEY, taps=[2])
    engine.backward(net, *below(net, views, 1), key=KEY, taps=[1], start=1)
    with pytest.raises(UserError, match="a tap needs what is below stage 3"):
        engine.backward(net, *below(net, views, 2), key=KEY, taps=[2], start=2)


def test_a_tap_that_reads_a_higher_stage_has_it_run_but_not_trained():
    net, views = make_net(Credit.blockwise(4), contexts={1: 3}), make_views()
    ran = []
    hooks = engine.Hooks(on_stage=lambda stage, *_rest: ran.append(stage))
    grads = engine_gradients(net, below(net, views, 1), taps=[1], start=1, hooks=hooks)
    assert ran == [1, 2, 3]
    assert {name.split(".u")[0][:8] for name in grads} == {"stages.1", "taps.1.h"}


@pytest.mark.parametrize("taps", [[0, 0], [-1], [3], [0, 7]])
def test_taps_that_are_not_there_or_twice_are_refused(taps):
    net = make_net(Credit.blockwise(3))
    with pytest.raises(UserError, match="cannot act; allowed: each at most once of 0 to 2"):
        engine.backward(net, *make_views(), key=KEY, taps=taps)


def test_gradients_have_the_memory_order_of_their_parameters():
    """Fused optimisers go through both in that order and check nothing."""
    net = make_net(Credit.blockwise(2))
    net.stages[0].register_forward_pre_hook(lambda _module, args: (args[0].contiguous(),))
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    engine.backward(net, *make_views(), key=KEY)
    wide = [p for p in net.parameters() if p.dim() == 4 and p.grad is not None]
    assert wide and not all(p.is_contiguous() for p in wide)
    grad = torch.randn(wide[0].shape, dtype=wide[0].dtype)
    laid = engine._laid_out_as(wide[0], grad)
    assert torch.equal(laid, grad) and laid.stride() == wide[0].stride() != grad.stride()
    assert all(p.grad is not None and p.grad.stride() == p.stride() for p in wide)


@pytest.mark.parametrize("listened_to", ["nothing", "tap", "head", "subclass"])
def test_heads_map_all_views_at_once_unless_somebody_listens(listened_to):
    """A hook, or a subclass with a forward of its own, would be passed by."""
    net = build("blockwise", preset="quick", backbone="resnet20", granularity=1, projector=[6, 5], expand_width=8)
    tap, calls = net.taps[0], []
    if listened_to == "subclass":
        tap.head.__class__ = type("Own", (type(tap.head),), {"forward": lambda self, x: calls.append(1) or self[0](x)})
    elif listened_to != "nothing":
        heard = tap if listened_to == "tap" else tap.head
        heard.register_forward_hook(lambda *_call: calls.append(1))

    def centred(embeddings, _labels):
        for z in embeddings:
            z -= z.mean(0)  # objectives may work in place
        return sum(z.square().sum() for z in embeddings)

    tap.objective = centred
    engine.backward(net.train(), *torch.randn(3, 4, 3, 32, 32), key=KEY)
    assert len(calls) == (0 if listened_to == "nothing" else 3)
