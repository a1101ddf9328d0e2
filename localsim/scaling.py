"""How long a step takes on several processes: its parts, the messages between processes, and a machine's rates.

A batch may be divided among processes (data-parallel), stages may be (block-parallel), or both. What is done and said,
and in which order, is what `localsim.engine` does with `peers` and `links`; see docs/scaling.md for what is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from localsim.assembly import build_trunk
from localsim.config import Config
from localsim.distributed.team import stage_groups
from localsim.errors import UserError
from localsim.machines import Machine
from localsim.placement import flops_by_stage, place_stages
from localsim.step_profile import StepProfile, Work, profiles_of_shares

FLOAT = 4
"""Bytes of a number in messages, parameters and optimiser state: float32, whatever precision the step runs in."""
IN_FLIGHT = 2
"""Batches of activations that may wait between two processes."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """What a process tells others in a step: `bytes` are those it hands over, in `number` messages."""

    kind: str
    number: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A training step on several processes.

    Attributes:
        parallel: `data`, or `blocks:P`.
        processes: in all.
        groups: the stages of every process (of every set of copies), from the bottom.
        seconds: from one step to the next, with the pipeline full.
        images_per_second: of the whole batch.
        spent: seconds of a step of the busiest process: `compute`, `updates` of the optimiser, and waiting for `norms`,
            `embeddings`, `gradients` and `neighbours` (what comes from the processes with the stages below and above).
        messages: of the process that hands over most bytes.
        memory: bytes of the process that needs most: weights, optimiser state, gradients, activations held, what comes
            in. Temporary buffers come on top.
    """

    parallel: str
    processes: int
    groups: tuple[range, ...]
    seconds: float
    images_per_second: float
    spent: dict[str, float]
    messages: tuple[Message, ...]
    memory: int


def predictions(
    config: Config, numbers: Sequence[int], machine: Machine, parallel: str | None = None
) -> list[Prediction]:
    """Return what a step takes on numbers of processes, for every way to use them: data-parallel first.

    Stages are placed by `localsim.placement.place_stages`. Of a sequential schedule, the phase that takes longest.

    Args:
        config: see `localsim.presets.resolve`.
        numbers: of processes.
        machine: rates.
        parallel: `data`, `blocks` or `blocks:P`, see `localsim.distributed.team.stage_groups`; None for `data` and
            every `blocks:P` that fits, without those that `predict` refuses.

    Raises:
        UserError: the processes cannot be used in this way; see there, `predict` and `localsim.step_profile.profiles`.
    """
    num_stages = len(build_trunk(config)[1])
    ways = [(number, p) for number in numbers for p in _numbers_of_groups(parallel, number, num_stages)]
    shared = profiles_of_shares(config, {number // p for number, p in ways})
    found = []
    for number, num_groups in ways:
        phases = shared[number // num_groups]
        groups = place_stages(flops_by_stage(phases), num_groups)
        try:
            found.append(max((predict(phase, machine, groups) for phase in phases), key=lambda one: one.seconds))
        except UserError:
            if parallel is not None:
                raise
    return found


def _numbers_of_groups(parallel: str | None, processes: int, num_stages: int) -> list[int]:
    if processes == 1:
        return [1]
    if parallel is None:
        return [1, *(p for p in range(2, num_stages + 1) if processes % p == 0)]
    return [stage_groups(parallel, processes, num_stages)]


SPENT = ("compute", "updates", "norms", "embeddings", "gradients", "neighbours")


def predict(profile: StepProfile, machine: Machine, groups: Sequence[range]) -> Prediction:
    """Return what a step takes on `len(groups) * profile.processes` processes.

    Args:
        profile: of the rows of one of the processes that share a batch, see `localsim.step_profile.profiles`.
        machine: rates.
        groups: consecutive stages, from the bottom, each run by `profile.processes` copies; together all stages.

    Raises:
        UserError: a tap reads what a process other than its own made, which the prediction leaves out.
    """
    for stage, read in profile.reads if len(groups) > 1 else ():
        if not any(stage in group and max(read, 0) in group for group in groups):
            raise UserError(
                f"rule {profile.rule} has taps that read what other stages made; how long they wait for other "
                "processes is not predicted; allowed: --parallel data"
            )
    workers = [_Worker(profile, machine, index, groups) for index in range(len(groups))]
    period, spent = _steady(workers)
    busiest = max(range(len(workers)), key=lambda i: (sum(spent[i].values()) - spent[i]["neighbours"], -i))
    told = [messages(profile, groups, index) for index in range(len(groups))]
    return Prediction(
        parallel="data" if len(groups) == 1 else f"blocks:{len(groups)}",
        processes=len(groups) * profile.processes,
        groups=tuple(groups),
        seconds=period,
        images_per_second=profile.batch_size / period if period else math.inf,
        spent=spent[busiest],
        messages=max(told, key=lambda one: sum(message.bytes for message in one)),
        memory=max(worker.memory() for worker in workers),
    )


def messages(profile: StepProfile, groups: Sequence[range], index: int) -> tuple[Message, ...]:
    """Return what a process of the group tells others in a step, kinds of which there are none left out."""
    group, works = groups[index], [work for work in profile.script if work.stage in groups[index]]
    kinds = []
    if profile.processes > 1:
        forward = [2 * channels + 1 for work in works for channels in work.normed]
        back = [2 * channels for work in works for channels in work.norm_gradients]
        told = [size for work in works for size in work.embeddings]
        final = [work.final for work in works if work.final]
        kinds = [
            ("labels", _LABEL_MESSAGES, _label_bytes(profile)),
            ("norms", len(forward) + len(back), FLOAT * (sum(forward) + sum(back))),
            ("embeddings", len(told), FLOAT * sum(told)),
            ("gradients", len(final), FLOAT * sum(final)),
        ]
    if group.stop < len(profile.stages) and profile.up_bytes[group.stop - 1]:
        kinds.append(("activations up", 1, profile.up_bytes[group.stop - 1]))
    if group.start and profile.down_bytes[group.start - 1]:
        kinds.append(("signals down", 1, profile.down_bytes[group.start - 1]))
    return tuple(Message(kind=kind, number=number, bytes=size) for kind, number, size in kinds if number)


_LABEL_MESSAGES = 3  # how many images each process has, how many labels, the labels


def _label_bytes(profile: StepProfile) -> int:
    return 8 * (profile.rows + _LABEL_MESSAGES - 1)


@dataclass
class _Worker:
    """One process (its copies do the same at the same times): its clock, and what it waits for."""

    profile: StepProfile
    machine: Machine
    index: int
    groups: Sequence[range]
    clock: float = 0.0
    wire: float = 0.0  # when the gradients that are being added up are
    pending: list[tuple[float, int]] = field(default_factory=list)
    told_below: float = 0.0  # when what goes down is on its way
    largest: int = 0  # gradients alive, in numbers
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPENT, 0.0))
    offered: list[float] = field(default_factory=list)  # when the worker below had each batch ready
    taken: list[float] = field(default_factory=list)  # when each batch had come

    def __post_init__(self) -> None:
        profile, stages = self.profile, self.groups[self.index]
        self.stages, self.copies = stages, profile.processes
        self.link = self.machine.link(self.copies * len(self.groups))
        self.up = profile.up_bytes[stages.stop - 1] if stages.stop < len(profile.stages) else 0
        self.from_below = profile.up_bytes[stages.start - 1] if stages.start else 0
        self.from_above = profile.down_bytes[stages.stop - 1] if stages.stop < len(profile.stages) else 0
        own = [(at, work) for at, work in enumerate(profile.script) if work.stage in stages]
        higher = [at for at, work in enumerate(profile.script) if work.stage >= stages.stop]
        # what the one-process step does after stages that run elsewhere needs what comes down from them
        first = higher[0] if higher and self.from_above else len(profile.script)
        self.before, self.after = ([(at, w) for at, w in own if (at < first) == early] for early in (True, False))
        told = self._told_by()
        self.last_before_telling = max((at for at, _ in own if at < told), default=-1)

    def _told_by(self) -> int:
        """Return what in the script comes after all that the process below waits for: losses, and what carries them."""
        script, credit, border = self.profile.script, self.profile.credit, self.stages.start
        tops = {credit.taps[tap] for tap in credit.crossing(border)}
        if tops and max(tops) >= self.stages.stop:
            return len(script)
        ahead = [work.kind != "stage" or not work.backward for work in script]
        last_loss = max((at for at, work in enumerate(script) if work.stage in tops and ahead[at]), default=-1)
        later = range(last_loss + 1, len(script))
        return next((at for at in later if script[at].kind == "stage" and ahead[at]), len(script))

    def advance(self, seconds: float, what: str) -> None:
        self.clock += seconds
        self.spent[what] += seconds

    def wait(self, until: float, what: str) -> None:
        self.advance(max(0.0, until - self.clock), what)

    def receive(self, num_bytes: int, offered: float) -> None:
        """Take a message that was offered at some time: it travels when both sides are ready, and this one waits."""
        bandwidth, latency = self.link
        self.wait(offered, "neighbours")
        self.advance(num_bytes / bandwidth + latency, "neighbours")

    def begin(self, batch: int, above: _Worker | None) -> None:
        """Do all of a step that needs nothing from above, and send the activations up."""
        if self.from_below:
            self.receive(self.from_below, self.offered[batch])
        self.taken.append(self.clock)
        if self.copies > 1:
            each = _label_bytes(self.profile) / _LABEL_MESSAGES
            self.advance(_LABEL_MESSAGES * self.machine.gather_seconds(each, self.copies), "embeddings")
        for at, work in self.before:
            self.run(at, work)
            if above and self.up and (work.kind, work.index, work.backward) == ("stage", self.stages[-1], False):
                if batch >= IN_FLIGHT:
                    self.wait(above.taken[batch - IN_FLIGHT], "neighbours")
                above.offered.append(self.clock)

    def end(self, above: _Worker | None) -> None:
        """Do the rest of a step, when what comes down is here."""
        if above and self.from_above:
            self.receive(self.from_above, above.told_below)
        for at, work in self.after:
            self.run(at, work)
        self.settle(len(self.pending))

    def run(self, at: int, work: Work) -> None:
        num_due = len(self.pending)
        self.advance(work.flops / self.machine.flops, "compute")
        if self.copies > 1:
            for channels in work.normed:
                self.advance(self.machine.gather_seconds(FLOAT * (2 * channels + 1), self.copies), "norms")
            for channels in work.norm_gradients:
                self.advance(self.machine.sum_seconds(FLOAT * 2 * channels, self.copies), "norms")
            for size in work.embeddings:
                self.advance(self.machine.gather_seconds(FLOAT * size, self.copies), "embeddings")
        if work.kind == "stage" and not work.backward:
            self.settle(num_due)  # added up while the stage ran forward
        if work.final:
            done = self.clock
            if self.copies > 1:
                self.wire = max(self.wire, self.clock) + self.machine.sum_seconds(FLOAT * work.final, self.copies)
                done = self.wire
            self.pending.append((done, work.final))
            # what is sent is a copy in one piece
            alive = sum(size for _, size in self.pending) + (work.final if self.copies > 1 else 0)
            self.largest = max(self.largest, alive)
            if self.copies == 1:
                self.settle(1)
        if at == self.last_before_telling:
            self.told_below = self.clock

    def settle(self, num: int) -> None:
        """Wait for the first gradients that are being added up, and let the optimiser use them."""
        due, self.pending = self.pending[:num], self.pending[num:]
        for done, size in due:
            self.wait(done, "gradients")
            # reads weights, gradients and state, writes weights and state
            self.advance(FLOAT * size * (3 + 2 * self.profile.state) / self.machine.memory, "updates")

    def memory(self) -> int:
        parameters = sum(self.profile.parameters[stage] for stage in self.stages)
        entering = IN_FLIGHT * self.from_below if self.stages.start else self.profile.image_bytes
        held = self.profile.held_by(self.stages)
        return FLOAT * (parameters * (1 + self.profile.state) + self.largest) + held + entering


def _steady(workers: Sequence[_Worker]) -> tuple[float, list[dict[str, float]]]:
    """Run batches until the pipeline is full, and as many again; return seconds per batch, and what took them."""
    num = 4 * len(workers) + 4 if len(workers) > 1 else 1
    marks: list[tuple[float, list[dict[str, float]]]] = []
    for batch in range(2 * num):
        for worker, above in zip(workers, [*workers[1:], None], strict=True):
            worker.begin(batch, above)
        for worker, above in reversed(list(zip(workers, [*workers[1:], None], strict=True))):
            worker.end(above)
        marks.append((max(worker.clock for worker in workers), [dict(worker.spent) for worker in workers]))
    (start, before), (stop, after) = marks[num - 1], marks[-1]
    spent = [{name: (a[name] - b[name]) / num for name in SPENT} for a, b in zip(after, before, strict=True)]
    return (stop - start) / num, spent
