"""What a rule costs, before it is trained: the engine's own step, run on tensors that have shapes but no memory.

The network is built on torch's meta device, its tensors become fake CPU tensors, and `localsim.engine.backward` runs a
training step on them. Nothing is computed or allocated, whatever the size; which graphs live when, what autograd saves
and how gradients are routed is the step's own doing, so that a prediction cannot say anything else than the run does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from localsim import engine
from localsim.arithmetic import Arithmetic
from localsim.assembly import build_network
from localsim.config import Config
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.memory import HeldBytes
from localsim.network import IMAGES, Embedding, LocalNetwork, tensors_of
from localsim.rules.expand import whole_maps
from localsim.schedule import acting_together


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one training step of a configuration costs; of a sequential schedule, every number is its largest phase's.

    Bytes are those of the tensors' elements in the precision of the run; FLOPs are those of convolutions and matrix
    products, 2 for every multiply-add (what is done element by element counts nothing). Tuples have an
    entry per stage, or per boundary between two stages, from the input up.

    Attributes:
        stages: names of the stages, by their first and last unit blocks.
        units: unit blocks of every stage.
        trunk_parameters: of all stages, trainable and frozen.
        tap_parameters: of all readouts and heads.
        forward_flops: of all views through stages, readouts, heads and objectives.
        backward_flops: of all vector-Jacobian products, recomputed activations included.
        held_bytes: what autograd holds at the peak, weights apart; `localsim run` measures the same number.
        paths: for every stage, unit blocks on the longest gradient path that ends in it, see `Credit.path_to`.
        update_locks: for every stage, unit blocks whose forward passes, from the stage's first one on, must be over
            before its gradient is final and it may be updated; 0 for a stage that is never updated. Its own unit blocks
            where it waits for nothing above it.
        stages_run: the same, as the number of stages that have run by then, counted from the input.
        up_bytes: activations of all views that cross each boundary on their way up.
        down_bytes: boundary gradients that cross it on their way down, one set of maps per group of taps whose signals
            travel merged (under direct feedback the taps' errors).
        context_bytes: maps from elsewhere that taps read beside the output of their own stage.
        gradient_bytes: the most parameter gradients that are alive at once, if those that are final are used up before
            any other are made, as `localsim run` does.
    """

    rule: str
    backbone: str
    image_size: int
    batch_size: int
    views: int
    precision: str
    stages: tuple[str, ...]
    units: tuple[int, ...]
    trunk_parameters: int
    tap_parameters: int
    forward_flops: int
    backward_flops: int
    held_bytes: int
    paths: tuple[int, ...]
    update_locks: tuple[int, ...]
    stages_run: tuple[int, ...]
    up_bytes: tuple[int, ...]
    down_bytes: tuple[int, ...]
    context_bytes: int
    gradient_bytes: int

    @property
    def gradient_path(self) -> int:
        """The longest gradient path, in unit blocks."""
        return max(self.paths)

    @property
    def update_lock(self) -> int:
        """The longest wait of any stage for its update, in unit blocks."""
        return max(self.update_locks)


def cost(config: Config) -> Cost:
    """Return what a step of a configuration costs, without data and without computing it.

    Counted for the CPU in eager mode; a device that keeps other buffers for its backward passes holds slightly more or
    less. With transport feedback_alignment the network itself is built, for its weights decide the feedback.

    Args:
        config: see `localsim.presets.resolve`.

    Raises:
        UserError: the network cannot be built (see `localsim.assembly.build_network`), or something in the step asks
            for the values of tensors, which there are none of. Any other error is raised as it is.
    """
    with without_memory(config) as net:
        phases = acting_together(config, len(net.taps)) or [()]
        measured = [_measure(net, config, taps) for taps in phases]
    return Cost(
        **{f.name: getattr(config, f.name) for f in fields(Cost) if f.name in Config.names()},
        stages=tuple(stage.name for stage in net.stages),
        units=tuple(net.units_per_stage),
        trunk_parameters=sum(p.numel() for p in net.stages.parameters()),
        tap_parameters=sum(p.numel() for p in net.taps.parameters()),
        **{name: _largest([phase[name] for phase in measured]) for name in measured[0]},
    )


@contextmanager
def without_memory(config: Config) -> Iterator[LocalNetwork]:
    """Give the network of a configuration, in training mode, for steps on tensors that have shapes but no values.

    Raises:
        UserError: the network cannot be built, or what is run on it asks for values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import

    real = config.transport == "feedback_alignment"
    with nullcontext() if real else torch.device("meta"):
        net = build_network(config)
    if config.channels_last:  # as `localsim.experiment.prepare` does: some operations keep a copy in another layout
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        with FakeTensorMode(), whole_maps():
            yield _without_memory(net).train()
    except Exception as error:
        if not _is_for_want_of_values(error):
            raise
        first_line = (str(error).strip() or "no message").splitlines()[0]
        raise UserError(
            f"the cost of rule {config.rule} cannot be predicted, for its step does not run on tensors without values "
            f"({type(error).__name__}: {first_line}); `localsim run` measures it before training"
        ) from error


def blank_batch(config: Config, rows: int) -> tuple[list[Tensor], Tensor]:
    """Return the views of `rows` images and the labels of a whole batch, as a run gives them to the engine."""
    images = torch.empty(
        (rows, 3, config.image_size, config.image_size),
        memory_format=torch.channels_last if config.channels_last else torch.contiguous_format,
    )
    return [images.clone() for _ in range(config.views)], torch.zeros(config.batch_size, dtype=torch.long)


def signals_down(credit: Credit) -> tuple[int, ...]:
    """Return for every boundary, from the lowest, how many sets of boundary gradients cross it on their way down.

    One per group of taps above it whose credit for what is below it is proportional: these travel as one.
    """
    return tuple(credit.signals_down(border) for border in range(1, credit.num_stages))


def _without_memory(net: LocalNetwork) -> LocalNetwork:
    """Return a copy whose tensors are fake; `deepcopy` takes them from its memo."""
    memo: dict[int, object] = {id(p): nn.Parameter(_like(p), requires_grad=p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, memo | {id(b): _like(b) for b in net.buffers()})


def _like(tensor: Tensor) -> Tensor:
    # on the CPU and not on the meta device, where autocast has no meaning
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")


# what torch says where the error has no class of its own
_REFUSALS = (
    ".numpy() is not supported",
    "FakeTensor.__format__",  # f"{x:.2f}"
    "to FakeTensors first",  # a tensor that was made before the step
    "fake impl",  # an operation of one's own that does not say what shape it gives
    "'Meta' backend",  # the same of torch's
)


def _is_for_want_of_values(error: Exception) -> bool:
    """Return whether torch refused an operation on fake tensors that it may well carry out on real ones."""
    from torch._subclasses import fake_tensor

    classes = (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedFakeTensorException,
        fake_tensor.UnsupportedOperatorException,
    )
    return isinstance(error, classes) or any(words in str(error) for words in _REFUSALS)


@dataclass
class Watch:
    """What the engine's hooks see of a step.

    Attributes:
        out_bytes: of all views together, for every stage that has run.
        stages_run: how many stages had run when each was updated.
        error_width: numbers per image of the widest embedding.
        gradient_bytes: the most parameter gradients that were alive at once.
    """

    net: LocalNetwork
    out_bytes: dict[int, int] = field(default_factory=dict)
    stages_run: list[int] = field(default_factory=list)
    error_width: int = 0
    gradient_bytes: int = 0

    def __post_init__(self) -> None:
        self.stages_run = [0] * len(self.net.stages)
        self.stage_of = {id(p): i for i, stage in enumerate(self.net.stages) for p in stage.parameters()}

    def on_stage(self, stage: int, outputs: list[Tensor], _alive: tuple[int, ...]) -> None:
        self.out_bytes[stage] = sum(out.nbytes for out in outputs)

    def on_tap(self, _tap: int, embeddings: tuple[Embedding, ...], _loss: Tensor) -> None:
        self.error_width = max(self.error_width, sum(part.flatten(1).shape[1] for part in tensors_of(embeddings[0])))

    def on_final(self, parameters: list[nn.Parameter]) -> None:
        alive = sum(p.grad.nbytes for p in self.net.parameters() if p.grad is not None)
        self.gradient_bytes = max(self.gradient_bytes, alive)
        for parameter in parameters:
            parameter.grad = None
            if (stage := self.stage_of.get(id(parameter))) is not None:
                self.stages_run[stage] = len(self.out_bytes)

    def crossing(self, credit: Credit, images: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the bytes that cross every boundary up and down, for `images` images in all views together."""
        # stages above the highest acting tap are not run: nothing crosses to them
        up = [self.out_bytes[stage] if stage + 1 in self.out_bytes else 0 for stage in range(len(self.net.stages) - 1)]
        error = 4 * self.error_width * images  # direct feedback broadcasts it in float32
        sent = [error] * len(up) if self.net.transport == "direct_feedback" else up
        return tuple(up), tuple(n * size for n, size in zip(signals_down(credit), sent, strict=True))


def _measure(net: LocalNetwork, config: Config, taps: Sequence[int]) -> dict[str, Any]:
    """Run a step in which some taps act, on fake tensors; return the fields of `Cost` that it decides."""
    views, labels = blank_batch(config, config.batch_size)
    watch = Watch(net)
    hooks = engine.Hooks(on_stage=watch.on_stage, on_tap=watch.on_tap, on_final=watch.on_final)
    chosen = None if len(taps) == len(net.taps) else taps
    with Arithmetic() as flops, HeldBytes(net.parameters()) as held:
        engine.backward(
            net, *views, labels=labels, key=config.seed, precision=config.precision, hooks=hooks, taps=chosen
        )
    credit, units, run = net.credit.only(taps), net.units_per_stage, watch.stages_run
    up, down = watch.crossing(credit, config.batch_size * config.views)
    read = {stage: watch.out_bytes[stage] for stage in watch.out_bytes} | {IMAGES: sum(view.nbytes for view in views)}
    return {
        "forward_flops": flops.forward,
        "backward_flops": flops.backward,
        "held_bytes": held.peak,
        "paths": tuple(credit.path_to(stage, units) for stage in range(len(units))),
        "update_locks": tuple(sum(units[stage : run[stage]]) for stage in range(len(units))),
        "stages_run": tuple(run),
        "up_bytes": up,
        "down_bytes": down,
        "context_bytes": sum(
            read[tap.context]
            for tap in (net.taps[index] for index in taps)
            if tap.context is not None and tap.context != tap.stage and (tap.context, tap.stage) != (IMAGES, 0)
        ),
        "gradient_bytes": watch.gradient_bytes,
    }


def _largest(values: Sequence[Any]) -> Any:
    """Return the largest of the phases' numbers, of tuples entry by entry."""
    return tuple(np.max(values, axis=0).tolist()) if isinstance(values[0], tuple) else max(values)
