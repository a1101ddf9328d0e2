"""The five exactness properties of the engine, in float64 on small nets, over random credit matrices."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from localsim import engine
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.memory import HeldBytes
from localsim.network import LocalNetwork, Stage, Tap
from localsim.rng import keyed

WIDTH, BATCH, KEY = 3, 5, 7


class Unit(nn.Module):
    """Conv, batch norm, dropout and a smooth non-linearity: everything that must behave as in one forward pass."""

    def __init__(self, name: str, dropout: float) -> None:
        super().__init__()
        self.name = name
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.bn = nn.BatchNorm2d(WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return torch.tanh(self.dropout(self.bn(self.conv(x)))) + x


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) * x.std() if self.training else x


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class WithContext(nn.Module):
    """A head that also reads the pooled activity of a higher stage."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.top = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x, context):
        return self.own(x) + self.top(context.mean((2, 3)))


def objective(embeddings, labels):
    first, last = embeddings[0], embeddings[-1]
    return (first - last).square().mean() + first.pow(3).mean() + (first * last).cos().mean()


def make_net(credit: Credit, *, dropout=0.2, noise=True, seed=0, contexts=()) -> LocalNetwork:
    contexts = dict(contexts)
    with keyed(seed, "test net"):
        stages = [Stage([Unit(f"u{i}", dropout)], Noise() if noise else None) for i in range(credit.num_stages)]
        taps = [
            Tap(stage, Mean(), WithContext(), objective, context=contexts[t])
            if t in contexts
            else Tap(stage, Mean(), nn.Sequential(nn.Linear(WIDTH, 4), nn.BatchNorm1d(4)), objective)
            for t, stage in enumerate(credit.taps)
        ]
    return LocalNetwork(stages, taps, credit).double()


def make_views(num=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, WIDTH, 4, 4, generator=generator, dtype=torch.float64) for _ in range(num)]


def naive_gradients(net: LocalNetwork, views) -> dict[str, torch.Tensor]:
    """A separate, uncut graph for every tap, its gradients weighted afterwards: the definition of the credit matrix."""
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    touched = set()
    for t in range(len(net.taps)):
        twin = copy.deepcopy(net)
        tap = twin.taps[t]
        outputs = []
        for view, x in enumerate(views):
            outs = []
            for i, stage in enumerate(twin.stages):
                with keyed(KEY, "stage", i, view):
                    x = stage(x)
                outs.append(x)
            outputs.append(outs)
        embeddings = []
        for view, outs in enumerate(outputs):
            with keyed(KEY, "tap", t, view):
                context = None if tap.context is None else outs[tap.context].detach()
                embeddings.append(tap(outs[tap.stage], context))
        with keyed(KEY, "objective", t):
            loss = tap.objective(tuple(embeddings), None)
        names, parameters = zip(*twin.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            if grad is None:
                continue
            kind, index, *_ = name.split(".")
            weight = net.credit.matrix[t, int(index)] if kind == "stages" else float(int(index) == t)
            if weight:
                total[name] += weight * grad
                touched.add(name)
    return {name: grad for name, grad in total.items() if name in touched}


def engine_gradients(net: LocalNetwork, views, **options) -> dict[str, torch.Tensor]:
    net.zero_grad(set_to_none=True)
    engine.backward(net, *views, key=KEY, **options)
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_close(ours, reference):
    assert ours.keys() == reference.keys()
    for name in ours:
        scale = max(reference[name].abs().max().item(), 1.0)
        assert (ours[name] - reference[name]).abs().max().item() < 1e-12 * scale, name


@st.composite
def credits(draw, max_stages=5) -> Credit:
    num_stages = draw(st.integers(1, max_stages))
    taps = sorted(draw(st.lists(st.integers(0, num_stages - 1), min_size=1, max_size=4)))
    weight = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, 0.3])
    rows = [[draw(weight) if stage <= tap else 0.0 for stage in range(num_stages)] for tap in taps]
    return Credit(np.array(rows), tuple(taps))


@st.composite
def published(draw) -> Credit:
    num_stages = draw(st.integers(1, 5))
    reach = draw(st.integers(1, num_stages))
    make = draw(st.sampled_from([Credit.overlapping, Credit.banded, Credit.chunked, Credit.interlocking]))
    return make(num_stages, reach)


# -- the definition ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.one_of(credits(), published()), st.integers(0, 3))
def test_gradients_are_the_definition_of_the_matrix(credit, seed):
    net, views = make_net(credit, seed=seed), make_views(seed=seed)
    reference = naive_gradients(net, views)
    assert_close(engine_gradients(net, views), reference)


@settings(deadline=None, max_examples=20)
@given(credits(), st.data())
def test_taps_that_wait_for_a_higher_stage(credit, data):
    contexts = {
        t: data.draw(st.integers(stage, credit.num_stages - 1))
        for t, stage in enumerate(credit.taps)
        if data.draw(st.booleans())
    }
    net, views = make_net(credit, contexts=contexts), make_views()
    assert_close(engine_gradients(net, views), naive_gradients(net, views))


def test_one_view_and_three_views():
    for num in (1, 3):
        net, views = make_net(Credit.overlapping(4, 2)), make_views(num)
        assert_close(engine_gradients(net, views), naive_gradients(net, views))


# -- property 1: the last row is backpropagation ----------------------------------------------------------------------


@pytest.mark.parametrize("credit", [Credit.end_to_end(4), Credit.overlapping(2, 2), Credit.overlapping(3, 3)])
def test_last_row_ones_is_plain_autograd(credit):
    net, views = make_net(credit), make_views()
    ours = engine_gradients(copy.deepcopy(net), views)
    embeddings = []
    outputs = list(views)
    for i, stage in enumerate(net.stages):
        for view in range(len(views)):
            with keyed(KEY, "stage", i, view):
                outputs[view] = stage(outputs[view])
    for view, out in enumerate(outputs):
        with keyed(KEY, "tap", 0, view):
            embeddings.append(net.taps[0](out))
    objective(embeddings, None).backward()
    assert_close(ours, {name: p.grad for name, p in net.named_parameters()})


def test_interlocking_over_the_whole_depth_is_backpropagation_on_the_backbone():
    views = make_views()
    interlocking = make_net(Credit.interlocking(4, 4))
    end_to_end = make_net(Credit.end_to_end(4))
    end_to_end.stages.load_state_dict(interlocking.stages.state_dict())
    end_to_end.taps[0].load_state_dict(interlocking.taps[3].state_dict())
    # the taps' own draws are keyed by tap index; these heads draw nothing, so the embeddings agree
    ours, reference = engine_gradients(interlocking, views), engine_gradients(end_to_end, views)
    assert_close({n: g for n, g in ours.items() if n.startswith("stages")},
                 {n: g for n, g in reference.items() if n.startswith("stages")})  # fmt: skip
    assert sum(name.startswith("taps.0") for name in ours) > 0, "every tap trains its own head"


# -- property 2: the identity is detach at each boundary; eager equals late -------------------------------------------


def test_identity_is_detach_at_each_boundary():
    net, views = make_net(Credit.blockwise(4)), make_views()
    ours = engine_gradients(copy.deepcopy(net), views)
    outputs, total = list(views), 0
    for i, stage in enumerate(net.stages):
        for view in range(2):
            with keyed(KEY, "stage", i, view):
                outputs[view] = stage(outputs[view].detach())
        total = total + objective([net.taps[i](out) for out in outputs], None)
    total.backward()
    assert_close(ours, {name: p.grad for name, p in net.named_parameters()})


@settings(deadline=None, max_examples=30)
@given(st.one_of(credits(), published()))
def test_eager_and_end_of_step_backward_give_the_same_bits(credit):
    net, views = make_net(credit), make_views()
    eager = engine_gradients(copy.deepcopy(net), views, eager=True)
    late = engine_gradients(net, views, eager=False)
    assert eager.keys() == late.keys()
    assert all(torch.equal(eager[name], late[name]) for name in eager)


# -- property 3: isolation --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.one_of(credits(), published()), st.data())
def test_nothing_above_a_stages_reach_changes_its_update(credit, data):
    stage = data.draw(st.integers(0, credit.num_stages - 1))
    reached_from = [p for t, p in enumerate(credit.taps) if credit.matrix[t, stage] > 0]
    top = max(reached_from, default=stage)
    net, views = make_net(credit), make_views()
    before = engine_gradients(copy.deepcopy(net), views)
    with torch.no_grad():
        for above in net.stages[top + 1 :]:
            for p in above.parameters():
                p.add_(torch.randn_like(p))
        for t, tap in enumerate(net.taps):
            if credit.matrix[t, stage] == 0:
                for p in tap.parameters():
                    p.add_(torch.randn_like(p))
    after = engine_gradients(net, views)
    mine = f"stages.{stage}."
    names = [name for name in before if name.startswith(mine)]
    assert names == [name for name in after if name.startswith(mine)]
    assert bool(names) == bool(reached_from)
    assert all(torch.equal(before[name], after[name]) for name in names)


# -- property 4: batch norm moves once per step -----------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.one_of(credits(), published()))
def test_running_statistics_move_as_in_one_plain_forward_of_each_view(credit):
    net, views = make_net(credit), make_views()
    plain = copy.deepcopy(net)
    engine_gradients(net, views)
    with torch.no_grad():
        for view, x in enumerate(views):
            for i, stage in enumerate(plain.stages):
                with keyed(KEY, "stage", i, view):
                    x = stage(x)
                for t in (t for t, tap in enumerate(plain.taps) if tap.stage == i):
                    with keyed(KEY, "tap", t, view):
                        plain.taps[t](x)
    for (name, ours), theirs in zip(net.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


# -- property 5: what is alive ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.one_of(credits(), published()))
def test_live_graphs_and_held_bytes_never_exceed_what_the_matrix_implies(credit):
    net, views = make_net(credit, dropout=0.0, noise=False), make_views()
    parameters = list(net.parameters())

    def held_by_one(stage: int) -> int:
        with HeldBytes(parameters) as held:
            outs = [net.stages[stage](v.clone().requires_grad_(stage > 0)) for v in views]
            del outs
        return held.peak

    def held_by_tap(tap: int) -> int:
        with HeldBytes(parameters) as held:
            objective([net.taps[tap](v.clone().requires_grad_()) for v in views], None)
        return held.peak

    alive: list[tuple[int, ...]] = []
    with HeldBytes(parameters) as held:
        engine.backward(
            net, *views, key=KEY, hooks=engine.Hooks(on_stage=lambda stage, outs, living: alive.append(living))
        )
    last = credit.last_use()
    for now, living in enumerate(alive):
        assert set(living) == {stage for stage in range(now + 1) if last[stage] >= now}
    assert max(map(len, alive)) == credit.max_alive()
    widest = max(sum(held_by_one(stage) for stage in living) for living in alive)
    assert held.peak <= widest + max(held_by_tap(t) for t in range(credit.num_taps))
    assert held.now == 0, "every graph is freed by the end of the step"


def test_reach_one_holds_less_than_end_to_end():
    def peak(credit):
        net = make_net(credit)
        with HeldBytes(net.parameters()) as held:
            engine.backward(net, *make_views(), key=KEY)
        return held.peak

    assert peak(Credit.blockwise(5)) < 0.4 * peak(Credit.end_to_end(5))


def count_backward_calls(monkeypatch, credit) -> int:
    """How often the engine crosses a segment (calls that start at a stage's outputs, not at a loss)."""
    calls = []
    real = torch.autograd.grad

    def spy(outputs, *args, **kwargs):
        calls.append(isinstance(outputs, list))
        return real(outputs, *args, **kwargs)

    net = make_net(credit)
    monkeypatch.setattr(torch.autograd, "grad", spy)
    engine.backward(net, *make_views(), key=KEY)
    monkeypatch.undo()
    return sum(calls)


def test_merged_signals_make_deep_supervision_as_cheap_as_backpropagation(monkeypatch):
    assert count_backward_calls(monkeypatch, Credit.end_to_end(5)) == 5
    assert count_backward_calls(monkeypatch, Credit.deep_supervision(5)) == 5
    assert count_backward_calls(monkeypatch, Credit.blockwise(5)) == 5
    # LoCo: stages 1 and 5 are crossed once, each of the three between by one input VJP and one parameter VJP
    assert count_backward_calls(monkeypatch, Credit.overlapping(5, 2)) == 8


# -- the surface ------------------------------------------------------------------------------------------------------


def test_gradients_accumulate_like_any_backward():
    net, views = make_net(Credit.overlapping(3, 2)), make_views()
    once = engine_gradients(copy.deepcopy(net), views)
    engine.backward(net, *views, key=KEY)
    engine.backward(net, *views, key=KEY)
    assert_close({n: p.grad for n, p in net.named_parameters() if p.grad is not None},
                 {n: 2 * g for n, g in once.items()})  # fmt: skip


def test_draws_follow_the_key_or_torchs_seed_and_leave_the_global_generator_in_order():
    net, views = make_net(Credit.blockwise(3)), make_views()
    same = [engine_gradients(copy.deepcopy(net), views) for _ in range(2)]
    assert all(torch.equal(same[0][n], same[1][n]) for n in same[0])

    def seeded():
        torch.manual_seed(3)
        twin = copy.deepcopy(net)
        return engine.backward(twin, *views), engine.backward(twin, *views)

    (a, b), (c, d) = seeded(), seeded()
    assert all(torch.equal(a[t], c[t]) and torch.equal(b[t], d[t]) for t in a)
    assert any(not torch.equal(a[t], b[t]) for t in a)


def test_final_is_called_once_per_stage_and_tap_when_gradients_are_there():
    net, seen = make_net(Credit.overlapping(4, 2)), []

    def final(parameters):
        assert all(p.grad is not None for p in parameters)
        seen.extend(id(p) for p in parameters)

    engine.backward(net, *make_views(), key=KEY, hooks=engine.Hooks(on_final=final))
    assert sorted(seen) == sorted(id(p) for p in net.parameters())


def test_bf16_runs_the_objective_in_float32():
    dtypes = []

    def spy(embeddings, labels):
        dtypes.extend(z.dtype for z in embeddings)
        return objective(embeddings, labels)

    net = make_net(Credit.blockwise(2)).float()
    for tap in net.taps:
        tap.objective = spy
    views = [v.float() for v in make_views()]
    full = engine_gradients(copy.deepcopy(net), views)
    dtypes.clear()
    half = engine_gradients(net, views, precision="bf16")
    assert set(dtypes) == {torch.float32}
    name = "stages.0.units.0.conv.weight"
    cosine = torch.cosine_similarity(full[name].flatten(), half[name].flatten(), dim=0)
    assert 0.9 < cosine < 1 - 1e-9, "close to full precision, but not the same arithmetic"


def test_wrong_calls_are_named():
    net = make_net(Credit.blockwise(2))
    with pytest.raises(UserError, match="at least one view"):
        engine.backward(net)
    with pytest.raises(UserError, match="unknown precision 'fp8'; allowed: full, bf16"):
        engine.backward(net, *make_views(), precision="fp8")
    with pytest.raises(UserError, match="3 stages but the network has 2"):
        LocalNetwork(list(net.stages), list(net.taps), Credit.blockwise(3))
    with pytest.raises(UserError, match="has taps on"):
        LocalNetwork(list(net.stages), list(net.taps)[:1], Credit.blockwise(2))
