"""Activation checkpointing inside stages, and compiled stages: the same learning, otherwise computed."""

from __future__ import annotations

import copy
import functools
import shutil

import pytest
import torch
from tiny import TINY

import localsim
from localsim import build, engine
from localsim.errors import UserError
from localsim.memory import HeldBytes
from localsim.network import LocalNetwork

SMALL = {"preset": "quick", "backbone": "resnet18", "granularity": 4, "projector": [16, 16], "expand_width": 32}


def views() -> torch.Tensor:
    return torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def step(net: LocalNetwork, precision: str = "full") -> tuple[list[torch.Tensor], int]:
    """Return losses, gradients and buffers after one step, and the bytes held at its peak."""
    net.zero_grad()
    with HeldBytes(net.parameters()) as held:
        losses = engine.backward(net.train(), *views(), key=5, precision=precision)
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return [*losses.values(), *grads, *(b.clone() for b in net.buffers())], held.peak


@pytest.mark.parametrize("precision", ["full", "bf16"])
@pytest.mark.parametrize("rule", ["blockwise", "loco", "end_to_end", "chunked", "stopgrad_overlap"])
def test_recomputed_units_learn_the_same_bits_from_less(rule, precision):
    """LoCo's segments are gone through several times, so its units are run again several times."""
    kept, held = step(build(rule, **SMALL), precision)
    recomputed, held_less = step(build(rule, **SMALL, recompute="units"), precision)
    assert len(kept) == len(recomputed) > 60
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
    assert held_less < 0.75 * held


def test_feedback_weights_carry_the_same_signals_when_units_are_run_again():
    kept, _ = step(build("end_to_end", **SMALL, transport="feedback_alignment"))
    recomputed, _ = step(build("end_to_end", **SMALL, transport="feedback_alignment", recompute="units"))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.slow  # half a minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_stages_learn_the_same():
    net = build("loco", **{**SMALL, "granularity": 2, "backbone": "vgg11_bn"}).double()
    plain = build("loco", **{**SMALL, "granularity": 2, "backbone": "vgg11_bn"}).double()
    net.compile_stages()
    doubled = views().double()
    for one in (plain, net):
        engine.backward(one.train(), *doubled, key=5)
    for (name, a), b in zip(plain.named_parameters(), net.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-8, atol=1e-10, msg=name)
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(plain.buffers(), net.buffers(), strict=True))


def test_a_copy_of_a_compiled_stage_computes_with_its_own_weights():
    net = build("blockwise", **SMALL)
    x = views()[0]
    for stage in net.stages:
        stage._compiled = lambda x: pytest.fail("compiled for the original")
    twin = copy.deepcopy(net).train()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    with pytest.raises(pytest.fail.Exception, match="compiled for the original"):
        net(x)
    with torch.no_grad():
        assert not torch.equal(twin(x), net(x))  # without gradients nothing is compiled
    twin(x)


@pytest.mark.slow  # half a minute of tracing
@pytest.mark.filterwarnings("ignore")
def test_every_stage_is_compiled_however_many_there_are(monkeypatch):
    """They share one code object, of which torch compiles eight variants unless it is told otherwise; here are nine."""
    calls = []

    def backend(graph, _inputs):
        return lambda *given: calls.append(graph) or graph.forward(*given)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    net = build("layerwise", preset="quick", backbone="resnet50", projector=[8], expand_width=8, compile=True)
    engine.backward(net.train(), *views(), key=1)
    assert len(calls) == 2 * len(net.stages) == 34, "two views through every stage"


@pytest.mark.parametrize("changed", [{"recompute": "units"}, {"readout_impl": "fused"}])
def test_a_resumed_run_is_an_uninterrupted_one(changed, tmp_path):
    settings = {**TINY, **changed, "max_steps": None}
    whole = localsim.run("blockwise", out=tmp_path / "whole", quiet=True, probe_protocol="none", **settings)
    localsim.run("blockwise", out=tmp_path / "parts", quiet=True, probe_protocol="none", **{**settings, "max_steps": 4})
    parts = localsim.run(out=tmp_path / "parts", resume=True, quiet=True)
    ours, theirs = (run.network().state_dict() for run in (whole, parts))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [row["loss"] for row in whole.metrics()] == [row["loss"] for row in parts.metrics()]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"recompute": "layers"}, "recompute is 'layers'; allowed: none, units"),
        ({"recompute": "units", "compile": True}, "recompute units and compile contradict each other"),
        (
            {"recompute": "units", "transport": "direct_feedback"},
            "recompute units cannot serve transport direct_feedback",
        ),
    ],
)
def test_what_cannot_be_recomputed_is_told(settings, told):
    with pytest.raises(UserError, match=told):
        build("blockwise", **SMALL, **settings)
