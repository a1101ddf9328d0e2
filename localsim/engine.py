"""One learning step: forward stage by stage, and every tap's gradient routed exactly as far as the credit matrix says.

Each stage runs on a detached leaf, so its graph is a segment of its own. A tap turns its stage's output into a loss and
yields a boundary gradient, a *signal*, which vector-Jacobian products (VJPs) carry down segment by segment:

- the parameter VJP of a segment runs once, on the credit-weighted sum of all its signals (a VJP is linear);
- the input VJP runs once per group of signals whose remaining rows of C are proportional, and computes no parameter
  gradients; when one group is all there is, both VJPs are one call;
- a segment is freed as soon as no later tap can reach it. Its gradients are then final, and it may be updated.

This file is the only place that cuts the graph between stages; `localsim.transport` says how a gradient crosses a
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from localsim.distributed.peers import Peers
from localsim.errors import UserError
from localsim.hooks import Hooks, Links
from localsim.network import IMAGES, Embedding, LocalNetwork, Tap, tensors_of
from localsim.precision import at_least_float32, autocast
from localsim.rng import keyed
from localsim.signals import Signal, merged, summed
from localsim.transport import direct_reads


@dataclass
class _Segment:
    """The graph of one stage: leaf inputs and outputs for every view, and the signals that arrived at its top.

    Under direct feedback `outputs` are what the stage's layers feed to the error, none where all are frozen, and
    signals pass by the stage.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    parameters: list[nn.Parameter]
    signals: list[Signal] = field(default_factory=list)


def backward(
    net: LocalNetwork,
    *views: Tensor,
    labels: Tensor | None = None,
    key: int | None = None,
    eager: bool = True,
    precision: str = "full",
    hooks: Hooks | None = None,
    taps: Sequence[int] | None = None,
    start: int = 0,
    stop: int | None = None,
    peers: Peers | None = None,
    links: Links | None = None,
) -> dict[int, Tensor]:
    """Run one forward pass of every view and add to every `.grad` what the credit matrix allows.

    For stage i: `grad_i += sum_t C[t, i] dL_t/dtheta_i`; for the readout and head of tap t: `grad += dL_t/dparameter`.
    Views pass each stage one after the other, so batch norm sees each view alone and moves its running statistics once
    per view.

    Args:
        net: the network; its mode (train or eval) is left as it is.
        views: one or more views of the same images, each `(batch, 3, height, width)`.
        labels: `(batch,)` class indices for objectives that use them.
        key: names the step's random draws (noise, dropout, negatives). None draws one from torch's default generator.
        eager: route and free as early as the matrix allows. False keeps all graphs until every loss is known; the
            gradients are the same bits.
        precision: `full` runs in the dtype of the weights; `bf16` runs stages, readouts and heads under bfloat16
            autocast. Objectives are computed in float32 (float64 for float64 weights) either way.
        hooks: see `Hooks`.
        taps: indices of the taps that act; by default all. The others are not computed, and no stage above the last
            one that the acting taps need is run.
        start: the stage that the views enter. Above 0 they are outputs of the stage below it, which the acting taps
            must not reach, unless there are links.
        stop: run the stages below this one only, with their taps; the others run elsewhere, at the ends of the links.
        peers: the processes among which the batch is divided: views and labels are this one's rows. Losses are those of
            the whole batch, gradients add up over all processes; `localsim.distributed.norms.divide` has told `net`.
        links: to the processes that run the stages below `start` and from `stop` on.

    Returns:
        The detached loss of every acting tap whose stage runs here, by its index in `net.taps`.

    Raises:
        UserError: no view was given, the precision is unknown, or an acting tap needs what is below `start`.
    """
    if not views:
        raise UserError("engine.backward needs at least one view of the images")
    if key is None:
        key = int(torch.randint(2**62, ()))
    acting = range(len(net.taps)) if taps is None else sorted(taps)
    if len(set(acting)) != len(acting) or not set(acting) <= set(range(len(net.taps))):
        raise UserError(f"taps {list(acting)} cannot act; allowed: each at most once of 0 to {len(net.taps) - 1}")
    above = len(net.stages) if taps is None else 1 + max((net.taps[tap].fires for tap in taps), default=start - 1)
    above = min(above, len(net.stages) if stop is None else stop)
    step = _Step(net, labels, key, precision, hooks or Hooks(), acting, (start, above), peers, links)
    inputs = step.enter(views)
    for now in range(start, above):
        inputs = step.run_stage(now, inputs)
        step.settle()
        if eager:
            step.fire(now)
            step.route(now)
            step.tell(now)
    if not eager:
        for now in range(start, above):
            step.fire(now)
            step.route(now)
            step.tell(now)
    if links is not None:
        step.hear(links)
    step.settle()
    return step.losses


class _Step:
    """The state of one step: living segments, outputs that taps still wait for, and the losses so far."""

    def __init__(
        self,
        net: LocalNetwork,
        labels: Tensor | None,
        key: int,
        precision: str,
        hooks: Hooks,
        taps: Sequence[int],
        here: tuple[int, int],
        peers: Peers | None,
        links: Links | None,
    ) -> None:
        self.net = net
        self.peers = peers
        self.links = links
        self.labels = labels if labels is None or peers is None else peers.gather_rows(labels)
        self.key = key
        self.hooks = hooks
        self.start, self.stop = start, stop = here
        self.direct = net.transport == "direct_feedback"
        self.autocast = autocast(precision, net.device.type)
        self.credit = net.credit.only(taps)
        acting = {index: net.taps[index] for index in taps}
        reads_below = any(tap.stage < start or tap.context == IMAGES for tap in acting.values())
        if start and links is None and (reads_below or self.credit.matrix[:, :start].any()):
            raise UserError(f"a tap needs what is below stage {start + 1}, where the views enter")
        self.last_use = self.credit.last_use([tap.fires for tap in acting.values()])
        self.waiting = {index: tap for index, tap in acting.items() if start <= tap.stage < stop}
        self.alive: dict[int, _Segment] = {}
        self.held: dict[int, list[Tensor]] = {}
        crossing = [acting[tap].fires for tap in net.credit.crossing(start) if tap in acting]
        # maps for taps below go the same way as signals, and are waited for first
        maps_down = [tap.fires for tap in acting.values() if tap.stage < start <= tap.fires < stop]
        self.tell_after = max(crossing + maps_down) if crossing and links is not None else None
        self.going_down: list[Signal] = []
        self.adding_up: list[tuple[list[nn.Parameter], Callable[[], list[Tensor | None]]]] = []
        self.losses: dict[int, Tensor] = {}

    # -- forward -----------------------------------------------------------------------------------------------------

    def enter(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Return what the first stage to run sees of the views."""
        sees_images = any(tap.context == IMAGES for tap in self.waiting.values())
        if self.start:
            if sees_images and self.links is not None:
                self.held[IMAGES] = self.links.context(IMAGES)
            return list(views)
        if sees_images:
            self.held[IMAGES] = [view.detach() for view in views]
        return [self.net.fold(view) for view in views]

    def run_stage(self, stage: int, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run one stage on all views; return its detached outputs, the next stage's inputs."""
        module = self.net.stages[stage]
        goes_below = not self.direct and any(
            tap_stage >= stage and row[:stage].any()
            for tap_stage, row in zip(self.credit.taps, self.credit.matrix, strict=True)
        )
        leaves = [x.detach().requires_grad_(goes_below) for x in inputs]
        outputs, reads = [], []
        # one autocast for all views, which then share the casts of the weights (and, as everywhere under autocast where
        # weights are shared, the views' gradients are added in the lower precision)
        with torch.set_grad_enabled(self.last_use[stage] >= 0), self.autocast():
            for view, leaf in enumerate(leaves):
                with keyed(self.key, "stage", stage, view, device=self.net.device), direct_reads() as read:
                    outputs.append(module(leaf))
                    reads.append(read)
        if self.last_use[stage] >= 0:
            tops = [_per_image(read, self.net) for read in reads if read] if self.direct else outputs
            self.alive[stage] = _Segment(leaves if goes_below else [], tops, _trainable(module))
        detached = [out.detach() for out in outputs]
        if any(stage in (tap.stage, tap.context) for tap in self.waiting.values()):
            self.held[stage] = detached
        if self.hooks.on_stage:
            self.hooks.on_stage(stage, detached, tuple(self.alive))
        return detached

    # -- taps --------------------------------------------------------------------------------------------------------

    def fire(self, now: int) -> None:
        """Compute the losses that become possible after stage `now`, and forget the maps that no other waits for."""
        for tap_index, tap in list(self.waiting.items()):
            if tap.fires == now:
                del self.waiting[tap_index]
                self.fire_tap(tap_index, tap)
        for stage in list(self.held):
            if not any(stage in (tap.stage, tap.context) for tap in self.waiting.values()):
                del self.held[stage]

    def fire_tap(self, index: int, tap: Tap) -> None:
        """Compute one tap's loss, add its own gradients, and leave its signal at the top of its stage's segment."""
        row = self.net.credit.matrix[index, : tap.stage + 1]
        # under direct feedback the error has their shape, and without any there is nothing for it to change
        heard = [out for segment in self.alive.values() for out in segment.outputs]
        wanted = bool(row.any() and heard)
        parameters = _trainable(tap)
        contexts = [None] * len(self.held[tap.stage]) if tap.context is None else self.held[tap.context]
        reads = [h.detach().requires_grad_(wanted) for h in self.held[tap.stage]]
        with self.autocast():
            embeddings = tap.embed_views(
                reads, contexts, lambda view: keyed(self.key, "tap", index, view, device=self.net.device)
            )
        embeddings = [_each(at_least_float32, z) for z in embeddings]
        if self.peers is not None and any(tensors_of(z)[0].dim() < 2 for z in embeddings):
            raise UserError("the head of a tap gives one number per image; a batch that is divided needs rows, (n, d)")
        everyones = [_each(self.of_all_images, z) for z in embeddings]
        with keyed(self.key, "objective", index, device=self.net.device):
            loss = tap.objective(tuple(everyones), self.labels)
        self.losses[index] = loss.detach()
        if self.hooks.on_tap:
            self.hooks.on_tap(index, tuple(_each(Tensor.detach, z) for z in everyones), loss.detach())
        errors = [tensors_of(z) for z in embeddings] if self.direct else [[read] for read in reads]
        signalled = [x for parts in errors for x in parts if x.requires_grad] if wanted else []
        targets = [*signalled, *parameters]
        if not targets:
            return
        # all processes compute the same loss, and add up their gradients of it: each has an equal part in it
        part = loss if self.peers is None else loss / self.peers.size
        grads = torch.autograd.grad(part, targets, allow_unused=True)
        if wanted:
            found = iter(grads)
            signal = [[_or_zeros(next(found) if x.requires_grad else None, x) for x in parts] for parts in errors]
            joined = [_joined(g, heard[0]) if self.direct else g[0] for g in signal]
            self.alive[tap.stage].signals.append(Signal(row, joined))
            grads = grads[len(signalled) :]
        self.finish(parameters, grads)

    def of_all_images(self, z: Tensor) -> Tensor:
        """Return what a head gave for the whole batch; what has no row per image is the same on every process."""
        return z if self.peers is None or z.dim() < 2 else self.peers.gather(z, alike=True)

    # -- credit routing ----------------------------------------------------------------------------------------------

    def route(self, now: int) -> None:
        """Retire every segment that no tap after stage `now` can reach, sending down the signals that this takes."""
        retiring = [stage for stage in self.alive if self.last_use[stage] <= now]
        for stage in sorted(self.alive, reverse=True):
            if stage in retiring:
                self.retire(stage)
            else:
                self.send(stage, for_stages_up_to=max((r for r in retiring if r < stage), default=-1))

    def send(self, stage: int, for_stages_up_to: int) -> None:
        """Carry down, through a segment that stays alive, the signals that the retiring stages below wait for."""
        segment = self.alive[stage]
        moving = [s for s in segment.signals if not s.sent and s.row[: for_stages_up_to + 1].any()]
        for group in merged(moving, stage):
            if self.direct:
                grads: Sequence[Tensor] = group.grads
            else:
                grads = torch.autograd.grad(segment.outputs, segment.inputs, group.grads, retain_graph=True)
            self.pass_down(stage, group, grads)
        for signal in moving:
            signal.sent = True

    def retire(self, stage: int) -> None:
        """Give a segment its parameter gradients, send its remaining signals down, and free its graph."""
        segment = self.alive.pop(stage)
        whole = merged(segment.signals, stage + 1)
        if len(whole) == 1 and not any(signal.sent for signal in segment.signals):
            jobs = [(whole[0], whole[0].row[stage], whole[0].row[:stage].any())]
        else:
            here = [s for s in segment.signals if s.row[stage] > 0]
            below = [s for s in segment.signals if not s.sent and s.row[:stage].any()]
            jobs = [(group, 0.0, True) for group in merged(below, stage)]
            if here:
                jobs.append((summed(here, stage), 1.0, False))
        parameter_grads: Sequence[Tensor | None] = [None] * len(segment.parameters)
        for number, (signal, weight, goes_below) in enumerate(jobs):
            inputs = segment.inputs if goes_below else []
            if goes_below and self.direct:
                self.pass_down(stage, signal, signal.grads)
            targets = [*inputs, *(segment.parameters if weight > 0 else [])]
            if not targets:
                continue
            grads = torch.autograd.grad(
                segment.outputs, targets, signal.grads, retain_graph=number + 1 < len(jobs), allow_unused=True
            )
            if inputs:
                self.pass_down(stage, signal, [_or_zeros(g, x) for x, g in zip(inputs, grads, strict=False)])
            if weight > 0:
                own = grads[len(inputs) :]
                parameter_grads = own if weight == 1 else [None if g is None else g * weight for g in own]
        self.finish(segment.parameters, parameter_grads)

    def pass_down(self, stage: int, signal: Signal, grads: Sequence[Tensor]) -> None:
        """Leave a signal that has crossed a stage at the top of the one below, wherever that runs."""
        arriving = self.going_down if stage == self.start else self.alive[stage - 1].signals
        arriving.append(Signal(signal.row[:stage], list(grads)))

    def tell(self, now: int) -> None:
        """Send on the signals for the stages below `start`, once no tap that has a part in them is still to fire.

        Args:
            now: the stage that has run; the number of stages when those above `stop` have said all they have to say.
        """
        if self.links is None or self.tell_after is None or now < self.tell_after:
            return
        for stage in sorted(self.alive, reverse=True):
            self.send(stage, for_stages_up_to=self.start - 1)
        self.links.send_signals(merged(self.going_down, self.start))
        self.tell_after = None

    def hear(self, links: Links) -> None:
        """Complete the step with what comes from the stages above `stop`."""
        for above in sorted({tap.fires for tap in self.waiting.values()}):
            self.held[above] = links.context(above)
            self.fire(above)
        if self.credit.signals_down(self.stop):
            self.alive[self.stop - 1].signals += links.receive_signals()
        self.route(len(self.net.stages))
        self.tell(len(self.net.stages))

    def finish(self, parameters: list[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
        """Give parameters their final gradients, at once or when those of all processes have been added up."""
        if self.peers is None:
            self.give(parameters, grads)
        elif any(grad is not None for grad in grads):
            self.adding_up.append((parameters, self.peers.start_sum(grads)))

    def settle(self) -> None:
        """Wait for the gradients that are being added up."""
        for parameters, wait in self.adding_up:
            self.give(parameters, wait())
        self.adding_up = []

    def give(self, parameters: list[nn.Parameter], grads: Sequence[Tensor | None]) -> None:
        """Add final gradients to `.grad` and say so."""
        for parameter, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                grad = _laid_out_as(parameter, grad)
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        if self.hooks.on_final and any(grad is not None for grad in grads):
            self.hooks.on_final(parameters)


def _laid_out_as(parameter: nn.Parameter, grad: Tensor) -> Tensor:
    """Return the gradient in its parameter's memory order, which fused optimisers take for granted without a check."""
    same = all(a == b or n == 1 for a, b, n in zip(grad.stride(), parameter.stride(), grad.shape, strict=True))
    return grad if same else torch.empty_like(parameter, dtype=grad.dtype).copy_(grad)


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad


def _each(function: Callable[[Tensor], Tensor], z: Embedding) -> Embedding:
    return function(z) if isinstance(z, Tensor) else tuple(function(part) for part in z)


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return the error of every image as one vector, with zeros up to the width of the taps' widest error."""
    error = torch.cat([part.flatten(1) for part in parts], dim=1).to(like.dtype)
    return nn.functional.pad(error, (0, like.shape[1] - error.shape[1]))


def _per_image(reads: Sequence[Tensor], net: LocalNetwork) -> Tensor:
    """Return the sum of the layers' direct reads, over the patches of every image too."""
    return torch.stack(list(reads)).sum(0).unflatten(0, (-1, net.patches_per_image)).sum(1)
