"""Time and memory of one projector with Barlow Twins and LARS: as plainly written, and as localsim does it.

    python benchmarks/heads.py
    python benchmarks/heads.py --widths 8192 --batches 16 --precision bf16
    OMP_NUM_THREADS=1 python benchmarks/heads.py           # where other programs run on the machine

Both do one step of a head of three layers: forward pass of two views, loss, gradients of all weights and of what the
head read, LARS. *plain* calls the head view by view, forms the cross-correlation and a copy of its squares, and LARS
copies every gradient. They take turns in one process, on the same weights; medians are printed, shares are of a line's
own time. Peak is what is allocated at once beyond weights and momentum: gradients, activations, temporary tensors.
Difference is the largest one of the first step's gradients, relative to the largest entry of each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

import torch
from torch import Tensor, nn
from tracked import machine, peak_bytes, wait

from localsim.optim import LARS
from localsim.precision import PRECISIONS, autocast
from localsim.rng import keyed
from localsim.rules.heads import Projector
from localsim.rules.objectives.barlow_twins import BarlowTwins
from localsim.rules.site import Site

READ = 2048  # what the `expand` readout gives
PARTS = ("head", "loss", "LARS")


@dataclass(frozen=True)
class Formulation:
    """How the three parts are done.

    Attributes:
        embed: the head's forward pass of both views; gradients are autograd's.
        loss: of their embeddings.
        step: moves the weights by their `.grad`.
    """

    embed: Callable[[list[Tensor]], list[Tensor]]
    loss: Callable[[list[Tensor]], Tensor]
    step: Callable[[], object]


def make_head(width: int, device: str) -> Projector:
    """Return a projector of three layers of that width."""
    site = Site(
        stage=0, num_stages=1, unit=0, num_units=1, shape=(READ,), top_shape=(READ, 4, 4), above=(),
        image_shape=(3, 128, 128), widths=(width,) * 3, num_classes=None, end=lambda _: nn.Identity(),
    )  # fmt: skip
    with keyed("benchmark", "heads"):
        return Projector(site).to(device)


def plain(head: Projector, optimizer: LARS, precision: str, device: str) -> Formulation:
    """Return the plain formulation: every part as its equation is written."""
    context, objective = autocast(precision, device), BarlowTwins()

    def embed(reads: list[Tensor]) -> list[Tensor]:
        embeddings = []
        for read in reads:
            with context():
                embeddings.append(head(read).float())
        return embeddings

    def loss(embeddings: list[Tensor]) -> Tensor:
        correlation = objective.correlation(*embeddings)
        diagonal, squares = correlation.diagonal(), correlation.square()
        off_diagonal = squares.sum() - squares.diagonal().sum()
        return objective.scale * ((diagonal - 1).square().sum() + objective.lambda_ * off_diagonal)

    return Formulation(embed, loss, lambda: plain_lars(optimizer))


@torch.no_grad()
def plain_lars(optimizer: LARS) -> None:
    """Take the step of `LARS`, on its state, one operation on whole tensors after the other."""
    (group,) = optimizer.param_groups
    for weight in group["params"]:
        change = weight.grad
        if weight.ndim > 1:
            change = change.add(weight, alpha=group["weight_decay"])
            size, length = weight.norm(), change.norm()
            change.mul_(torch.where((size > 0) & (length > 0), group["eta"] * size / length, torch.ones_like(size)))
        momentum = optimizer.state[weight]["mu"]
        momentum.mul_(group["momentum"]).add_(change)
        weight.add_(momentum, alpha=-group["lr"])


def localsim(head: Projector, optimizer: LARS, precision: str, device: str) -> Formulation:
    """Return what localsim does."""
    context, objective = autocast(precision, device), BarlowTwins()

    def embed(reads: list[Tensor]) -> list[Tensor]:
        with context():
            return [z.float() for z in head.forward_views(reads)]

    return Formulation(embed, lambda embeddings: objective(tuple(embeddings)), optimizer.step)


def one_step(head: Projector, reads: list[Tensor], by: Formulation) -> dict[str, float]:
    """Do one step and return the seconds of each of `PARTS`; gradients stay in `.grad`."""
    device = reads[0].device
    times = [clock(device)]
    leaves = [read.detach().requires_grad_() for read in reads]
    embeddings = by.embed(leaves)
    times.append(clock(device))
    cut = [z.detach().requires_grad_() for z in embeddings]
    grads = torch.autograd.grad(by.loss(cut), cut)
    times.append(clock(device))
    parameters = list(head.parameters())
    found = torch.autograd.grad(embeddings, [*parameters, *leaves], grads)
    for parameter, grad in zip(parameters, found, strict=False):
        parameter.grad = grad
    del embeddings, grads, cut, found
    times.append(clock(device))
    by.step()
    times.append(clock(device))
    forward, loss, backward, step = (end - start for start, end in pairwise(times))
    return {"head": forward + backward, "loss": loss, "LARS": step}


def clock(device: torch.device) -> float:
    """Return the time at which the device has done everything asked for so far."""
    wait(device)
    return time.perf_counter()


def lines(width: int, batch: int, chosen: argparse.Namespace) -> Iterator[str]:
    """Yield the table's lines of one width and batch."""
    head = make_head(width, chosen.device)
    optimizer = LARS(head.parameters(), lr=0.0, weight_decay=1e-6)  # no lr: both meet the same weights at every step
    generator = torch.Generator().manual_seed(0)
    reads = list(torch.randn(2, batch, READ, generator=generator).relu().to(chosen.device))
    formulations = {make.__name__: make(head, optimizer, chosen.precision, chosen.device) for make in (plain, localsim)}

    def cleared() -> None:
        for parameter in head.parameters():
            parameter.grad = None

    def worked(by: Formulation) -> dict[str, float]:
        seconds = one_step(head, reads, by)
        cleared()
        return seconds

    one_step(head, reads, formulations["localsim"])
    theirs = [parameter.grad for parameter in head.parameters()]
    cleared()
    one_step(head, reads, formulations["plain"])
    difference = 0.0
    for parameter, grad in zip(head.parameters(), theirs, strict=True):
        assert grad is not None and parameter.grad is not None
        gap = (grad - parameter.grad).abs_().max() / parameter.grad.abs().max()
        difference = max(difference, gap.item())
    del theirs, grad
    cleared()
    peaks = {name: peak_bytes(partial(worked, by), torch.device(chosen.device)) for name, by in formulations.items()}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in formulations}
    for _ in range(chosen.repeats):
        for name, by in formulations.items():
            runs[name].append(worked(by))
    medians = {name: [statistics.median(run[part] for run in found) for part in PARTS] for name, found in runs.items()}
    whole = {name: statistics.median(sum(run.values()) for run in found) for name, found in runs.items()}
    for name in formulations:
        parts = " | ".join(f"{1e3 * part:.1f} ({part / sum(medians[name]):.0%})" for part in medians[name])
        yield (
            f"| {width} | {batch} | {name} | {1e3 * whole[name]:.1f} | {whole[name] / whole['plain']:.2f} | {parts} "
            f"| {peaks[name] / 1e6:.1f} | {peaks[name] / peaks['plain']:.2f} | {difference:.0e} |"
        )


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 8192], help="of all three layers")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64, 256], help="images; two views of each")
    parser.add_argument("--precision", choices=PRECISIONS, default="full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args(given)
    about = machine(torch.device(chosen.device))
    print(f"Precision {chosen.precision}, medians of {chosen.repeats}. {about}\n", flush=True)
    print("| width | batch | by | ms | of plain | head ms | loss ms | LARS ms | peak MB | of plain | difference |")
    print("|---" * 11 + "|", flush=True)
    for width, batch in product(chosen.widths, chosen.batches):
        for line in lines(width, batch, chosen):
            print(line, flush=True)


if __name__ == "__main__":
    main()
