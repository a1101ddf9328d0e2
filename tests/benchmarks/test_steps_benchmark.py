"""The benchmark of training steps runs, its reference is what localsim computes, and its meters are right."""

from __future__ import annotations

import json
from functools import partial
from importlib import import_module

import pytest
import torch

from localsim import engine
from localsim.assembly import build_network
from localsim.presets import resolve
from localsim.rng import keyed, normal_rows

SCRIPT = "steps"
TINY = ["--backbone", "resnet18", "--batch", "4", "--size", "32", "--projector", "8", "--expand", "8", "--repeats", "1"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reference(benchmark):
    return import_module("reference_blockwise")


@pytest.fixture(scope="module")
def tracked(benchmark):
    return import_module("tracked")


def localsim_network(rule, **settings):
    """Return a small network in float64, all of whose weights take part."""
    small = {"backbone": "resnet18", "image_size": 32, "projector": [8, 8, 8], "zero_init_residual": False}
    return build_network(resolve(rule, "imagenet", {**small, **settings})).double()


def two_views():
    return torch.randn(2, 6, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()


def take_weights(net, other):
    """Give the parameters of `net` the values of `other`'s, which come in the same order."""
    with torch.no_grad():
        for own, theirs in zip(net.parameters(), other.parameters(), strict=True):
            assert own.shape == theirs.shape
            own.copy_(theirs)


def assert_alike(net, other):
    """Assert that gradients and running statistics agree, relative to the largest entry of each."""
    for of in ("parameters", "buffers"):
        for own, theirs in zip(getattr(net, of)(), getattr(other, of)(), strict=True):
            a, b = (own.grad, theirs.grad) if of == "parameters" else (own, theirs)
            assert a.abs().max() > 0
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * float(b.abs().max()))


@pytest.mark.parametrize("impl", ["plain", "fused"])
def test_localsim_has_the_gradients_of_the_reference(reference, impl):
    net = localsim_network("blockwise", expand_width=12, readout_impl=impl)
    plain = reference.Blockwise("resnet18", 12, [8, 8, 8]).double()
    take_weights(plain.blocks, net.stages)
    for read, project, tap in zip(plain.readouts, plain.projectors, net.taps, strict=True):
        take_weights(read, tap.readout)
        take_weights(project, tap.head)

    def as_the_engine_draws(view, block, x):
        with keyed(7, "stage", block, view):
            return normal_rows(len(x), x[0].numel(), like=x).view_as(x)

    views = two_views()
    losses = engine.backward(net, *views, key=7)
    total = reference.total_loss([plain(x, partial(as_the_engine_draws, view)) for view, x in enumerate(views)])
    total.backward()
    assert total.item() == pytest.approx(sum(float(loss) for loss in losses.values()), rel=1e-12)
    assert_alike(net.stages, plain.blocks)
    for read, project, tap in zip(plain.readouts, plain.projectors, net.taps, strict=True):
        assert_alike(tap.readout, read)
        assert_alike(tap.head, project)


@pytest.mark.parametrize("recompute", [False, True])
def test_localsim_has_the_gradients_of_the_reference_end_to_end(reference, recompute):
    """Running statistics too: a second run of the blocks does not move them again."""
    net = localsim_network("end_to_end", objective="barlow_twins")
    plain = reference.EndToEnd("resnet18", [8, 8, 8], recompute=recompute).double()
    take_weights(plain.blocks, net.stages)
    take_weights(plain.projector, net.taps[0])
    views = two_views()
    engine.backward(net, *views)
    reference.total_loss([plain(x) for x in views]).backward()
    assert_alike(net.stages, plain.blocks)
    assert_alike(net.taps[0], plain.projector)


def test_reference_draws_its_own_noise(reference):
    net = reference.Blockwise("resnet18", 4, [4]).eval()
    x = two_views()[0].float()
    first, again = net(x), net(x)
    assert all((a != b).any() for a, b in zip(first, again, strict=True))


def test_peak_is_what_is_allocated_at_a_time(tracked):
    there = torch.ones(10**6)

    def work():
        a = torch.empty(1000, dtype=torch.float64)
        b = torch.empty(500, dtype=torch.float64)
        del a
        c = torch.empty(100, dtype=torch.float64)
        there.mul_(2)
        return b, c

    assert tracked.peak_bytes(work, CPU) == 12_000


def test_flops_are_those_of_products_and_convolutions(tracked):
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    assert tracked.flops(lambda: a @ b) == 2 * 3 * 4 * 5
    assert tracked.flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 4 * 5
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3, requires_grad=True)
    assert tracked.flops(lambda: torch.conv2d(x, weight, padding=1)) == 2 * 2 * 64 * 3 * 5 * 9


def test_script_prints_a_row_of_everybody(benchmark, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "rates", lambda dtype, device: benchmark.Rates(1e12, 2e12))
    benchmark.main([*TINY, "--dtype", "float32", "--optimizer", "none", "--json", str(tmp_path / "steps.json")])
    about, _, *table = capsys.readouterr().out.splitlines()
    assert f"{torch.get_num_threads()} thread(s)" in about and "resnet18, batch 4, 32 px" in about
    names = [name for name in benchmark.CONTESTANTS if name not in benchmark.SLOW_TO_START]
    rows = table[2 : 2 + len(names)]
    assert {line.count("|") for line in (*table[:2], *rows)} == {len(benchmark.COLUMNS) + 1}
    assert table[-1] == "float32: matrix products at 1,000 GFLOP/s, convolutions at 2,000 GFLOP/s."
    found = {row["name"]: row for row in json.loads((tmp_path / "steps.json").read_text())["rows"]}
    assert list(found) == names
    assert all(
        row["cost"]["peak"] > 0 and 0 < row["cost"]["held"] and len(row["seconds"]) == 1 for row in found.values()
    )
    flops = {name: (row["cost"]["flops"], row["cost"]["plain_flops"]) for name, row in found.items()}
    # the loss may be computed in other ways
    reference = pytest.approx(flops["reference"][0], rel=0.01)
    assert all(plain == reference for name, (_, plain) in flops.items() if name.startswith(("reference", "blockwise")))
    assert all(flops[name][0] == flops[name][1] for name in ("reference", "end_to_end", "blockwise_plain"))
    assert all(flops[name][0] > flops[name][1] for name in ("end_to_end_recompute", "blockwise_recompute"))


def test_networks_are_made_anew_where_only_one_has_room(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "rates", lambda dtype, device: benchmark.Rates(1e12, 2e12))
    made = []
    own = benchmark.CONTESTANTS["blockwise"]

    def open_(job):
        made.append(job)
        return own.open(job)

    counted = benchmark.Contestant("counted", open_, own.plain)
    monkeypatch.setitem(benchmark.CONTESTANTS, "blockwise", counted)
    options = ["--only", "reference", "blockwise", "--without", "reference"]
    benchmark.main([*TINY, *options, "--repeats", "2", "--one-at-a-time"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| counted")]
    assert [row[1] for row in rows] == ["float32", "bf16"]
    assert all(row[4] == row[5] == row[7] == row[8] == "-" for row in rows)
    assert len(made) == 1 + 2


def test_rates_are_of_the_order_of_what_is_measured(tracked):
    found = tracked.rates("float32", CPU)
    a = torch.randn(1024, 1024)
    now = 2 * 1024**3 / tracked.seconds(lambda: a @ a, CPU, times=3)
    assert found.products > 0.2 * now and found.convolutions > 0.1 * now
