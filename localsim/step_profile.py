"""A training step taken apart: which stage or tap does what, in which order, and what others would have to be told.

The step is the engine's own, on tensors without memory (see `localsim.cost`): of all images, or of one process's rows
of a batch that several share, which computes every tap's loss on the whole batch all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from localsim import engine
from localsim.arithmetic import Arithmetic
from localsim.config import Config
from localsim.cost import Watch, blank_batch, without_memory
from localsim.credit import Credit
from localsim.distributed.peers import Peers
from localsim.errors import UserError
from localsim.memory import HeldBytes, _Held, _identity
from localsim.network import IMAGES, Embedding, LocalNetwork, Tap
from localsim.schedule import acting_together

Kind = Literal["stage", "tap", "loss"]
Part = tuple[Kind, int]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A stretch of a step within one stage, one tap (readout and head) or one tap's loss.

    Attributes:
        kind: what it is done for.
        index: of the stage or tap.
        stage: where it is done: the tap's stage.
        backward: part of a backward pass.
        flops: of convolutions and matrix products, two per multiply-add.
        normed: channels of every batch norm that runs forward on a view (once more where activations are recomputed).
        norm_gradients: channels of every batch norm that a gradient passes.
        embeddings: numbers of every tensor of this process's images that the loss needs of the others' too; none where
            there are no others.
        final: parameters whose gradients are final after it.
    """

    kind: Kind
    index: int
    stage: int
    backward: bool
    flops: int = 0
    normed: tuple[int, ...] = ()
    norm_gradients: tuple[int, ...] = ()
    embeddings: tuple[int, ...] = ()
    final: int = 0


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """A step of a configuration as one process does it, or all of it where `processes` is 1.

    Attributes:
        stages: their names.
        credit: of the taps that act.
        batch_size: images of the whole batch.
        processes: how many share it; `rows` of the images are this one's.
        script: what is done, in order.
        parameters: of every stage with the taps that read it, trainable and frozen.
        up_bytes: activations of the rows, in all views, that cross each boundary.
        down_bytes: boundary gradients that cross it.
        image_bytes: the rows' views.
        held: `held[start][stop - start - 1]`: bytes that autograd holds at the peak for the stages from `start` up to,
            not including, `stop`, their taps and losses.
        reads: pairs of a stage whose tap reads what another stage gave (`IMAGES`: the images), and that stage.
        state: numbers that the optimiser keeps per parameter.
    """

    rule: str
    stages: tuple[str, ...]
    credit: Credit
    batch_size: int
    processes: int
    rows: int
    script: tuple[Work, ...]
    parameters: tuple[int, ...]
    up_bytes: tuple[int, ...]
    down_bytes: tuple[int, ...]
    image_bytes: int
    held: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[int, int], ...]
    state: int

    def flops_of_stage(self, stage: int) -> int:
        """Return the FLOPs of a stage and of the taps that read it."""
        return sum(work.flops for work in self.script if work.stage == stage)

    @property
    def flops(self) -> int:
        """All FLOPs of the step."""
        return sum(work.flops for work in self.script)

    def held_by(self, stages: range) -> int:
        """Return the bytes that autograd holds at the peak for some consecutive stages and their taps."""
        return self.held[stages.start][len(stages) - 1]


def profiles(config: Config, processes: int = 1) -> list[StepProfile]:
    """Return the profile of a step, or of a sequential schedule one for the step of every phase.

    Args:
        config: see `localsim.presets.resolve`.
        processes: how many share every batch. The profile is that of the one with the most rows.

    Raises:
        UserError: there are more processes than images in a batch, or as in `localsim.cost.cost`.
    """
    return profiles_of_shares(config, [processes])[processes]


def profiles_of_shares(config: Config, shares: Collection[int]) -> dict[int, list[StepProfile]]:
    """Return what `profiles` does for several numbers of processes, by number: the network is built once."""
    for number in shares:
        if not 1 <= number <= config.batch_size:
            raise UserError(
                f"{number} processes cannot share a batch of {config.batch_size} images; "
                f"allowed: 1 to {config.batch_size}"
            )
    with without_memory(config) as net:
        phases = acting_together(config, len(net.taps)) or [()]
        return {number: [_profile(net, config, taps, number) for taps in phases] for number in shares}


def _profile(net: LocalNetwork, config: Config, taps: Sequence[int], processes: int) -> StepProfile:
    rows = -(-config.batch_size // processes)
    views, labels = blank_batch(config, rows)
    watch, diary = Watch(net), _Diary(net)

    def on_final(parameters: list[nn.Parameter]) -> None:
        diary.note_final(parameters)
        watch.on_final(parameters)

    hooks = engine.Hooks(on_stage=watch.on_stage, on_tap=watch.on_tap, on_final=on_final)
    chosen = None if len(taps) == len(net.taps) else taps
    peers = None if processes == 1 else _AmongMany(diary, rows, config.batch_size)
    with diary, diary.watching():
        engine.backward(
            net,
            *views,
            labels=labels[:rows],
            key=config.seed,
            precision=config.precision,
            hooks=hooks,
            taps=chosen,
            peers=peers,
        )
    credit = net.credit.only(taps)
    up, down = watch.crossing(credit, rows * config.views)
    acting = [net.taps[tap] for tap in taps]
    num = len(net.stages)
    return StepProfile(
        rule=config.rule,
        stages=tuple(stage.name for stage in net.stages),
        credit=credit,
        batch_size=config.batch_size,
        processes=processes,
        rows=rows,
        script=diary.script(),
        parameters=tuple(
            _count(stage) + sum(_count(tap) for tap in net.taps if tap.stage == index)
            for index, stage in enumerate(net.stages)
        ),
        up_bytes=up,
        down_bytes=down,
        image_bytes=sum(view.nbytes for view in views),
        held=tuple(tuple(diary.held(range(start, stop)) for stop in range(start + 1, num + 1)) for start in range(num)),
        reads=tuple(
            (tap.stage, tap.context)
            for tap in acting
            if tap.context not in (None, tap.stage) and (tap.context, tap.stage) != (IMAGES, 0)
        ),
        state=2 if config.optimizer == "adamw" else 1,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass
class _Entry:
    """Work that is under way."""

    kind: Kind
    index: int
    stage: int
    backward: bool
    flops: int = 0
    normed: list[int] = field(default_factory=list)
    norm_gradients: list[int] = field(default_factory=list)
    embeddings: list[int] = field(default_factory=list)
    final: int = 0

    @property
    def matters(self) -> bool:
        """Whether it is arithmetic or a message; a forward pass matters even if it is pooling alone, for its output."""
        passes = self.kind == "stage" and not self.backward
        return bool(passes or self.flops or self.normed or self.norm_gradients or self.embeddings or self.final)

    def work(self) -> Work:
        return Work(
            kind=self.kind,
            index=self.index,
            stage=self.stage,
            backward=self.backward,
            flops=self.flops,
            normed=tuple(self.normed),
            norm_gradients=tuple(self.norm_gradients),
            embeddings=tuple(self.embeddings),
            final=self.final,
        )


class _Diary(Arithmetic):
    """Writes down a step while it runs: what is done for which part, and what autograd keeps for it.

    Forward, a part begins where its module is called. Backward, an operation belongs to the part whose forward pass
    kept what it now asks for.
    """

    def __init__(self, net: LocalNetwork) -> None:
        super().__init__()
        self.net = net
        self.entries: list[_Entry] = []
        self.kept: list[tuple[int, int, int, int]] = []  # identity, bytes, stage, +1 or -1
        self.part: Part = ("stage", 0)
        self.ledgers: dict[Part, _Ledger] = {}
        self.owner = {id(p): ("stage", i) for i, stage in enumerate(net.stages) for p in stage.parameters()}
        self.owner |= {id(p): ("tap", i) for i, tap in enumerate(net.taps) for p in tap.parameters()}

    def script(self) -> tuple[Work, ...]:
        """Return what was done, leaving out what is neither arithmetic nor a message."""
        return tuple(entry.work() for entry in self.entries if entry.matters)

    def held(self, stages: range) -> int:
        """Return the peak of what autograd kept for some stages; a storage counts once."""
        count: dict[int, int] = {}
        now = peak = 0
        for identity, size, stage, step in self.kept:
            if stage in stages:
                before = count.get(identity, 0)
                count[identity] = before + step
                if 0 in (before, before + step):
                    now += step * size
                    peak = max(peak, now)
        return peak

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it, parts of the network say when they are called."""
        # not by hooks of modules: what listens to a head, or to batch norms, changes how they are run
        for index, stage in enumerate(self.net.stages):
            stage.forward = self._entering(("stage", index), stage.forward)
        for index, tap in enumerate(self.net.taps):
            tap.embed_views = self._embedding(index, tap)  # type: ignore[method-assign]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, self._ask):
                yield
        finally:
            for part in (*self.net.stages, *self.net.taps):
                for name in ("forward", "embed_views"):
                    vars(part).pop(name, None)

    def note_final(self, parameters: list[nn.Parameter]) -> None:
        kind, index = self.owner[id(parameters[0])]
        latest = next(e for e in reversed(self.entries) if (e.kind, e.index) == (kind, index))
        # work that was done since for other parts does not make it any later
        latest.final += sum(p.numel() for p in parameters if p.grad is not None)

    def _entering(self, part: Part, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any) -> Any:
            self._turn_to(part, backward=False)
            return call(*given)

        return called

    def _embedding(self, index: int, tap: Tap) -> Callable[..., list[Embedding]]:
        def embed(*given: Any) -> list[Embedding]:
            self._turn_to(("tap", index), backward=False)
            made = Tap.embed_views(tap, *given)
            self._turn_to(("loss", index), backward=False)
            return made

        return embed

    def _turn_to(self, part: Part, backward: bool) -> None:
        self.part = part
        latest = self.entries[-1] if self.entries else None
        if latest is None or (latest.kind, latest.index, latest.backward) != (*part, backward):
            self.entries.append(_Entry(*part, self._stage(part), backward))

    def _stage(self, part: Part) -> int:
        kind, index = part
        return index if kind == "stage" else self.net.taps[index].stage

    def _keep(self, tensor: Tensor) -> _Held:
        if self.part not in self.ledgers:
            self.ledgers[self.part] = _Ledger(self.net, self.part, self._stage(self.part), self.kept)
        return self.ledgers[self.part]._pack(tensor)

    def _ask(self, held: _Held) -> Tensor:
        assert isinstance(held.ledger, _Ledger)
        self._turn_to(held.ledger.part, backward=True)
        return held.tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.forward + self.backward
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if not self.entries:  # the views are made
            return out
        entry = self.entries[-1]
        entry.flops += self.forward + self.backward - before
        if func is torch.ops.aten.native_batch_norm.default and args[5]:
            entry.normed.append(args[0].shape[1])
        elif func is torch.ops.aten.native_batch_norm_backward.default:
            entry.norm_gradients.append(args[1].shape[1])
        return out


class _AmongMany(Peers):
    """Stands for one of several processes: what it would be told by the others are tensors of the right shape."""

    def __init__(self, diary: _Diary, rows: int, whole: int) -> None:
        super().__init__(None, None, 0, 2)
        self.diary, self.rows, self.whole = diary, rows, whole
        self.counts = [rows, whole - rows]

    def gather(self, x: Tensor, alike: bool = False) -> Tensor:
        self.diary.entries[-1].embeddings.append(x.numel())
        return torch.cat([x, x.new_empty((len(x) // self.rows * (self.whole - self.rows), *x.shape[1:]))])

    def gather_rows(self, x: Tensor) -> Tensor:
        return x.new_zeros((self.whole, *x.shape[1:]))

    def start_sum(self, tensors: Sequence[Tensor | None]) -> Callable[[], list[Tensor | None]]:
        return lambda: list(tensors)


class _Ledger(HeldBytes):
    """Notes what autograd keeps for one part, and lets go."""

    def __init__(self, net: LocalNetwork, part: Part, stage: int, events: list[tuple[int, int, int, int]]) -> None:
        super().__init__(net.parameters())
        self.part, self.stage, self.events = part, stage, events

    def _add(self, tensor: Tensor, step: int) -> None:
        if (identity := _identity(tensor)) not in self._excluded:
            self.events.append((identity, tensor.untyped_storage().nbytes(), self.stage, step))
