"""All processes of a run, and this one's part in it: which rows of a batch, which stages, and whether it writes.

Rank 0 has the top stages and the first rows. It alone writes the run folder: a line of metrics and a checkpoint need
all stages, and the top ones are done last.
"""

# torch documents its stores and rendezvous, exported or not
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from localsim.distributed import parts
from localsim.distributed.faults import ErrorOf, Words, in_a_sentence, is_loss, said_elsewhere, within
from localsim.distributed.launch import Place, find_place
from localsim.distributed.messages import MOST_TENSORS, Channel, exchange, packed, unpacked
from localsim.distributed.norms import divide
from localsim.distributed.peers import Peers
from localsim.errors import ProcessLost, UserError, one_of
from localsim.placement import place_stages, stage_costs
from localsim.stopping import speak_first

if TYPE_CHECKING:
    from localsim.config import Config
    from localsim.data import Batch
    from localsim.distributed.relay import Relay
    from localsim.network import LocalNetwork

TIMEOUT_SECONDS = 600.0
MOST_VIEWS = (MOST_TENSORS - 2) // 2
"""Of which maps and images, with labels and indices, are one message."""


class Team:
    """The processes of a run; one process is a team of its own.

    Attributes:
        rank, size: this process among all.
        stages: those that run here; none before `take_part`.
        copy, copies: which of the shares of every batch is here, of how many.
        peers: the processes with the other rows of the batch, where it is divided.
        relay: the links to processes with other stages, where there are any.
    """

    def __init__(self, place: Place | None = None, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.place = place or Place(0, 1, 0)
        self.rank, self.size, self.timeout_seconds = self.place.rank, self.place.size, timeout_seconds
        self.groups: tuple[range, ...] | None = None
        self.copy, self.copies = 0, 1
        self.peers: Peers | None = None
        self.relay: Relay | None = None
        self.stages = range(0)
        self.words = Words(self.rank, self.size, timeout_seconds)
        self._agreed = False, False
        self._channels: list[Channel] = []

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Return the device of this process: of several on a host each has a GPU of its own."""
        if self.alone or not (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
            return name
        return f"cuda:{self.place.local_rank % max(1, torch.cuda.device_count())}"

    # -- who does what -----------------------------------------------------------------------------------------------

    def arrange(self, config: Config, num_stages: int) -> None:
        """Decide which share of the batch and which stages are this process's; nothing is said to the others.

        Raises:
            UserError: the configuration cannot be run on so many processes.
        """
        num_groups = stage_groups(config.parallel, self.size, num_stages)
        self.copies = self.size // num_groups
        self.copy = self.rank % self.copies
        if self.alone:
            return
        if config.batch_size < 2 * self.copies:
            raise UserError(
                f"batch_size is {config.batch_size}; allowed on {self.copies} shares: {2 * self.copies} or more"
            )
        for setting, unusable, why in (
            ("compile", config.compile, "what is compiled cannot ask other processes"),
            ("feature_cache", config.feature_cache, "the cache is one process's"),
        ):
            if unusable:
                raise UserError(f"{setting} True cannot be had on {self.size} processes: {why}")
        if num_groups > 1:
            if config.schedule == "sequential":
                raise UserError("schedule sequential leaves nothing to do side by side; allowed: --parallel data")
            if config.views > MOST_VIEWS:
                raise UserError(f"views is {config.views}; allowed under {config.parallel}: {MOST_VIEWS} or less")
            self.groups = place_stages(stage_costs(config, self.copies), num_groups)

    def describe(self) -> list[str]:
        """Return what a run says of its processes, as no line or some."""
        if self.alone:
            return []
        share = f"1 in {self.copies} images of every batch" if self.copies > 1 else "every image"
        if self.groups is None:
            return [f"processes: {self.size}, each with all stages and {share}"]
        told = [f"stages {run.start + 1} to {run.stop}" if len(run) > 1 else f"stage {run.stop}" for run in self.groups]
        return [f"processes: {self.size}, each with {share}; by place: {'; '.join(told)}"]

    def take_part(self, net: LocalNetwork) -> None:
        """Join the others: make the groups and links, and leave only this process's stages in memory.

        Raises:
            UserError: a head needs the weights of a stage that runs elsewhere, direct feedback begins where nothing is
                trained, or a layer cannot be divided.
        """
        from localsim.distributed.relay import Relay

        self.stages = range(len(net.stages))
        if self.alone:
            return
        groups = self.groups or (self.stages,)
        for tap in net.taps:
            if hasattr(tap.head, "end_step") and tap.stage + 1 in [group.start for group in groups]:
                raise UserError(
                    f"the head on stage {tap.stage + 1} follows the weights of the stage above, which would run "
                    "elsewhere; allowed: --parallel data, or fewer processes"
                )
        for group in groups if net.transport == "direct_feedback" else ():
            trains = any(p.requires_grad for stage in group for p in net.stages[stage].parameters())
            if net.credit.crossing(group.start) and not trains:
                raise UserError(
                    f"stages {group.start + 1} to {group.stop} have nothing to train, and direct feedback sends "
                    "nothing down from there; allowed: --parallel data, or fewer processes"
                )
        # ranks count from the top stages down, so that the process that writes has the top ones
        row = self.rank // self.copies
        here = len(groups) - 1 - row
        if self.copies > 1:
            rows = [list(range(n * self.copies, (n + 1) * self.copies)) for n in range(len(groups))]
            # not those of a DeviceMesh: they wait for half an hour, whatever the time-out of the run
            timeout = timedelta(seconds=self.timeout_seconds)
            # gloo tries five times to connect with a process that has died meanwhile
            now, late = within(
                self.timeout_seconds,
                lambda: [[dist.new_group(ranks, timeout=timeout) for ranks in rows] for _ in range(2)],
                "the groups of processes that share a batch",
            )
            self.peers = Peers(now[row], late[row], self.copy, self.copies)
            divide(net, self.peers)
        if len(groups) > 1:
            self.stages = groups[here]
            ranks = [(len(groups) - 1 - n) * self.copies + self.copy for n in range(len(groups))]
            others = {n: Channel(rank, net.device) for n, rank in enumerate(ranks) if n != here}
            self.relay = Relay(
                net,
                groups[here],
                others.get(here - 1),
                others.get(here + 1),
                [(groups[n], c) for n, c in others.items()],
            )
            # what is packed travels through the CPU
            self._lower = [Channel(rank, torch.device("cpu")) for rank in ranks[:-1]]
            self._writer = Channel(ranks[-1], torch.device("cpu"))
            self._channels = [*others.values(), self._writer]
            parts.keep_only(net, groups[here])

    # -- agreements --------------------------------------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Go on behind the block only if it went well on all processes; if not, fail on all, each with one sentence."""
        if self.alone:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
            speak_first()
        try:
            said = exchange("" if failure is None else str(failure) or type(failure).__name__, self.size)
        except RuntimeError as error:
            if failure is not None and not is_loss(failure):
                raise failure from None
            raise self.words.loss(error) from None
        first = next((rank for rank, text in enumerate(said) if text), None)
        if failure is not None:
            # one of those that failed alike says so
            vars(failure)["said_elsewhere"] = first != self.rank and said[first or 0] == said[self.rank]
            raise failure
        if first is not None:
            speak_first()
            raise said_elsewhere(UserError(f"process {first} of {self.size}: {said[first]}"))

    def begin(self, batch: Batch, stop: bool, late: bool) -> int:
        """Begin a step: agree on what happens after it; return how many images all processes together have in it.

        Args:
            batch: this process's share, or what came of it from below.
            stop: whether this process was asked to stop.
            late: whether its clock says that a checkpoint is due; that of the first share counts.
        """
        if self.relay is not None and self.relay.below is not None:  # where batches enter is decided for all
            if stop:
                self.words.ask(lambda store: store.set("stop", "asked"))
            agreed = self.relay.notes[0], self.relay.notes[1]
        else:
            stop = stop or (self.relay is not None and self.words.ask(lambda store: store.check(["stop"])))
            agreed = int(stop), int(late and self.copy == 0)
        total = num_images = len(batch.indices)
        if self.peers is not None:
            rows = self.peers.begin(num_images, *agreed, device=torch.device("cpu"))
            agreed = max(row[0] for row in rows), max(row[1] for row in rows)
            total = sum(self.peers.counts)
        if self.relay is not None:
            self.relay.begin(batch, agreed)
        self._agreed = bool(agreed[0]), bool(agreed[1])
        return total

    def agreed(self, stop: bool, late: bool) -> tuple[bool, bool]:
        """Return whether all processes stop after this step, and whether all keep a checkpoint.

        A process alone does what it is asked at once; several do what they agreed on when the step began.
        """
        return (stop, late) if self.alone else self._agreed

    def same_step(self, step: int) -> int:
        """Return the step from which the writing process goes on."""
        return step if self.alone else exchange(step, self.size)[0]

    # -- what the writing process collects ---------------------------------------------------------------------------

    def collect(self, part: dict[str, Any]) -> list[tuple[range, dict[str, Any]]] | None:
        """Return what the processes with other stages have, from the lowest up, where the run folder is written.

        On all others, which send their part and go on, None.
        """
        if self.relay is None:
            return [(self.stages, part)] if self.writes else None
        if self.copy:
            return None
        if not self.writes:
            self._writer.send([packed(part)])
            return None
        told = [unpacked(channel.receive()[0][0]) for channel in self._lower]
        assert self.groups is not None
        return list(zip(self.groups, [*told, part], strict=True))

    def quiet(self, error: ErrorOf) -> ErrorOf:
        """Return an error that all processes raise alike, to be printed by the writing one alone."""
        return error if self.writes else said_elsewhere(error)

    def everyones(self, values: list[str]) -> list[str]:
        """Return what all processes listed, each once, in order."""
        lists = [values] if self.alone else exchange(values, self.size)
        return sorted({value for told in lists for value in told})

    def finish(self) -> None:
        """Wait until nobody needs this process any more."""
        if self.alone:
            return
        for channel in self._channels:
            channel.flush()
        dist.barrier()

    # -- what goes wrong ---------------------------------------------------------------------------------------------

    @contextmanager
    def watched(self, path: Path) -> Iterator[None]:
        """Tell the others when this process fails in the block, and say it in a sentence when another is gone.

        Args:
            path: the run folder.

        Raises:
            ProcessLost: another process is gone, or has not answered within the time-out.
            TrainingFailed: a process that reads images is gone, or the disk does not take what is written.
        """
        self.words.path = path
        try:
            yield
        except ProcessLost:
            raise
        except Exception as error:
            if not self.alone and is_loss(error):
                raise self.words.loss(error) from None
            failure = in_a_sentence(error, path)
            if not self.alone:
                self.words.tell(failure)
            if failure is error:
                raise
            raise failure from error


_joined = 0


@contextmanager
def join(timeout_seconds: float | None = None) -> Iterator[Team]:
    """Join the other processes of the run, if torchrun or srun started several, and leave them at the end.

    Args:
        timeout_seconds: the longest that anything waits for another process; by default `TIMEOUT_SECONDS`.

    Raises:
        UserError: the variables of the environment are incomplete, or the others do not come.
    """
    global _joined
    place = find_place()
    if place is None:
        yield Team()
        return
    seconds = TIMEOUT_SECONDS if timeout_seconds is None else float(timeout_seconds)
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    team = Team(place, seconds)
    timeout = timedelta(seconds=seconds)
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", place.rank, place.size, timeout=timeout)))
        _joined += 1
        # a second run of the same processes must not find what the first one left
        team.words.store = dist.PrefixStore(f"localsim-{_joined}", store)
        kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        begin = partial(
            dist.init_process_group, kind, store=team.words.store, rank=rank, world_size=size, timeout=timeout
        )
        within(seconds, begin, "the group of all processes")
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {place.rank} of {place.size} did not find the others within {seconds:g} s "
            f"({str(error).splitlines()[0][:200]})"
        ) from None
    try:
        yield team
    finally:
        # what holds a group keeps its connections open, and with them the others waiting; layers and the frames of an
        # error may hold the peers longer
        if team.peers is not None:
            team.peers.group = team.peers.late_group = None
        team.peers = team.relay = None
        team._channels, team._lower = [], []
        with suppress(RuntimeError):
            dist.destroy_process_group()
        gc.collect()
        team.words.leave()


def stage_groups(parallel: str, processes: int, num_stages: int) -> int:
    """Return over how many processes the stages are spread, under `data`, `blocks` or `blocks:P`.

    `blocks` is as many as there are processes, at most one per stage; what is left over divides the batch.

    Raises:
        UserError: another word, or processes that cannot be divided so.
    """
    match = re.fullmatch(r"blocks(?::([1-9]\d*))?", parallel)
    if parallel == "data":
        return 1
    if match is None:
        raise one_of("parallel", parallel, ("data", "blocks", "blocks:P (a number of processes)"))
    if processes == 1:
        raise UserError(
            f"parallel {parallel} needs several processes; start them with torchrun --nproc-per-node N -m localsim "
            "run ..., or let one go on with --parallel data"
        )
    groups = int(match[1]) if match[1] else min(processes, num_stages)
    if groups > num_stages or processes % groups:
        allowed = [n for n in range(1, num_stages + 1) if processes % n == 0]
        raise UserError(
            f"parallel {parallel} cannot divide {num_stages} stages among {processes} processes; "
            f"allowed: blocks:P with P of {', '.join(map(str, allowed))}"
        )
    return groups
