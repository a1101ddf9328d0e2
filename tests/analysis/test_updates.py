"""Alignment with backpropagation, against gradients of plain autograd with `detach` written out here."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import math
from collections.abc import Collection
from itertools import islice

import numpy as np
import pytest
import torch
from scipy import stats
from small import small
from tiny import STEPS_PER_EPOCH, train_in
from torch import Tensor, nn

from localsim.analysis.updates import (
    AlignmentPoint,
    AlignmentRow,
    alignment_over_training,
    gradient_alignment,
)
from localsim.assembly import build
from localsim.backbones import UnitBlock
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.network import LocalNetwork, Stage, Tap
from localsim.opening import open_data, open_loader
from localsim.rng import key, keyed
from localsim.rules import rules
from localsim.rules.objectives import make_objective
from localsim.runs import load_run

KEY = 3
LABELS = torch.arange(4)
LEARNING = sorted(name for name, rule in rules.items() if rule.credit(4).num_taps)


def network(rule: str, **settings) -> LocalNetwork:
    return build(rule, preset="quick", **small(rule, **settings)).double()


def views(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2)]


def measure(net: LocalNetwork, **options) -> list[AlignmentRow]:
    return gradient_alignment(net, *views(), labels=LABELS, key=KEY, **options)


def trunk_parameters(net: LocalNetwork) -> dict[str, nn.Parameter]:
    """Return the trunk's parameters under torchvision's names, by way of the memory that `state_dict` shares."""
    by_place = {p.data_ptr(): p for p in net.stages.parameters()}
    return {name: by_place[x.data_ptr()] for name, x in net.trunk_state_dict().items() if x.data_ptr() in by_place}


def by_hand(
    net: LocalNetwork,
    weights: dict[int, float],
    cut: Collection[int] = (),
    batch: list[Tensor] | None = None,
    labels: Tensor | None = LABELS,
    draws: int = KEY,
) -> dict[str, Tensor]:
    """Return the trunk's gradients of the weighted losses of taps in one graph, detached above the stages in `cut`."""
    twin = copy.deepcopy(net)
    outputs: list[dict[int, Tensor]] = []
    for view, x in enumerate(batch or views()):
        outputs.append({})
        for index, stage in enumerate(twin.stages):
            with keyed(draws, "stage", index, view):
                x = stage(x)
            outputs[view][index] = x
            x = x.detach() if index in cut else x
    loss = torch.zeros((), dtype=torch.float64)
    for index, weight in weights.items():
        tap = twin.taps[index]
        embeddings = []
        for view, outs in enumerate(outputs):
            with keyed(draws, "tap", index, view):
                embeddings.append(tap(outs[tap.stage], None if tap.context is None else outs[tap.context].detach()))
        with keyed(draws, "objective", index):
            loss = loss + weight * tap.objective(tuple(embeddings), labels)
    parameters = trunk_parameters(twin)
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), grads, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


def flat(net: LocalNetwork, gradients: dict[str, Tensor], row: AlignmentRow) -> np.ndarray:
    """Return the gradients of a row's parameters as one vector."""
    stages = list(net.stages) if row.stage is None else [net.stages[row.stage - 1]]
    units = [unit for stage in stages for unit in stage.units if row.unit in (None, unit.name)]
    prefixes = tuple(f"{name}." for unit in units for name in unit.part_names)
    names = [name for name in gradients if (row.parameter == name if row.parameter else name.startswith(prefixes))]
    return torch.cat([gradients[name].flatten() for name in names]).numpy()


def assert_as_by_hand(net: LocalNetwork, rows, rule: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for row in rows:
        r, b = flat(net, rule, row), flat(net, exact, row)
        assert row.numel == len(r) and row.chance_sd == 1 / math.sqrt(len(r))
        lengths = np.linalg.norm(r), np.linalg.norm(b)
        assert (row.rule_norm, row.backprop_norm) == pytest.approx(lengths, rel=1e-9)
        assert row.cosine == pytest.approx(r @ b / lengths[0] / lengths[1], abs=1e-9)
        assert row.norm_ratio == pytest.approx(lengths[0] / lengths[1], rel=1e-9)
        assert row.reason is None


# -- rules whose alignment is known -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "settings"),
    [("end_to_end", {}), ("loco", {"granularity": 2}), ("end_to_end", {"granularity": 3, "noise": "all:0.5"})],
)
def test_backpropagation_is_aligned_with_itself(rule, settings):
    net = network(rule, **settings)
    rows = measure(net)
    assert {(row.cosine, row.norm_ratio, row.reason) for row in rows} == {(1.0, 1.0, None)}
    parameters = trunk_parameters(net)
    assert [row.parameter for row in rows if row.level == "parameter"] == list(parameters)
    assert [row.unit for row in rows if row.level == "unit"] == [unit.name for unit in net.units]
    assert [row.stage for row in rows if row.level == "stage"] == list(range(1, len(net.stages) + 1))
    assert rows[-1].level == "network" and rows[-1].numel == sum(p.numel() for p in parameters.values())


@pytest.mark.parametrize("noise", ["none", "all:0.5"])
def test_blockwise_against_autograd_with_detach(noise):
    net = network("blockwise", granularity=3, noise=noise)
    rule, exact = by_hand(net, {0: 1, 1: 1, 2: 1}, cut=(0, 1)), by_hand(net, {2: 1})
    rows = measure(net)
    assert_as_by_hand(net, rows, rule, exact)
    assert {(row.cosine, row.norm_ratio) for row in rows if row.stage == 3} == {(1.0, 1.0)}
    assert all(row.cosine is not None and row.cosine < 0.99 for row in rows if row.stage in (1, 2))
    other = gradient_alignment(net, *views(), key=KEY + 1)
    assert (other == rows) == (noise == "none")
    assert measure(net) == rows


def test_deep_supervision_follows_all_losses_and_not_the_last_alone():
    net = network("deep_supervision", granularity=3)
    assert_as_by_hand(net, measure(net), by_hand(net, {0: 1, 1: 1, 2: 1}), by_hand(net, {2: 1}))


def test_stages_that_the_last_tap_alone_changes_have_its_direction_and_their_weight_as_ratio():
    rows = measure(network("interlocking", granularity=4, reach=2))
    assert {row.cosine for row in rows if row.stage in (3, 4)} == {1.0}
    assert all(row.cosine is not None and row.cosine < 0.99 for row in rows if row.stage in (1, 2))
    rows = measure(network("stopgrad_overlap", granularity=3))
    top = [row for row in rows if row.stage == 3]
    assert {row.cosine for row in top} == {1.0} and {row.norm_ratio for row in top} == {2.0}


def test_a_deferred_taps_context_is_a_constant_of_the_reference():
    net = network("clapp_dfb", backbone="vgg6", backbone_width=0.125)
    assert net.taps[-1].context == len(net.stages) - 1 == net.taps[-1].stage
    last = len(net.taps) - 1
    exact = by_hand(net, {last: 1})
    rule = by_hand(net, dict.fromkeys(range(last + 1), 1.0), cut=range(last))
    assert_as_by_hand(net, measure(net), rule, exact)


def test_sign_symmetric_feedback_turns_the_gradient_below_the_layers_that_it_crosses():
    nets = {}
    for transport in ("exact", "sign_symmetric"):
        nets[transport] = net = network("end_to_end", objective="lpl", granularity=3, transport=transport)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in net.stages.parameters():  # gains other than 1, whose signs would be the gains
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 3)
    rows, exact = measure(nets["sign_symmetric"]), measure(nets["exact"])
    assert [row.backprop_norm for row in rows] == [row.backprop_norm for row in exact]
    cosine = {row.parameter: row.cosine for row in rows if row.level == "parameter"}
    # the error comes down to the last batch norm by a mean and a ReLU, which every transport passes exactly
    assert cosine["layer3.2.bn2.weight"] == cosine["layer3.2.bn2.bias"] == 1
    turned = [c for name, c in cosine.items() if not name.startswith("layer3.2.bn2") and c is not None]
    assert max(turned) < 0.999 and cosine["conv1.weight"] < 0.9
    assert {row.cosine for row in exact} == {1.0}


def test_direct_feedback_has_a_reference_of_the_same_loss():
    net = network("end_to_end", granularity=3, transport="direct_feedback")
    exact = by_hand(network("end_to_end", granularity=3), {0: 1})
    rows = measure(net)
    assert rows[-1].backprop_norm == pytest.approx(np.linalg.norm(flat(net, exact, rows[-1])), rel=1e-12)
    assert max(row.cosine or 0 for row in rows if row.level == "stage" and row.stage != 3) < 0.9


@pytest.mark.parametrize("rule", LEARNING)
def test_every_rule_has_rows_without_nan(rule):
    net = network(rule)
    rows = measure(net)
    for row in rows:
        assert row.reason is None if row.cosine is not None else row.reason
        assert -1 <= (row.cosine or 0) <= 1 and math.isfinite(row.norm_ratio or 0) and row.rule_norm >= 0
    assert next(row for row in rows if row.level == "stage" and row.stage == len(net.stages)).cosine is not None


# -- zero gradients ---------------------------------------------------------------------------------------------------


def test_zero_gradients_have_a_reason_in_place_of_a_cosine():
    rows = measure(network("end_to_end", zero_init_residual=True))
    inside = next(row for row in rows if row.parameter == "layer1.0.conv1.weight")
    assert (inside.cosine, inside.norm_ratio, inside.reason) == (None, None, "both are zero")
    gap = Credit(np.array([[1.0, 0, 0], [0, 0, 1]]), (0, 2)).to_config()
    second = next(row for row in measure(network("blockwise", credit=gap, granularity=3)) if row.stage == 2)
    assert (second.cosine, second.norm_ratio, second.reason) == (None, 0, "no update")
    low = Credit(np.array([[0.5, 0, 0]]), (0,)).to_config()
    rows = measure(network("blockwise", credit=low, granularity=3))
    assert {(row.cosine, row.norm_ratio) for row in rows if row.stage == 1} == {(1, 0.5)}
    assert {(row.norm_ratio, row.reason) for row in rows if row.stage == 3} == {(None, "both are zero")}


def test_a_gradient_that_is_rounding_alone_counts_as_zero():
    """The mean that a batch norm takes away: a convolution's bias before it."""
    with keyed(0, "biased"):
        parts = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "second": nn.Conv2d(4, 4, 3), "tanh": nn.Tanh()}
        stage = Stage([UnitBlock("unit", parts.items())])
    tap = Tap(0, nn.Flatten(), nn.Identity(), make_objective("vicreg"))
    for dtype in (torch.float32, torch.float64):
        net = LocalNetwork([stage], [tap], Credit.end_to_end(1)).to(dtype)
        batch = [view.to(dtype) for view in views()]
        rows = {row.parameter: row for row in gradient_alignment(net, *batch)}
        assert rows["conv.bias"].reason == "both are zero" and rows["conv.bias"].rule_norm == 0
        assert {row.cosine for name, row in rows.items() if name != "conv.bias"} == {1.0}
        # in evaluation mode the bias counts
        assert {row.cosine for row in gradient_alignment(net.eval(), *batch, train=False)} == {1.0}


# -- the caller's network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("blockwise", {"noise": "all:0.25"}),
        ("blockwise", {"transport": "direct_feedback"}),
        ("blockwise", {"transport": "feedback_alignment", "provenance": "frozen"}),
        ("man", {}),
        ("end_to_end", {"objective": "lpl", "head": "stale_statistics"}),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_nothing_of_the_callers_network_changes(rule, settings, train):
    net = network(rule, **settings)
    net.stages[0].eval()
    for number, p in enumerate(net.parameters()):
        p.grad = torch.full_like(p, number) if number % 2 and p.requires_grad else None
    before = copy.deepcopy({**dict(net.named_parameters()), **dict(net.named_buffers())})
    grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in net.named_parameters()}
    modes = [module.training for module in net.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()]
    credit, drawn = net.credit, torch.get_rng_state()
    first = measure(net, train=train)
    after = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert after.keys() == before.keys() and all(torch.equal(x, before[name]) for name, x in after.items())
    for name, p in net.named_parameters():
        same, copied = grads[name]
        assert p.grad is same and (same is None or copied is None or torch.equal(same, copied))
    assert [module.training for module in net.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()] == hooks
    assert net.credit is credit and torch.equal(torch.get_rng_state(), drawn)
    assert measure(net, train=train) == first


def test_the_mode_is_training_unless_the_networks_own_is_asked_for():
    net = network("blockwise", granularity=3, noise="all:0.5")
    trained = measure(net)
    assert measure(net.eval()) == trained
    plain = measure(net, train=False)
    assert_as_by_hand(net, plain, by_hand(net, {0: 1, 1: 1, 2: 1}, cut=(0, 1)), by_hand(net, {2: 1}))
    assert plain != trained


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="has no tap"):
        measure(network("untrained"))
    broken = [torch.full_like(view, torch.nan) for view in views()]
    with pytest.raises(UserError, match=r"gives .*layer\d.* is not finite|gives conv1.weight is not finite"):
        gradient_alignment(network("blockwise"), *broken)


# -- over training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "blockwise"
    train_in(path, "blockwise", snapshot_every=1, noise="all:0.25")
    return load_run(path)


@pytest.fixture(scope="module")
def table(run):
    return alignment_over_training(run, batches=4, seed=2)


def test_the_start_every_snapshot_and_the_end_are_measured(run, table):
    assert run.snapshots == [5, 10] and run.step == 10
    assert [(r.step, r.epoch, r.network) for r in table.select(level="network")] == [
        (step, step / STEPS_PER_EPOCH, "blockwise") for step in (0, 5, 10)
    ]
    assert {(r.n, r.n_cosine, r.batch_size) for r in table.rows} == {(4, 4, 8)}
    top = table.select(stage=len(run.network().stages))
    assert [r.cosine for r in top] + [r.norm_ratio for r in top] == pytest.approx([1] * 2 * len(top), abs=1e-6)
    assert max(r.cosine for r in table.select(level="stage", stage=1)) < 0.9
    assert table == alignment_over_training(run, batches=4, seed=2)
    other = alignment_over_training(run, batches=3, batch_size=12, seed=3)
    assert other.rows[0].cosine != table.rows[0].cosine and other.rows[0].batch_size == 12


def test_means_and_intervals_over_batches(run, table):
    """t over batches for the rule; for pairs of batches leaving one batch out at a time, written out."""
    net = run.network(5).train()
    config = dataclasses.replace(run.config, seed=key(run.config.seed, "alignment", 2))
    loader = open_loader(config, open_data(config), torch.device("cpu"))
    batches = list(islice(loader.epoch(0), 4))
    measured, exact = [], []
    for number, batch in enumerate(batches):
        draws = key(2, "alignment", number)
        measured.append(gradient_alignment(net, *batch.views, labels=batch.labels, key=draws))
        last = len(net.taps) - 1
        exact.append(by_hand(net, {last: 1}, batch=list(batch.views), labels=batch.labels, draws=draws))
    for place, point in enumerate(table.select(step=5)):
        rows = [of_batch[place] for of_batch in measured]
        for values, found, cut in (
            ([row.cosine for row in rows], (point.cosine, point.low, point.high), (-1, 1)),
            ([row.norm_ratio for row in rows], (point.norm_ratio, point.ratio_low, point.ratio_high), (0, None)),
        ):
            expected = np.clip(stats.t.interval(0.95, 3, np.mean(values), stats.sem(values) or 1e-300), *cut)
            assert found == pytest.approx((np.mean(values), *expected), abs=1e-9)
        vectors = [flat(net, gradients, point).astype(float) for gradients in exact]
        value = pairwise(vectors)
        without = [pairwise(vectors[:i] + vectors[i + 1 :]) for i in range(4)]
        half = stats.t.ppf(0.975, 3) * math.sqrt(3 / 4 * sum((x - np.mean(without)) ** 2 for x in without))
        found = (point.self_cosine, point.self_low, point.self_high)
        assert found == pytest.approx((value, max(-1, value - half), min(1, value + half)), abs=1e-4)
        assert point.rule_norm == pytest.approx(np.mean([row.rule_norm for row in rows]))


def pairwise(vectors: list[np.ndarray]) -> float:
    units = [v / np.linalg.norm(v) for v in vectors]
    return float(np.mean([a @ b for i, a in enumerate(units) for b in units[:i]]))


def test_the_table_as_text_csv_and_json(table):
    text = str(table)
    assert "4 batches of 8 images, 95 % t interval over batches" in text
    shown = table.select(level="stage", stage=1, step=5)[0]
    cell = f"{shown.cosine:.3f} [{shown.low:.3f}, {shown.high:.3f}]"
    assert cell in next(line for line in text.splitlines() if line.startswith("      1"))
    assert text.count("step 0 (epoch 0)") == 3 and text.count("\n    all") == 3
    assert not any(line.endswith(" ") for line in text.splitlines())
    read = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert len(read) == len(table.rows) and float(read[0]["cosine"]) == table.rows[0].cosine
    assert read[-1]["stage"] == "" and read[-1]["level"] == "network"
    assert tuple(AlignmentPoint(**row) for row in json.loads(json.dumps(table.to_json()))) == table.rows


def test_a_sequential_schedule_compares_the_phase_that_is_on(tmp_path):
    net = train_in(tmp_path, "blockwise", schedule="sequential", granularity=2, snapshot_every=1, warmup_epochs=0.2)
    table = alignment_over_training(load_run(tmp_path), batches=3)
    reasons = {(r.step, r.stage): r.reason for r in table.select(level="stage")}
    # the second phase begins after step 5, and the first stage rests from then on
    assert reasons == {(0, 1): None, (0, 2): "no update", (5, 1): "no update", (5, 2): None,
                       (10, 1): "no update", (10, 2): None}  # fmt: skip
    resting = table.select(level="stage", stage=1, step=10)[0]
    assert (resting.n, resting.n_cosine, resting.norm_ratio, resting.ratio_high) == (3, 0, 0, 0)
    assert "no update" in str(table) and len(net.stages) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batches": 2}, r"batches is 2; allowed: 3 \(for an interval\) to 5"),
        ({"batches": 6}, "batches is 6; .* to 5, what 40 images give in batches of 8 without repeating any"),
        ({"batch_size": 1}, "batch_size is 1"),
    ],
)
def test_batches_that_cannot_be_had_are_refused(run, options, said):
    with pytest.raises(UserError, match=said):
        alignment_over_training(run, **options)


def test_a_folder_is_as_good_as_its_run(run, table):
    assert alignment_over_training(str(run.path), batches=4, seed=2) == table


def test_a_run_that_learned_nothing_is_refused(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(run.config.to_json()))
    with pytest.raises(UserError, match="has no checkpoint yet"):
        alignment_over_training(load_run(tmp_path), batches=3)
    train_in(tmp_path / "untrained", "untrained")
    with pytest.raises(UserError, match="has no tap"):
        alignment_over_training(load_run(tmp_path / "untrained"), batches=3)
