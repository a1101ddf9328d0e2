"""How far the update of a rule points where end-to-end backpropagation's does: same weights, batch and random draws.

For a group of trunk parameters (a tensor, a unit block, a stage, the trunk), with r the gradient that the engine leaves
in `.grad` under the network's own credit matrix, taps and transport, and b backpropagation's,

    cosine = <r, b> / (|r| |b|),    norm ratio = |r| / |b|.

b is the exact gradient, by all stages, of **one** loss: that of the last tap, with its own readout, head and objective
as they are. It is what the rule would do if only its highest loss existed and its error travelled all the way down. So

- a rule with one exact tap that reaches down from the top (end_to_end, LoCo with the reach of the network) is its own
  reference: cosine 1. Stages that the last tap alone changes have cosine 1 too (the last of blockwise, the last n of
  interlocking), and as norm ratio their weight in the credit matrix;
- every other loss shows up as deviation, deep supervision's too: it does not follow *this* loss;
- under another transport r has the wrong pathways and b the right ones, through the last tap's head too;
- what the tap's loss holds constant (the top activity that a deferred tap of CLAPP's feedback reads, targets, images,
  stale statistics) is constant in b: it belongs to the loss, not to the routing. Several embeddings make one loss;
- readouts and heads, which their own loss trains, have no rows; b passes copied (`identical`) and frozen ones too;
- a sequential schedule lets one tap act at a time. `alignment_over_training` asks for the phase that is on at a step
  (after the end, the last): stages that rest have no update, those below run in evaluation mode, and b passes stages
  and a head above that may not have been trained yet. Above the last tap backpropagation changes nothing;
- r is the gradient, not the optimiser's step: momentum, Adam, LARS and weight decay come after it.

A gradient of zero has no direction: the cosine is None, with the reason. As zero counts the bias of a convolution or
linear layer whose gradient is rounding alone, as before a batch norm: root mean square below 1024 eps of its weights'.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from localsim import engine, transport
from localsim.analysis.tables import as_csv, matching
from localsim.backbones import UnitBlock
from localsim.credit import Credit
from localsim.data import Data
from localsim.errors import UserError
from localsim.network import LocalNetwork
from localsim.opening import open_data, open_device, open_loader
from localsim.rng import key as key_of
from localsim.runs import Run, opened_run
from localsim.schedule import Schedule
from localsim.sources import scaled_views, set_modes

LEVELS = ("parameter", "unit", "stage", "network")
FEWEST_BATCHES = 3
"""Of which leaving one out still leaves a pair, as the interval of `self_cosine` needs."""
_ROUNDING = 1024


@dataclass(frozen=True)
class AlignmentRow:
    """A rule's update beside backpropagation's, for one group of parameters and one batch.

    Attributes:
        level: what is grouped, one of `LEVELS`.
        stage: its number, from 1; None for the network.
        unit, parameter: name of the unit block, and torchvision's of the tensor; None above their levels.
        numel: how many numbers the group has.
        chance_sd: standard deviation of the cosine with a random direction, 1 / sqrt(numel), about a mean of 0.
        cosine: between the two; None where one of them is zero.
        norm_ratio: rule's norm over backpropagation's; None where the latter is zero.
        rule_norm, backprop_norm: Euclidean norms.
        reason: why there is no cosine; None if there is one.
    """

    level: str
    stage: int | None
    unit: str | None
    parameter: str | None
    numel: int
    chance_sd: float
    cosine: float | None
    norm_ratio: float | None
    rule_norm: float
    backprop_norm: float
    reason: str | None


@dataclass(frozen=True)
class AlignmentPoint(AlignmentRow):
    """The mean over batches of an `AlignmentRow`, norms too, at one step of a run.

    Intervals are 95 % t intervals over batches, cut to the measure's range, with the jackknife's standard error: the
    usual one of a mean, and right for pairs that share batches. They tell nothing of runs with other seeds.

    Attributes:
        low, high: interval of `cosine`.
        ratio_low, ratio_high: interval of `norm_ratio`.
        self_cosine, self_low, self_high: between backpropagation's gradients of two batches, mean over all pairs. A
            yardstick and no bound: rule and backpropagation share batch and noise, these two do not.
        n: batches where backpropagation's gradient is not zero (norm ratio and self-cosine).
        n_cosine: those of them where the rule's is not zero either (cosine). Below `FEWEST_BATCHES` a mean is None.
        batch_size: images in a batch.
        network, step, epoch: the rule's name, and how much training the weights have seen.
    """

    low: float | None
    high: float | None
    ratio_low: float | None
    ratio_high: float | None
    self_cosine: float | None
    self_low: float | None
    self_high: float | None
    n: int
    n_cosine: int
    batch_size: int
    network: str
    step: int
    epoch: float


@dataclass(frozen=True)
class AlignmentTable:
    """Alignment over training; prints itself as tables of stages by steps."""

    rows: tuple[AlignmentPoint, ...]

    def select(self, **fields: Any) -> list[AlignmentPoint]:
        """Return the rows with these values, e.g. `select(level="stage", step=312)`."""
        return matching(self.rows, fields)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rows as plain dictionaries."""
        return [asdict(row) for row in self.rows]

    def to_csv(self) -> str:
        """Return the rows as comma-separated values, one header line; None is an empty field."""
        return as_csv(self.to_json(), list(AlignmentPoint.__dataclass_fields__))

    def __str__(self) -> str:
        first = self.rows[0]
        blocks = [
            f"update of {first.network} beside backpropagation of its last tap's loss, mean over "
            f"{max(row.n for row in self.rows)} batches of {first.batch_size} images, 95 % t interval over batches\n"
            "random directions: cosine 0, standard deviation as in column chance"
        ]
        kept = {(row.stage, row.step): row for row in self.rows if row.level in ("stage", "network")}
        steps = sorted({step for _, step in kept})
        for title, *fields in (
            ("cosine", "cosine", "low", "high"),
            ("norm ratio, rule / backpropagation", "norm_ratio", "ratio_low", "ratio_high"),
            ("self-cosine: backpropagation on other images and draws", "self_cosine", "self_low", "self_high"),
        ):
            heads = [f"step {step} (epoch {kept[None, step].epoch:.3g})" for step in steps]
            lines = [title, "  stage  chance  " + "".join(f"{head:<25}" for head in heads)]
            for stage in (*sorted({stage for stage, _ in kept if stage is not None}), None):
                rows = [kept[stage, step] for step in steps]
                cells = [_cell(row.reason, *(getattr(row, field) for field in fields)) for row in rows]
                lines.append(f"  {stage or 'all':>5}  {rows[0].chance_sd:.4f}  " + "".join(f"{c:<25}" for c in cells))
            blocks.append("\n".join(line.rstrip() for line in lines))
        return "\n\n".join(blocks)


def _cell(reason: str | None, value: float | None, low: float | None, high: float | None) -> str:
    return reason or "-" if value is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def gradient_alignment(
    net: LocalNetwork,
    *views: Tensor,
    labels: Tensor | None = None,
    key: int = 0,
    taps: Sequence[int] | None = None,
    train: bool = True,
) -> list[AlignmentRow]:
    """Return the alignment of a rule's update with backpropagation's on one batch; see the module for both.

    Weights, buffers, gradients and modes of the network stay as they are. Arithmetic is in the dtype of the weights,
    without autocast, whatever the run trained with.

    Args:
        net: the network of a rule.
        views: as for `localsim.engine.backward`, each `(batch, 3, height, width)`.
        labels: `(batch,)` class indices for objectives that use them.
        key: names the random draws (noise, dropout, negatives), which are the same for both updates.
        taps: indices of the taps that act under the rule; by default all. The reference is the last tap's regardless.
        train: compare in training mode. False keeps every module's own mode, e.g. frozen stages in evaluation mode;
            mind that `Run.network` gives evaluation mode, in which no rule is trained.

    Returns:
        A row per parameter tensor of the trunk, then per unit block, per stage, and one for the network.

    Raises:
        UserError: the network has no tap, a gradient is not finite, or as `localsim.engine.backward`.
    """
    return _rows(_groups(net), *_both_updates(net, (views, labels), key, taps, train))


def alignment_over_training(
    run: Run | str | Path, *, batches: int = 8, batch_size: int | None = None, seed: int = 0, data: Data | None = None
) -> AlignmentTable:
    """Return the alignment at the start, at every snapshot and at the end of a run, as means over batches.

    Batches are views as in training (augmentation, mode, noise, acting taps) of different images, drawn anew; they and
    all draws are the same at every step, so that steps can be compared.

    Args:
        run: a run with a checkpoint, or its folder.
        batches: how many, 3 or more.
        batch_size: images in a batch; by default the run's. Losses that compare images and batch norms depend on it.
        seed: of the batches and of the draws.
        data: by default the run's own.

    Raises:
        UserError: the rule has no tap, there is no checkpoint, or the images do not fill so many batches.
    """
    run = opened_run(run)
    config = run.config
    groups = _groups(run.network())
    which: dict[int, str | int] = {0: "untrained", **{step: step for step in run.snapshots}, run.step: "trained"}
    data = open_data(config) if data is None else data
    device = open_device(config.device)
    steps_per_epoch = len(data.train) // config.batch_size
    size = config.batch_size if batch_size is None else batch_size
    shown = replace(config, seed=key_of(config.seed, "alignment", seed), batch_size=size)
    loader = open_loader(shown, data, device)
    if not FEWEST_BATCHES <= batches <= loader.steps_per_epoch:
        most = (
            f"{loader.steps_per_epoch}, what {len(data.train)} images give in batches of {size} without repeating any"
        )
        raise UserError(f"batches is {batches}; allowed: {FEWEST_BATCHES} (for an interval) to {most}")
    points: list[AlignmentPoint] = []
    for step, name in sorted(which.items()):
        net = run.network(name).to(device)
        schedule = Schedule.of(config, steps_per_epoch, len(net.taps))
        phase = schedule.phase(min(step, schedule.total_steps - 1))
        set_modes(net, phase)
        views = islice(scaled_views(net, loader, config, phase).epoch(0), batches)
        rows, references = [], []
        for number, batch in enumerate(views):
            draws = key_of(seed, "alignment", number)
            both = _both_updates(net, (batch.views, batch.labels), draws, phase.taps, train=False)
            rows.append(_rows(groups, *both))
            references.append(both[1])
        where = {"network": config.rule, "step": step, "epoch": step / steps_per_epoch, "batch_size": size}
        points += _points(groups, rows, references, where)
    return AlignmentTable(tuple(points))


_Groups = list[tuple[tuple[Any, ...], list[int]]]
"""The first fields of a row, level to chance_sd, and where its parameters are among the trunk's."""


def _groups(net: LocalNetwork) -> _Groups:
    """Return the groups that have a row; UserError if the network has no tap."""
    if not len(net.taps):
        raise UserError("the network has no tap, so neither its rule nor backpropagation has an update to compare")
    units = [(stage, unit) for stage, module in enumerate(net.stages, start=1) for unit in module.units]
    places = [(stage, unit.name, name, p.numel()) for stage, unit in units for name, p in _parameters(unit)]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for level, num_names in zip(LEVELS, (3, 2, 1, 0), strict=True):
        for index, place in enumerate(places):
            groups.setdefault((level, *place[:num_names], *[None] * (3 - num_names)), []).append(index)
    sizes = {names: sum(places[index][-1] for index in members) for names, members in groups.items()}
    return [((*names, n, 1 / math.sqrt(n)), groups[names]) for names, n in sizes.items()]


def _parameters(unit: UnitBlock) -> Iterator[tuple[str, nn.Parameter]]:
    for prefix, part in zip(unit.part_names, unit.parts, strict=True):  # torchvision's names
        yield from part.named_parameters(prefix=prefix)


def _both_updates(
    net: LocalNetwork, batch: tuple[Sequence[Tensor], Tensor | None], key: int, taps: Sequence[int] | None, train: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the rule's and backpropagation's gradient of every trunk parameter, on the CPU."""
    found, (views, labels) = [], batch
    for whose in ("the rule", "backpropagation"):
        # weights, which a step only reads, share their memory; gradients and buffers are the twin's own
        memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in net.parameters()}
        twin = copy.deepcopy(net, memo)
        if train:
            twin.train()
        if whose == "backpropagation":
            _make_exact(twin)
            taps = [len(twin.taps) - 1]
        engine.backward(twin, *views, labels=labels, key=key, taps=taps)
        found.append(_gradients(twin, whose))
    return found[0], found[1]


def _make_exact(twin: LocalNetwork) -> None:
    """Give the last tap credit for all stages below it, and let gradients cross layers exactly."""
    # all taps stay in place, as a tap's draws are named after its index
    matrix = np.zeros_like(twin.credit.matrix)
    matrix[-1, : twin.credit.taps[-1] + 1] = 1
    twin.credit = Credit(matrix, twin.credit.taps)
    twin.transport = "exact"
    for hooks in (hooks for module in twin.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)):
        for number in [n for n, hook in hooks.items() if getattr(hook, "__module__", "") == transport.__name__]:
            del hooks[number]


def _gradients(twin: LocalNetwork, whose: str) -> list[Tensor]:
    """Return the gradients of the trunk's parameters, biases' that are zero up to rounding as zeros."""
    parameters = dict(item for unit in twin.units for item in _parameters(unit))
    own = {name: (torch.zeros_like(p) if p.grad is None else p.grad).cpu() for name, p in parameters.items()}
    for name, g in own.items():
        if not g.isfinite().all():
            raise UserError(f"the gradient that {whose} gives {name} is not finite; see whether the losses are")
        weight = own.get(f"{name.removesuffix('bias')}weight")
        if name.endswith("bias") and weight is not None and weight.dim() > 1:
            floor = _ROUNDING * torch.finfo(g.dtype).eps * math.sqrt(_dot(weight, weight) / weight.numel())
            own[name] = torch.zeros_like(g) if math.sqrt(_dot(g, g) / g.numel()) <= floor else g
    return list(own.values())


def _dot(a: Tensor, b: Tensor) -> float:
    # product, then sum: a vector with itself gives the same bits as with its copy
    return float((a.double() * b.double()).sum())


_REASONS = {(True, False): "no update", (False, True): "backpropagation's is zero", (True, True): "both are zero"}


def _rows(groups: _Groups, rule: Sequence[Tensor], exact: Sequence[Tensor]) -> list[AlignmentRow]:
    products = np.array([(_dot(r, r), _dot(r, b), _dot(b, b)) for r, b in zip(rule, exact, strict=True)])
    rows = []
    for names, members in groups:
        rr, rb, bb = (float(x) for x in products[members].sum(0))
        ratio = None if bb == 0 else math.sqrt(rr / bb)
        # in this order: 1 exactly where both are the same, and no overflow
        cosine = min(1.0, max(-1.0, rb / rr * ratio)) if rr and ratio is not None else None
        rows.append(
            AlignmentRow(*names, cosine=cosine, norm_ratio=ratio, rule_norm=math.sqrt(rr), backprop_norm=math.sqrt(bb),
                         reason=_REASONS.get((rr == 0, bb == 0)))
        )  # fmt: skip
    return rows


def _points(
    groups: _Groups, measured: Sequence[list[AlignmentRow]], exact: Sequence[list[Tensor]], where: Mapping[str, Any]
) -> list[AlignmentPoint]:
    """Return one point per group from the rows and backpropagation's gradients of every batch."""
    stacked = (torch.stack([g.flatten() for g in of_one]).double() for of_one in zip(*exact, strict=True))
    grams = np.array([(x @ x.T).numpy() for x in stacked])
    points = []
    for (names, members), rows in zip(groups, zip(*measured, strict=True), strict=True):
        cosines = np.array([row.cosine for row in rows if row.cosine is not None])
        ratios = np.array([row.norm_ratio for row in rows if row.norm_ratio is not None])
        cosine, low, high = _mean(cosines, -1, 1)
        ratio, ratio_low, ratio_high = _mean(ratios, 0, math.inf)
        own, own_low, own_high = _mean_of_pairs(grams[members].sum(0))
        points.append(
            AlignmentPoint(*names, **where, cosine=cosine, low=low, high=high, norm_ratio=ratio, ratio_low=ratio_low,
                           ratio_high=ratio_high, self_cosine=own, self_low=own_low, self_high=own_high,
                           rule_norm=float(np.mean([row.rule_norm for row in rows])),
                           backprop_norm=float(np.mean([row.backprop_norm for row in rows])),
                           n=len(ratios), n_cosine=len(cosines),
                           reason=next(row.reason for row in rows if row.reason) if cosine is None else None)
        )  # fmt: skip
    return points


_Estimate = tuple[float, float, float] | tuple[None, None, None]


def _mean(values: np.ndarray, lowest: float, highest: float) -> _Estimate:
    """Return mean and interval of one value per batch `(n,)`."""
    total, n = values.sum(), len(values)
    return _estimate(total / max(n, 1), (total - values) / max(n - 1, 1), lowest, highest)


def _mean_of_pairs(gram: np.ndarray) -> _Estimate:
    """Return mean and interval of the cosine over pairs of vectors, from inner products; zero vectors left out."""
    nonzero = gram.diagonal() > 0
    norms, n = np.sqrt(gram.diagonal()[nonzero]), int(nonzero.sum())
    cosines = gram[np.ix_(nonzero, nonzero)] / norms[:, None] / norms
    np.fill_diagonal(cosines, 0)
    of_one, pairs = cosines.sum(0), max(n * (n - 1), 1)
    return _estimate(of_one.sum() / pairs, (of_one.sum() - 2 * of_one) / max((n - 1) * (n - 2), 1), -1, 1)


def _estimate(value: float, without: np.ndarray, lowest: float, highest: float) -> _Estimate:
    """Return a value and its t interval, from the values without one batch each (jackknife: Arvesen 1969, AMS 40)."""
    from scipy.stats import t

    value, n = float(value), len(without)
    if n < FEWEST_BATCHES:
        return None, None, None
    half = float(t.ppf(0.975, n - 1)) * math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    return value, max(lowest, value - half), min(highest, value + half)
