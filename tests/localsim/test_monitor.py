"""The monitor: ranks against closed forms, the online probe against autograd, alarms, and its state."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from localsim.backbones import UnitBlock
from localsim.credit import Credit
from localsim.monitor import Monitor, OnlineProbe, TrainingFailed, effective_rank, relative_spread, tap_names
from localsim.network import LocalNetwork, Stage, Tap
from localsim.rng import keyed
from localsim.rules.noise import Noise, make_boundary

WIDTH, CLASSES = 4, 3


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Pooled(nn.Module):
    """A readout that averages over positions, or answers whatever the test wants to be seen."""

    shown: torch.Tensor | None = None

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h.mean((2, 3)) if self.shown is None else self.shown


def small_net(credit: Credit | None = None, noise: str = "none") -> LocalNetwork:
    """Return stages that pass their input on: what the monitor must say of a batch can be read off the batch."""
    credit = credit or Credit.blockwise(2)
    stages = []
    for i in range(credit.num_stages):
        conv = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)
        nn.init.dirac_(conv.weight)
        stages.append(Stage([UnitBlock(f"u{i}", [("conv", conv)])], make_boundary(Noise.parse(noise))))
    taps = [Tap(stage, Pooled(), nn.Identity(), lambda z, labels: z[0].sum()) for stage in credit.taps]
    return LocalNetwork(stages, taps, credit)


# -- effective rank ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(9, 4), (4, 9), (6, 6), (2, 3)])
def test_isotropic_features_have_full_rank(n, d):
    # plus and minus every axis, or the corners of a regular simplex: equal spread in every possible direction
    x = torch.cat([torch.eye(d), -torch.eye(d)]) if n > d else torch.eye(n, d)
    full = d if n > d else n - 1
    assert effective_rank(7 * x.double() + 3) == pytest.approx(full, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d"), [(16, 5), (5, 16)])
def test_features_on_a_line_have_rank_one(n, d, dtype):
    x = (draws(n, 1) * draws(1, d, seed=1) + draws(1, d, seed=2)).to(dtype)
    assert effective_rank(x) == pytest.approx(1, abs=1e-4 if dtype == torch.float32 else 1e-9)


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.floats(-1e6, 1e6), st.sampled_from([torch.float32, torch.float64]))
def test_equal_rows_have_rank_zero(n, d, value, dtype):
    x = (torch.full((d,), value, dtype=dtype) + torch.arange(d) / 3).expand(n, d)
    assert effective_rank(x) == 0


def test_effective_rank_is_the_exponential_of_the_entropy():
    singular = np.array([5.0, 2.0, 1.0, 0.5])
    left = np.linalg.qr(np.column_stack([np.ones(8), draws(8, 4).numpy()]))[0][:, 1:]  # centred, orthonormal columns
    right = np.linalg.qr(draws(6, 4, seed=1).numpy())[0]
    p = singular / singular.sum()
    expected = math.exp(-(p * np.log(p)).sum())
    x = torch.from_numpy(left * singular @ right.T)
    assert effective_rank(x) == pytest.approx(expected, rel=1e-9)
    assert effective_rank(-1e4 * x + 1) == pytest.approx(expected, rel=1e-9)


def test_relative_spread():
    z = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    assert relative_spread(z) == pytest.approx(1 / math.sqrt(5))
    assert relative_spread(torch.ones(4, 2)) == 0
    assert relative_spread(torch.zeros(4, 2)) == 0
    assert relative_spread(z - 2) == pytest.approx(1)


# -- online probe -----------------------------------------------------------------------------------------------------


def test_the_probe_takes_autograds_steps():
    probe, layer = OnlineProbe(1, CLASSES), nn.Linear(5, CLASSES).double()
    probe.weights[0] = torch.cat([layer.weight.T, layer.bias[None]]).detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=OnlineProbe.LEARNING_RATE)
    hits = 0
    for step in range(3):
        pooled, labels = 3 * draws(11, 5, seed=step) + 1, torch.arange(11) % CLASSES
        probe.observe(0, pooled, labels)
        logits = layer((pooled - pooled.mean(0)) / (pooled.var(0, correction=0) + 1e-5).sqrt())
        hits += int((logits.argmax(1) == labels).sum())
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        weights = probe.weights[0]
        assert weights is not None
        torch.testing.assert_close(weights[:-1].T, layer.weight.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(weights[-1], layer.bias.detach(), rtol=1e-12, atol=1e-14)
    assert probe.flush() == {0: hits / 33}
    assert probe.flush() == {}, "nothing was observed since"


def test_the_probe_learns_what_is_separable_and_only_that():
    probe = OnlineProbe(2, CLASSES)
    centres = 4 * torch.eye(CLASSES)
    for step in range(60):
        labels = torch.arange(30) % CLASSES
        noise = draws(30, CLASSES, seed=step).float()
        probe.observe(0, centres[labels] + noise, labels)
        probe.observe(1, noise, labels)
        if step == 39:
            probe.flush()
    separable, unrelated = probe.flush().values()
    assert separable > 0.95
    assert abs(unrelated - 1 / CLASSES) < 0.1


def test_a_batch_is_scored_before_it_is_learned():
    probe = OnlineProbe(1, 2)
    labels = torch.tensor([1, 1, 1, 0])
    probe.observe(0, 5 * labels[:, None].float(), labels)
    assert probe.flush() == {0: 0.25}, "weights of zero answer class 0"
    probe.observe(0, 5 * labels[:, None].float(), labels)
    assert probe.flush() == {0: 1}


# -- alarms -----------------------------------------------------------------------------------------------------------

GOOD, EQUAL = draws(8, 6), torch.ones(8, 6)
LINE = draws(8, 1) * draws(1, 6)
CLOSE = 1000 + 0.1 * draws(8, 6)


def images(number: int = 8, seed: int = 0) -> torch.Tensor:
    return draws(number, WIDTH, 3, 3, seed=seed).float()


def check(monitor: Monitor, net: LocalNetwork, z: torch.Tensor, step: int) -> None:
    """Check after `step` a network whose second tap embeds the images as `z`."""
    net.taps[1].readout.shown = z
    monitor.start_step(step, None)
    monitor.check(net, images())


@pytest.mark.parametrize("collapsed", [EQUAL, LINE, CLOSE])
def test_three_collapsed_checks_in_a_row_stop_the_run(collapsed):
    net = small_net()
    monitor = Monitor(net, 0)
    for step, z in enumerate([collapsed, collapsed, GOOD, collapsed, collapsed]):
        check(monitor, net, z, step)
        assert monitor.healthy == (z is GOOD)
    monitor.start_step(5, None)
    monitor.on_tap(1, (collapsed, collapsed), torch.tensor(1.0))  # what training sees is not what is judged
    with pytest.raises(TrainingFailed, match=r"tap stage2 has collapsed at step 6: .* effective rank \d.\d\d of 6"):
        check(monitor, net, collapsed, 6)


@pytest.mark.parametrize("noise", ["none", "all:0.25"])
def test_boundary_noise_does_not_hide_a_stage_that_answers_the_same_to_every_image(noise):
    """Noise differs from image to image: in training mode a dead stage shows as many dimensions as a healthy one."""
    dead, healthy = small_net(noise=noise).train(), small_net(noise=noise).train()
    conv = dead.stages[1].units[0].parts[0]
    with torch.no_grad():
        conv.weight.zero_()
    conv.bias = nn.Parameter(torch.linspace(1, 2, WIDTH))
    if noise != "none":
        with keyed(0), torch.no_grad():
            seen = list(dead.stage_outputs(images(64)))[1].mean((2, 3))
        assert effective_rank(seen) > 3, "the noise alone shows as many dimensions as there are"
    monitor, other = Monitor(dead, 0), Monitor(healthy, 0)
    for step in (10, 20, 30):
        monitor.start_step(step, None)
        if step < 30:
            monitor.check(dead, images(64, seed=step))
            assert not monitor.healthy and dead.training
        else:
            sentence = (
                r"tap stage2 has collapsed at step 30: .* 0.0e\+00 of their size and have effective rank 0.00 of 4"
            )
            with pytest.raises(TrainingFailed, match=sentence):
                monitor.check(dead, images(64, seed=step))
    assert monitor.ranks["stage2"] == monitor.embedding_ranks["stage2"] == 0
    assert monitor.ranks["stage1"] > 3
    for step in range(1, 8):
        other.start_step(step, None)
        other.check(healthy, images(64, seed=step))
        assert other.healthy
    # a clean pass: what is seen of the healthy network is exactly what its images are
    assert other.ranks["stage2"] == pytest.approx(effective_rank(images(64, seed=7).mean((2, 3))), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_a_check_leaves_the_network_and_the_generator_as_they_were(training):
    net = small_net(noise="all:0.25")
    net.stages[0].units[0].parts.append(nn.BatchNorm2d(WIDTH))
    net.train(training)
    before, generator = {name: x.clone() for name, x in net.state_dict().items()}, torch.get_rng_state()
    Monitor(net, 0).check(net, images())
    assert {module.training for module in net.modules()} == {training}
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_embeddings_that_are_no_numbers_stop_the_run_at_once():
    net = small_net()
    monitor = Monitor(net, 0)
    broken = GOOD.clone()
    broken[3, 2] = math.nan
    with pytest.raises(TrainingFailed, match="the embeddings of tap stage2 are not finite after step 4"):
        check(monitor, net, broken, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_its_tap(value):
    monitor = Monitor(small_net(), 0)
    monitor.start_step(7, None)
    with pytest.raises(TrainingFailed, match=f"the loss of tap stage2 is {value} at step 7; a lower --lr may help"):
        monitor.on_tap(1, (GOOD, GOOD), torch.tensor(value))


def test_several_taps_on_one_stage_are_numbered():
    credit = Credit(np.array([[1, 0], [0, 1], [1, 1]]), (0, 1, 1))
    assert tap_names(small_net(credit)) == ["stage1", "stage2.1", "stage2.2"]


def test_a_tap_that_needs_a_stage_above_is_shown_it():
    class Joined(nn.Module):
        def forward(self, read: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
            return torch.cat([read, above.mean((2, 3))], 1)

    net = small_net()
    net.taps[0].head, net.taps[0].context = Joined(), 1
    monitor = Monitor(net, 0)
    monitor.check(net, images())
    twice = images().mean((2, 3)).repeat(1, 2)
    assert monitor.embedding_ranks["stage1"] == pytest.approx(effective_rank(twice), rel=1e-4)


# -- lines of metrics -------------------------------------------------------------------------------------------------


def observe(monitor: Monitor, net: LocalNetwork, step: int, *, checking: bool) -> None:
    monitor.start_step(step, torch.arange(8) % CLASSES)
    for index in range(2):
        maps = draws(8, WIDTH, 3, 3, seed=10 * step + index)
        monitor.on_stage(index, [maps, maps], (index,))
        monitor.on_tap(index, (GOOD, GOOD), torch.tensor(float(step + index)))
    if checking:
        net.taps[1].readout.shown = LINE
        monitor.check(net, images(seed=step))


def test_a_line_holds_means_since_the_last_and_ranks_of_the_check():
    net = small_net()
    monitor = Monitor(net, CLASSES)
    for step in (1, 2, 6):
        observe(monitor, net, step, checking=step == 6)
    line = monitor.flush()
    assert line["loss"] == {"stage1": 3, "stage2": 4}
    pooled = effective_rank(images(seed=6).mean((2, 3)))
    assert line["embedding_rank"] == {"stage1": pytest.approx(pooled, rel=1e-5), "stage2": pytest.approx(1, abs=1e-4)}
    assert line["effective_rank"] == {name: pytest.approx(pooled, rel=1e-5) for name in ("stage1", "stage2")}
    assert set(line["online_probe"]) == {"stage1", "stage2"}
    observe(monitor, net, 9, checking=False)
    assert monitor.flush()["loss"] == {"stage1": 9, "stage2": 10}
    assert "online_probe" not in Monitor(small_net(), 0).flush()


@pytest.mark.parametrize("num_classes", [CLASSES, 0])
def test_a_restored_monitor_writes_the_same_lines(num_classes):
    net = small_net()
    one, other = Monitor(net, num_classes), Monitor(net, num_classes)
    for step in (1, 2, 3):
        observe(one, net, step, checking=step == 2)
    file = io.BytesIO()
    torch.save(one.state(), file)
    file.seek(0)
    other.load_state(torch.load(file, weights_only=True), torch.device("cpu"))
    assert not other.healthy
    for step in (4, 5):
        for monitor in (one, other):
            observe(monitor, net, step, checking=step == 5)
    assert one.flush() == other.flush()
    for monitor in (one, other):
        with pytest.raises(TrainingFailed, match="tap stage2 has collapsed at step 6"):
            observe(monitor, net, 6, checking=True)


def test_a_kept_state_does_not_change_with_the_monitor():
    net = small_net()
    monitor = Monitor(net, CLASSES)
    observe(monitor, net, 1, checking=True)
    state = monitor.state()
    file = io.BytesIO()
    torch.save(state, file)
    observe(monitor, net, 2, checking=True)
    file.seek(0)
    for name, value in torch.load(file, weights_only=True).items():
        if name == "probe":
            for kept, now in zip(value[0], state["probe"][0], strict=True):
                assert torch.equal(kept, now)
            assert value[1:] == state["probe"][1:]
        else:
            assert value == state[name]
