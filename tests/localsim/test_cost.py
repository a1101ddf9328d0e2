"""What `localsim cost` predicts, against steps that are really made, counts by hand, and matrices drawn by hand."""

from __future__ import annotations

import dataclasses
import resource
import sys

import pytest
import torch
from tiny import tiny_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from localsim import engine
from localsim.assembly import build_network
from localsim.cost import cost, signals_down
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.experiment import prepare
from localsim.memory import HeldBytes
from localsim.presets import resolve
from localsim.rules import own_rules
from localsim.rules.objectives.barlow_twins import BarlowTwins
from localsim.schedule import acting_together
from localsim.train import rehearse

# ResNet-20 on images of 16 px: stem, and three blocks each of 16, 32 and 64 channels on maps of 16, 8 and 4 pixels
SIDE = 16
UNITS = (4, 3, 3)


def views_of(config):
    images = [torch.randn(config.batch_size, 3, config.image_size, config.image_size) for _ in range(config.views)]
    return images, torch.arange(config.batch_size) % 10


def really_held(config) -> int:
    """Return the bytes that a real step holds, the largest of the phases' in a sequential schedule."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    net = build_network(config).to(memory_format=layout).train()
    peaks = []
    for taps in acting_together(config, len(net.taps)):
        images, labels = views_of(config)
        images = [view.contiguous(memory_format=layout) for view in images]
        with HeldBytes(net.parameters()) as held:
            engine.backward(net, *images, labels=labels, precision=config.precision, taps=taps)
        peaks.append(held.peak)
    return max(peaks)


# -- held bytes -------------------------------------------------------------------------------------------------------


COMPARED = (
    "blockwise", "loco", "layerwise", "greedy_infomax", "end_to_end", "deep_supervision", "clapp_dfb", "man",
)  # fmt: skip


@pytest.mark.parametrize("rule", COMPARED)
def test_held_bytes_are_those_of_a_real_step(rule):
    config = tiny_config(rule)
    assert cost(config).held_bytes == really_held(config)


@pytest.mark.parametrize("rule", ["blockwise", "loco", "greedy_infomax", "end_to_end", "deep_supervision"])
def test_held_bytes_in_bf16(rule):
    """Exact but for the statistics that batch norms keep: bfloat16 for tensors without memory, else float32."""
    config = tiny_config(rule, precision="bf16")
    predicted = cost(config).held_bytes
    assert predicted == pytest.approx(really_held(config), rel=0.002)
    assert predicted < 0.75 * cost(dataclasses.replace(config, precision="full")).held_bytes


@pytest.mark.parametrize(
    "settings",
    [
        {"transport": "feedback_alignment"},
        {"transport": "direct_feedback"},
        {"schedule": "sequential"},
        {"recompute": "units"},
        {"readout": "expand", "readout_impl": "fused"},
        {"channels_last": True},
        {"channels_last": True, "readout": "expand", "readout_impl": "fused", "noise": "none"},
        {"channels_last": True, "transport": "feedback_alignment"},
        {"objective": "simclr", "readout": "local2x2", "noise": "hw:0.1"},
    ],
    ids=str,
)
def test_settings_of_a_run_are_in_its_prediction(settings):
    config = tiny_config("loco", **settings)
    assert cost(config).held_bytes == really_held(config)


def test_the_layout_in_memory_decides_what_is_held_as_in_a_run():
    """The fused readout keeps a copy of a map that has not its layout; `prepare` and `rehearse` are what a run does."""
    predicted = {}
    for last in (True, False):
        config = tiny_config(readout="expand", readout_impl="fused", noise="none", channels_last=last)
        run = prepare(config)
        predicted[last] = cost(config).held_bytes
        assert predicted[last] == rehearse(run.net, next(iter(run.loader.epoch(0))), config).held_bytes
    # the peak is while the lowest tap fires, which reads the largest map
    assert predicted[False] - predicted[True] == LOWER


GAPS = {"num_stages": 3, "taps": [0, 1, 2], "matrix": [[1, 0, 0], [0.5, 0, 0], [0, 2, 1]]}


@pytest.mark.parametrize("rule", ["blockwise", "loco", "end_to_end", "interlocking", "deep_supervision", "gaps"])
def test_held_bytes_follow_from_the_credit_matrix(rule):
    """The largest sum over time of living segments and the firing tap, each traced once, without the engine."""
    config = tiny_config(credit=GAPS) if rule == "gaps" else tiny_config(rule)
    with torch.device("meta"):
        net = build_network(config).train()
        x = [torch.empty(8, 3, SIDE, SIDE) for _ in range(config.views)]
        labels = torch.zeros(8, dtype=torch.long)
    parameters = {storage_of(p) for p in net.parameters()}
    kept = []  # identities are addresses: none may be freed and given anew

    def saved_by(run):
        saved = {}

        def pack(tensor):
            if storage_of(tensor) not in parameters:
                saved[storage_of(tensor)] = tensor.untyped_storage().nbytes()
                kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept.append(made := run())
        return saved, made

    def loss(tap, maps):
        return tap.objective(tuple(tap(one) for one in maps), labels)

    last_use, peak, segments = net.credit.last_use(), 0, []
    for now, stage in enumerate(net.stages):
        saved, x = saved_by(lambda stage=stage, x=x: [stage(one) for one in x])
        x = [one.detach() for one in x]
        segments.append(saved)
        alive = [segment for segment, last in zip(segments, last_use, strict=False) if last >= now]
        peak = max(peak, total(alive))
        for row, tap in zip(net.credit.matrix, net.taps, strict=True):
            if tap.stage == now:
                reads = [one.detach().requires_grad_(bool(row.any())) for one in x]
                saved, _ = saved_by(lambda tap=tap, reads=reads: loss(tap, reads))
                peak = max(peak, total([*alive, saved]))
    assert cost(config).held_bytes == peak


def storage_of(tensor):
    return tensor.untyped_storage()._cdata


def total(saved):
    return sum({identity: size for one in saved for identity, size in one.items()}.values())


# -- arithmetic -------------------------------------------------------------------------------------------------------


def convolutions_by_hand():
    """Multiply-adds per image of every convolution of ResNet-20 on 16 px: positions, channels out, channels in, 3x3."""
    layers = [(16 * 16, 16, 3)] + 6 * [(16 * 16, 16, 16)]
    layers += [(8 * 8, 32, 16)] + 5 * [(8 * 8, 32, 32)]
    layers += [(4 * 4, 64, 32)] + 5 * [(4 * 4, 64, 64)]
    return [positions * wide * narrow * 9 for positions, wide, narrow in layers]


def test_flops_by_hand():
    convolutions = [8 * macs for macs in convolutions_by_hand()]
    head = 8 * 64 * 10
    predicted = cost(tiny_config("end_to_end", objective="cross_entropy"))
    assert predicted.views == 1
    assert predicted.forward_flops == 2 * (sum(convolutions) + head)
    # a gradient for the weights and one for the input, which the first layer's images need none of
    assert predicted.backward_flops == 2 * (2 * sum(convolutions) - convolutions[0] + 2 * head)


def test_local_losses_save_the_input_gradient_of_every_first_layer():
    one, cut = (cost(tiny_config("greedy_supervised", granularity=k)) for k in (1, 3))
    by_hand = convolutions_by_hand()
    heads = 8 * 10 * (16 + 32)  # those of the two lower taps
    assert cut.forward_flops - one.forward_flops == 2 * heads
    firsts = 8 * (by_hand[7] + by_hand[13])
    assert cut.backward_flops - one.backward_flops == 2 * (2 * heads - firsts)


@pytest.mark.parametrize("rule", ["end_to_end", "blockwise", "greedy_supervised"])
def test_flops_are_those_that_torch_counts_in_a_real_step(rule):
    """Plain autograd on detached stages, which no engine has routed."""
    config = tiny_config(rule)
    net = build_network(config).train()
    images, labels = views_of(config)
    cuts = {tap.stage for tap in net.taps}
    with FlopCounterMode(display=False) as counted:
        h, outputs = images, {}
        for number, stage in enumerate(net.stages):
            h = outputs[number] = [stage(x) for x in h]
            h = [x.detach() for x in h] if number in cuts else h
        for tap in net.taps:
            tap.objective(tuple(tap(x) for x in outputs[tap.stage]), labels).backward()
    predicted = cost(config)
    assert predicted.forward_flops + predicted.backward_flops == counted.get_total_flops()


def test_two_views_and_twice_the_images_cost_twice_as_much():
    settings = {"objective": "cross_entropy"}
    once = cost(tiny_config("end_to_end", **settings))
    for more in (
        cost(tiny_config("end_to_end", views=2, **settings)),
        cost(tiny_config("end_to_end", batch_size=16, **settings)),
    ):
        assert (more.forward_flops, more.backward_flops) == (2 * once.forward_flops, 2 * once.backward_flops)
        assert more.held_bytes == pytest.approx(2 * once.held_bytes, rel=0.01)


def test_blocks_that_are_run_again_are_counted_as_backward():
    plain = cost(tiny_config("end_to_end"))
    again = cost(tiny_config("end_to_end", recompute="units"))
    assert again.forward_flops == plain.forward_flops
    trunk = 2 * 2 * 8 * sum(convolutions_by_hand())  # of 8 images in two views
    assert again.backward_flops - plain.backward_flops == trunk
    assert again.held_bytes < plain.held_bytes / 2


# -- paths and locks --------------------------------------------------------------------------------------------------

DRAWN = [
    # matrix, taps, path that ends in each stage, unit blocks to wait for, stages that have run when it is updated
    ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], (0, 1, 2), (4, 3, 3), (4, 3, 3), (1, 2, 3)),
    ([[1, 1, 1]], (2,), (10, 6, 3), (10, 6, 3), (3, 3, 3)),
    ([[1, 1, 0], [0, 1, 1]], (1, 2), (7, 6, 3), (7, 6, 3), (2, 3, 3)),
    ([[1, 0, 0], [1, 1, 0], [1, 1, 1]], (0, 1, 2), (10, 6, 3), (10, 6, 3), (3, 3, 3)),
    # the top one's signal passes the middle stage, which is not changed by it and waits for it all the same
    ([[0, 1, 0], [1, 0, 0]], (1, 2), (10, 3, 0), (10, 6, 0), (3, 3, 0)),
    ([[1, 0, 0]], (0,), (4, 0, 0), (4, 0, 0), (1, 0, 0)),
]


@pytest.mark.parametrize(("matrix", "taps", "paths", "locks", "run"), DRAWN)
def test_paths_and_update_locks_of_matrices_drawn_by_hand(matrix, taps, paths, locks, run):
    predicted = cost(tiny_config(credit=Credit(matrix, taps).to_config()))
    assert predicted.units == UNITS
    assert (predicted.paths, predicted.update_locks, predicted.stages_run) == (paths, locks, run)
    assert (predicted.gradient_path, predicted.update_lock) == (max(paths), max(locks))


def test_a_tap_that_waits_for_the_top_locks_its_stage_without_a_longer_path():
    waiting = cost(tiny_config("clapp_dfb"))
    assert set(waiting.paths) == {1}
    assert waiting.update_locks == tuple(range(10, 0, -1))
    # every tap but the last two reads the top's map of 64 x 4 x 4 in float32
    assert waiting.context_bytes % (4 * 8 * 64 * 4 * 4) == 0 and waiting.context_bytes > 0


def test_a_sequential_schedule_has_its_largest_phases_cost():
    whole = cost(tiny_config("blockwise"))
    phases = cost(tiny_config("blockwise", schedule="sequential"))
    assert (phases.paths, phases.held_bytes) == (whole.paths, whole.held_bytes)
    assert phases.backward_flops < whole.backward_flops
    assert phases.forward_flops < whole.forward_flops


def test_nothing_is_trained_without_a_tap():
    idle = cost(tiny_config("untrained"))
    assert (idle.backward_flops, idle.held_bytes, idle.gradient_bytes, idle.tap_parameters) == (0, 0, 0, 0)
    assert (idle.gradient_path, idle.update_lock, set(idle.down_bytes)) == (0, 0, {0})
    assert idle.forward_flops > 0


# -- bytes that travel and gradients that live ------------------------------------------------------------------------

LOWER, UPPER = (4 * 2 * 8 * channels * side**2 for channels, side in ((16, 16), (32, 8)))  # of two views of 8 images


@pytest.mark.parametrize(
    ("matrix", "taps", "down"),
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], (0, 1, 2), (0, 0)),
        ([[1, 1, 1]], (2,), (LOWER, UPPER)),
        ([[1, 1, 0], [0, 0, 1]], (1, 2), (LOWER, 0)),
        ([[1, 0, 0], [1, 1, 0], [1, 1, 1]], (0, 1, 2), (LOWER, UPPER)),  # what is proportional travels as one
        ([[0, 1, 0], [1, 0, 0]], (1, 2), (LOWER, UPPER)),
        ([[1, 0, 0], [1, 2, 0], [3, 1, 1]], (0, 1, 2), (LOWER, UPPER)),
        # two taps above the second boundary that do not agree about what is below it
        ([[1, 2, 1], [2, 1, 1]], (2, 2), (LOWER, 2 * UPPER)),
    ],
)
def test_bytes_between_stages_by_hand_and_as_the_engine_sends_them(matrix, taps, down, monkeypatch):
    predicted = cost(tiny_config(credit=Credit(matrix, taps).to_config()))
    assert predicted.up_bytes == (LOWER, UPPER)
    assert predicted.down_bytes == down

    net = build_network(tiny_config(credit=Credit(matrix, taps).to_config())).train()
    sent, grad = [], torch.autograd.grad

    def watched(outputs, inputs, *more, **options):
        if not isinstance(outputs, torch.Tensor):  # of a stage: a tap's is a loss
            sent.extend(x.nbytes for x in inputs if not isinstance(x, nn.Parameter))
        return grad(outputs, inputs, *more, **options)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    engine.backward(net, torch.randn(8, 3, SIDE, SIDE), torch.randn(8, 3, SIDE, SIDE))
    assert sum(sent) == sum(down)


def test_signals_travel_merged_where_their_credit_below_is_proportional():
    assert signals_down(Credit.overlapping(5, 3)) == (1, 2, 2, 1)
    assert signals_down(Credit.deep_supervision(4)) == (1, 1, 1)
    assert signals_down(Credit.blockwise(4)) == (0, 0, 0)


def test_half_precision_halves_what_travels():
    whole, half = (cost(tiny_config("loco", precision=precision)) for precision in ("full", "bf16"))
    assert half.up_bytes == tuple(number // 2 for number in whole.up_bytes)
    assert half.down_bytes == tuple(number // 2 for number in whole.down_bytes)


def test_direct_feedback_sends_errors_and_no_maps():
    predicted = cost(tiny_config("end_to_end", transport="direct_feedback"))
    assert predicted.down_bytes == (4 * 2 * 8 * 8,) * 2  # embeddings of 8 in two views of 8 images


def test_gradients_that_live_are_those_of_one_stage_or_one_tap():
    net = build_network(tiny_config("blockwise"))
    sizes = [sum(p.nbytes for p in part.parameters()) for part in (*net.stages, *net.taps)]
    assert cost(tiny_config("blockwise")).gradient_bytes == max(sizes)
    # a network in one piece has all gradients at once
    assert cost(tiny_config("end_to_end", granularity=1)).gradient_bytes == sum(sizes[:3])


def test_parameters_are_those_of_the_network():
    net = build_network(tiny_config("loco"))
    predicted = cost(tiny_config("loco"))
    assert predicted.trunk_parameters == sum(p.numel() for p in net.stages.parameters())
    assert predicted.tap_parameters == sum(p.numel() for p in net.taps.parameters())


# -- what can be predicted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [rule.name for rule in own_rules() if rule.name not in COMPARED])
def test_every_other_rule_can_be_predicted(rule):
    predicted = cost(tiny_config(rule))
    assert len(predicted.paths) == len(predicted.units) == len(predicted.up_bytes) + 1
    assert predicted.forward_flops > 0


def test_the_published_configuration_needs_neither_memory_nor_data():
    """2.4 GB of projectors and 100 GB of activations, in a process that grows by less than 1 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    predicted = cost(resolve("blockwise", "imagenet", {"data_root": "/nowhere"}))
    assert predicted.tap_parameters > 600e6 and predicted.held_bytes > 50 * 2**30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20 * (
        1024 if sys.platform == "darwin" else 1
    )


MADE_BEFORE = torch.ones(())


@torch.library.custom_op("localsim_test::of_unknown_shape", mutates_args=())
def of_unknown_shape(z: torch.Tensor) -> torch.Tensor:
    return z.clone()


@pytest.mark.parametrize(
    "ask",
    [
        lambda z: float(z.sum()),
        lambda z: z[z > 0],
        lambda z: z.detach().numpy(),
        lambda z: f"{z.detach().sum():.2f}",
        lambda z: z + MADE_BEFORE,
        of_unknown_shape,
    ],
    ids=["item", "mask", "numpy", "format", "made before", "unknown shape"],
)
def test_a_step_that_asks_for_values_is_one_sentence(ask, monkeypatch):
    """It says what does not run, and not whose fault it is."""
    monkeypatch.setattr(BarlowTwins, "__call__", lambda self, embeddings, labels: ask(embeddings[0]) and None)
    with pytest.raises(
        UserError, match=r"^the cost of rule blockwise cannot be predicted, .*; `localsim run` measures"
    ):
        cost(tiny_config())


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), AttributeError("no bug"), AssertionError()])
def test_an_error_that_has_another_cause_is_itself(error, monkeypatch):
    def failing(self, embeddings, labels):
        raise error

    monkeypatch.setattr(BarlowTwins, "__call__", failing)
    with pytest.raises(type(error)) as caught:
        cost(tiny_config())
    assert caught.value is error
