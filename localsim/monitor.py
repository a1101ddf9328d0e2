"""Watching a run: is every stage learning, has one collapsed, is a loss still a number?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from localsim.distributed.peers import Peers
from localsim.distributed.relay import Relay
from localsim.errors import TrainingFailed, UserError
from localsim.network import IMAGES, Embedding, LocalNetwork, tensors_of
from localsim.precision import autocast

COLLAPSED_RANK = 1.1
COLLAPSED_SPREAD = 1e-3
PATIENCE = 3
CHECKED_IMAGES = 256


def effective_rank(x: Tensor) -> float:
    """Return the effective rank of features `(n, d)`: exp of the entropy of their normalised singular values.

        p_k = s_k / sum_j s_j of the centred features,    erank = exp(-sum_k p_k log p_k)

    Between 1 (all variance on one line) and min(n - 1, d); 0 if all rows are equal. Roy & Vetterli 2007, section 2.
    """
    x = x.double()
    centred = x - x.mean(0)
    gram = centred @ centred.T if len(x) <= x.shape[1] else centred.T @ centred
    # eigenvalues within rounding of the largest are noise of the Gram product, not directions; likewise those within
    # rounding of the features' own size, which the mean of equal rows leaves behind
    eigenvalues = torch.linalg.eigvalsh(gram)
    rounding = max(eigenvalues[-1].item() * 1e-12, x.square().sum().item() * 1e-26)
    values = eigenvalues[eigenvalues > rounding].sqrt()
    if len(values) == 0:
        return 0.0
    p = values / values.sum()
    return math.exp(-(p * p.log()).sum().item())


def relative_spread(z: Tensor) -> float:
    """Return how much embeddings `(n, d)` differ over the batch: rms deviation from their mean over their rms size."""
    z = z.double()
    size = z.square().mean().sqrt().item()
    return (z - z.mean(0)).square().mean().sqrt().item() / size if size > 0 else 0.0


class OnlineProbe:
    """A softmax classifier per stage, trained along on detached features: each batch is scored before it is learned.

    Features are the stage's map of the first view as it is in training, augmented and with boundary noise, averaged
    over positions and standardised over the batch. The accuracy lags behind that of a probe trained to convergence, and
    rules with and without noise cannot be compared by it; it shows the trend while a run goes on.
    """

    LEARNING_RATE = 0.05

    def __init__(self, num_stages: int, num_classes: int) -> None:
        self.num_classes = num_classes
        self.weights: list[Tensor | None] = [None] * num_stages
        self.hits = [0] * num_stages
        self.seen = [0] * num_stages

    def observe(self, stage: int, pooled: Tensor, labels: Tensor) -> None:
        """Score one batch of pooled features `(n, channels)`, then take one step of gradient descent on it."""
        x = F.pad(F.layer_norm(pooled.T, (len(pooled),)).T, (0, 1), value=1.0)  # a last feature of ones: the bias
        weights = self.weights[stage]
        if weights is None:
            weights = torch.zeros(x.shape[1], self.num_classes, device=x.device)
        elif len(weights) != x.shape[1]:
            raise UserError(f"the checkpoint's online probe of stage {stage + 1} is that of another network")
        logits = x @ weights
        self.hits[stage] += int((logits.argmax(1) == labels).sum())
        self.seen[stage] += len(labels)
        # the gradient of the mean cross-entropy of a softmax classifier
        error = logits.softmax(1) - F.one_hot(labels, self.num_classes)
        self.weights[stage] = weights - self.LEARNING_RATE * x.T @ error / len(labels)

    def flush(self) -> dict[int, float]:
        """Return the accuracy of every stage that was observed since the last call."""
        accuracy = {
            stage: hits / seen for stage, (hits, seen) in enumerate(zip(self.hits, self.seen, strict=True)) if seen
        }
        self.hits, self.seen = [0] * len(self.hits), [0] * len(self.seen)
        return accuracy


class Monitor:
    """Collects what the engine's hooks show, and what a clean pass shows, and turns it into one line of metrics."""

    def __init__(self, net: LocalNetwork, num_classes: int, *, stops: bool = True) -> None:
        self.stops = stops
        self.pooled = net.pooled
        self.peers: Peers | None = None  # processes with the other rows of every batch
        self.stage_names = [f"stage{i + 1}" for i in range(len(net.stages))]
        self.tap_names = tap_names(net)
        self.probe = OnlineProbe(len(net.stages), num_classes) if num_classes else None
        self.suspicions = [0] * len(net.taps)
        self.loss_sum = [0.0] * len(net.taps)
        self.num_steps = [0] * len(net.taps)
        self.step = 0
        self.labels: Tensor | None = None
        self.ranks: dict[str, float] = {}
        self.embedding_ranks: dict[str, float] = {}

    def start_step(self, step: int, labels: Tensor | None) -> None:
        """Say which step begins, counted from 1."""
        self.step, self.labels = step, None if labels is None else self._all_rows(labels)

    def on_stage(self, stage: int, outputs: list[Tensor], alive: tuple[int, ...]) -> None:
        """Engine hook: feed the online probe."""
        if self.probe is not None and self.labels is not None:
            self.probe.observe(stage, self._all_rows(self.pooled(outputs[0]).float()), self.labels)

    def on_tap(self, tap: int, embeddings: tuple[Embedding, ...], loss: Tensor) -> None:
        """Engine hook: add up the loss; TrainingFailed if it is not a number."""
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingFailed(
                f"the loss of tap {self.tap_names[tap]} is {value} at step {self.step}; a lower --lr may help"
            )
        self.loss_sum[tap] += value
        self.num_steps[tap] += 1

    def check(
        self,
        net: LocalNetwork,
        views: Tensor,
        precision: str = "full",
        taps: Sequence[int] | None = None,
        start: int = 0,
        relay: Relay | None = None,
    ) -> None:
        """Measure effective ranks on a clean pass, and stop a run that has collapsed.

        Boundary noise differs from image to image, so in training mode even a network that maps all images to one point
        shows as many dimensions as a healthy one. The pass is made in evaluation mode, on at most `CHECKED_IMAGES`.

        Args:
            net: its mode is put back afterwards, stage by stage.
            views: images, or outputs of stage `start - 1`.
            precision: of the pass.
            taps: those that act, by default all.
            start: the stage that `views` enter.
            relay: the links to the processes that run the other stages; `views` do not matter where it is not the
                lowest.

        Raises:
            TrainingFailed: a tap's embeddings have collapsed at this and the two checks before (unless the monitor was
                told to go on), or are not finite.
        """
        taps = range(len(net.taps)) if taps is None else taps
        # what was suspected of a tap that no longer acts must not keep the others from their checkpoints
        self.suspicions = [count if tap in taps else 0 for tap, count in enumerate(self.suspicions)]
        modes = [(module, module.training) for module in (net, *net.stages)]
        net.eval()
        with torch.no_grad(), autocast(precision, net.device.type)():
            images: Tensor | None = views
            if relay is not None and relay.below is not None:
                views, images = relay.clean_maps()
            else:
                views = views[: self._checked_rows(len(views)) * (net.patches_per_image if start else 1)]
                images = views
            here = range(start, len(net.stages)) if relay is None else relay.stages
            highest = max((net.taps[tap].fires for tap in taps), default=start - 1)
            # spread over processes, all stages run: those above wait for each other
            needed = range(start, 1 + highest) if relay is None else here
            outputs: dict[int, Tensor] = {} if images is None else {IMAGES: images}
            for stage, out in zip(needed, net.stage_outputs(views, start), strict=False):
                outputs[stage] = out
                if relay is not None:
                    relay.pass_clean(stage, out, images)
            seen = [stage for stage in outputs if stage != IMAGES and stage <= highest]
            if relay is not None:
                outputs |= relay.clean_contexts()
            embeddings = {
                tap: self._checked(tensors_of(net.taps[tap].embed(outputs))[0].flatten(1).float())
                for tap in taps
                if net.taps[tap].stage in here
            }
        for module, mode in modes:
            module.train(mode)
        for index, z in embeddings.items():
            if not z.isfinite().all():
                raise TrainingFailed(
                    f"the embeddings of tap {self.tap_names[index]} are not finite after step {self.step}"
                )
        self.ranks = {
            self.stage_names[stage]: effective_rank(self._checked(net.pooled(outputs[stage]))) for stage in seen
        }
        self.embedding_ranks = {}
        for index, z in embeddings.items():
            name, rank, spread = self.tap_names[index], effective_rank(z), relative_spread(z)
            self.embedding_ranks[name] = rank
            # the logits of two classes lie on a line where they are right
            two_logits = z.shape[1] == 2 and getattr(net.taps[index].objective, "needs_labels", False)
            collapsed = (rank < COLLAPSED_RANK and not two_logits) or spread < COLLAPSED_SPREAD
            self.suspicions[index] = self.suspicions[index] + 1 if collapsed and self.stops else 0
            if self.suspicions[index] >= PATIENCE:
                raise TrainingFailed(
                    f"tap {name} has collapsed at step {self.step}: its embeddings of different images differ by "
                    f"{spread:.1e} of their size and have effective rank {rank:.2f} of {z.shape[1]} "
                    "(--set on_collapse=continue trains on)"
                )

    def _all_rows(self, x: Tensor) -> Tensor:
        return x if self.peers is None else self.peers.gather(x)

    def _checked_rows(self, num: int) -> int:
        """Return how many of this process's `num` images are among those looked at; one at least, to be looked away."""
        return min(CHECKED_IMAGES, num) if self.peers is None else max(1, self._among_checked())

    def _among_checked(self) -> int:
        assert self.peers is not None
        return min(max(0, CHECKED_IMAGES - self.peers.first_image), self.peers.counts[self.peers.rank])

    def _checked(self, x: Tensor) -> Tensor:
        """Return the entries of all images that are looked at, whichever process has them."""
        return x if self.peers is None else self.peers.gather_rows(x[: self._among_checked()])

    @property
    def healthy(self) -> bool:
        """Whether no tap is under suspicion of collapse: only then is a checkpoint worth keeping."""
        return not any(self.suspicions)

    def flush(self) -> dict[str, Any]:
        """Return the mean loss since the last call, the latest ranks, and the online probe's accuracy.

        Taps that did not act and stages that were not run are left out.
        """
        losses = zip(self.tap_names, self.loss_sum, self.num_steps, strict=True)
        row: dict[str, Any] = {
            "loss": {name: total / steps for name, total, steps in losses if steps},
            "effective_rank": dict(self.ranks),
            "embedding_rank": dict(self.embedding_ranks),
        }
        if self.probe is not None:
            row["online_probe"] = {self.stage_names[stage]: share for stage, share in self.probe.flush().items()}
        self.loss_sum = [0.0] * len(self.tap_names)
        self.num_steps = [0] * len(self.tap_names)
        return row

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to write the same lines."""
        probe = self.probe
        return {
            "probe": None if probe is None else [list(probe.weights), list(probe.hits), list(probe.seen)],
            "suspicions": list(self.suspicions),
            "loss_sum": list(self.loss_sum),
            "num_steps": list(self.num_steps),
        }

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Take up the state that `state` returned; UserError if it is none of this network's."""
        if not self._fits(state):
            raise UserError("it is not the state of a monitor of this network")
        self.suspicions, self.loss_sum = list(state["suspicions"]), list(state["loss_sum"])
        self.num_steps = list(state["num_steps"])
        if self.probe is not None and state["probe"] is not None:
            weights, self.probe.hits, self.probe.seen = state["probe"]
            self.probe.weights = [None if w is None else w.to(device) for w in weights]

    def _fits(self, state: Any) -> bool:
        """Return whether a state has an entry of the right kind for every tap, and the probe's for every stage."""

        def listed(values: Any, num: int, kind: Any) -> bool:
            return isinstance(values, list) and len(values) == num and all(isinstance(v, kind) for v in values)

        taps, stages = len(self.tap_names), len(self.stage_names)
        kinds = {"suspicions": int, "num_steps": int, "loss_sum": int | float}
        if not isinstance(state, dict) or not all(listed(state.get(name), taps, kind) for name, kind in kinds.items()):
            return False
        probe = state.get("probe", 0)
        if probe is None or self.probe is None:
            return True
        if not listed(probe, 3, list) or not all(listed(part, stages, int) for part in probe[1:]):
            return False
        weights = [w for w in probe[0] if w is not None]
        shaped = all(w.ndim == 2 and w.shape[1] == self.probe.num_classes for w in weights if isinstance(w, Tensor))
        return listed(probe[0], stages, Tensor | None) and shaped


def tap_names(net: LocalNetwork) -> list[str]:
    """Return one name per tap: its stage's, numbered where several taps read the same stage."""
    stages = [tap.stage for tap in net.taps]
    return [
        f"stage{stage + 1}" if stages.count(stage) == 1 else f"stage{stage + 1}.{stages[:t].count(stage) + 1}"
        for t, stage in enumerate(stages)
    ]
