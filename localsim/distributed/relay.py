"""What passes between processes that run different stages of one network: maps up, boundary gradients down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from localsim.data import Batch
from localsim.distributed.messages import Channel
from localsim.network import IMAGES, LocalNetwork
from localsim.signals import Signal


class Relay:
    """The links of a process that runs stages `stages` of a network (see `localsim.engine.Links`).

    A batch goes up as one message: the views' maps, labels, indices, and the images where a tap above reads them. At
    most two batches wait for the process above. Where the credit matrix reaches across the border, one message of
    merged signals comes down per step; where it does not, nothing does, and the process below is free to go on.

    Attributes:
        images: of every view of the present batch, where they enter or a tap here or above reads them.
        notes: what came or goes up with the present batch.

    Args:
        net: whose taps and credit say what is needed where.
        stages: those that run here.
        below, above: the processes that run the next stages, None at the ends.
        others: all processes that run other stages, with these.
    """

    def __init__(
        self,
        net: LocalNetwork,
        stages: range,
        below: Channel | None,
        above: Channel | None,
        others: Sequence[tuple[range, Channel]],
    ) -> None:
        self.net, self.stages, self.below, self.above = net, stages, below, above
        contexts = {tap.context for tap in net.taps if tap.stage in stages and tap.context is not None}
        self._makers = {stage: channel for run, channel in others for stage in sorted(contexts) if stage in run}
        self._readers = {made: [channel for run, channel in others if _reads(net, run, made)] for made in stages}
        self._images_above = any(tap.context == IMAGES and tap.stage >= stages.stop for tap in net.taps)
        self.images: list[Tensor] = []
        self._batch: tuple[Tensor | None, Tensor] | None = None
        self.notes: list[int] = []

    # -- batches -----------------------------------------------------------------------------------------------------

    def begin(self, batch: Batch, notes: Sequence[int]) -> None:
        """Say what goes up beside the maps of this step."""
        self._batch, self.notes = (batch.labels, batch.indices), list(notes)
        if self.below is None:
            self.images = list(batch.views)

    @property
    def start(self) -> int:
        """The stage that a batch enters here."""
        return self.stages.start

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over the batches that come from below; which ones, is decided there."""
        while self.below is not None:
            tensors, (num_views, labelled, *self.notes) = self.below.receive()
            views, rest = tensors[:num_views], tensors[num_views:]
            labels = rest.pop(0) if labelled else None
            indices = rest.pop(0).cpu()
            self.images = rest
            yield Batch(tuple(views), labels, indices)

    def on_stage(self, stage: int, outputs: list[Tensor], _alive: tuple[int, ...] = ()) -> None:
        """Engine hook: send a stage's maps to the processes that go on with them, or whose taps read them."""
        for channel in self._readers[stage]:
            channel.send(outputs)
        if stage == self.stages.stop - 1 and self.above is not None:
            assert self._batch is not None
            labels, indices = self._batch
            beside = [*([] if labels is None else [labels]), indices.to(outputs[0].device)]
            images = self.images if self._images_above else []
            self.above.send([*outputs, *beside, *images], [len(outputs), labels is not None, *self.notes])

    # -- the engine's links ------------------------------------------------------------------------------------------

    def context(self, stage: int) -> list[Tensor]:
        """Return for every view the images, or the output of a stage that runs above."""
        return self.images if stage == IMAGES else self._makers[stage].receive()[0]

    def receive_signals(self) -> list[Signal]:
        """Return the signals that come down to the highest stage here, one gradient per view each."""
        assert self.above is not None
        (rows, *views), _ = self.above.receive()
        return [Signal(row.cpu().numpy(), [view[n] for view in views]) for n, row in enumerate(rows)]

    def send_signals(self, signals: list[Signal]) -> None:
        """Send down the signals for the highest stage of the process below."""
        assert self.below is not None
        device = signals[0].grads[0].device  # all that is in a message arrives there
        rows = torch.stack([torch.from_numpy(signal.row.copy()) for signal in signals]).to(device)
        views = zip(*(signal.grads for signal in signals), strict=True)
        self.below.send([rows, *(torch.stack(view) for view in views)])

    # -- clean passes ------------------------------------------------------------------------------------------------

    def clean_maps(self) -> tuple[Tensor, Tensor | None]:
        """Return what comes from below of a pass without learning: the map, and the images if a tap reads them."""
        assert self.below is not None
        (maps, *images), _ = self.below.receive()
        return maps, images[0] if images else None

    def pass_clean(self, stage: int, maps: Tensor, images: Tensor | None) -> None:
        """Send on a stage's map of a pass without learning."""
        for channel in self._readers[stage]:
            channel.send([maps])
        if stage == self.stages.stop - 1 and self.above is not None:
            self.above.send([maps, *([images] if self._images_above and images is not None else [])])

    def clean_contexts(self) -> dict[int, Tensor]:
        """Return the maps of stages above that taps here read, of a pass without learning."""
        return {stage: channel.receive()[0][0] for stage, channel in self._makers.items()}


def _reads(net: LocalNetwork, run: range, made: int) -> bool:
    return any(tap.stage in run and tap.context == made for tap in net.taps)
