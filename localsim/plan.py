"""What a run says before it starts, and the figures that show what it does."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from localsim.analysis import plots
from localsim.analysis.extract import has_batch_norm
from localsim.assembly import view_strengths
from localsim.config import Config
from localsim.data import Batch, Data, ViewLoader, plain_batches
from localsim.monitor import tap_names
from localsim.network import LocalNetwork
from localsim.partition import CutRow, format_cut_table
from localsim.patches import Patches
from localsim.rules.choices import at_tap, listed
from localsim.schedule import Schedule
from localsim.train import StepCost

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def describe(
    config: Config, net: LocalNetwork, cuts: Sequence[CutRow], data: Data, loader: ViewLoader, cost: StepCost | None
) -> str:
    """Return what a run will do: cuts, credit, taps, data, cost, and what a normal loss looks like."""
    paths = [net.credit.path_to(stage, net.units_per_stage) for stage in range(len(net.stages))]
    cifar_stem = " with the CIFAR stem" if config.stem == "cifar" else ""
    lines = [
        f"rule {config.rule} on {config.backbone} at {config.image_size} px{cifar_stem}, "
        f"preset {config.preset}, seed {config.seed}",
        "",
        format_cut_table(cuts, paths),
        "",
        str(net.credit),
        f"longest gradient path: {net.credit.longest_path(net.units_per_stage)} of {len(net.units)} unit blocks",
        "",
    ]
    tests = "no labels, no probe" if data.test is None else f"{len(data.test)} test images, {len(data.classes)} classes"
    lines.append(f"data: {data.name}, {len(data.train)} training images, {tests}")
    if not len(net.taps):
        return "\n".join([*lines, "nothing is trained: the untrained network is probed"])
    schedule = Schedule.of(config, loader.steps_per_epoch, len(net.taps))
    stops = schedule.last_step < schedule.total_steps
    steps = f"{schedule.last_step} of {schedule.total_steps}" if stops else str(schedule.last_step)
    of_what = " of the last phase" if len(schedule.phases) > 1 else ""
    trunk = sum(p.numel() for stage in net.stages for p in stage.parameters())
    heads = sum(p.numel() for p in net.taps.parameters())
    lines += [
        *describe_taps(config, net),
        f"training: {config.epochs} epochs, {steps} steps of {config.batch_size} images x "
        f"{loader.num_views} views, {config.optimizer}, peak learning rate {schedule.peak:g}, "
        f"{config.precision} precision on {net.device}",
        f"parameters: trunk {trunk:,}, readouts and heads {heads:,}",
        *describe_phases(config, net, schedule),
    ]
    if cost is not None:
        share = f" for a share of 1 in {loader.share[1]} of the batch, without messages" if loader.share[1] > 1 else ""
        lines.append(
            f"measured cost{share}: {cost.seconds:.2f} s per step{of_what}, {cost.held_bytes / 2**20:.0f} MiB of "
            f"activations held at the peak; about {schedule.last_step * cost.seconds / 60:.1f} min of training"
        )
    if data.test is not None and config.probe_protocol != "none":
        calibrates = any(has_batch_norm(part) for part in (net.stages, *(tap.readout for tap in net.taps)))
        lines.append(
            f"then: linear (protocol {config.probe_protocol}) and k-NN probes of every stage, of this network and of "
            + ("two untrained controls" if calibrates else "the untrained one")
        )
    chances = {
        name: net.taps[tap].objective.chance_level(cost.widths[tap], config.batch_size)
        for tap, name in enumerate(tap_names(net))
        if cost is not None and tap in cost.widths
    }
    told = {name: f"{chance:.3g}" for name, chance in chances.items() if chance is not None}
    if told:
        same = len(set(told.values())) == 1
        levels = next(iter(told.values())) if same else ", ".join(f"{level} ({name})" for name, level in told.items())
        lines.append(
            f"a normal loss: {levels} or more is what a tap that has learned nothing gives (unrelated views, or "
            "guessing; objectives that do not scale embeddings start far above); every tap should come clearly below it"
        )
    idle = [name for tap, name in enumerate(tap_names(net)) if net.credit.lowest(tap) is None]
    if idle:
        lines.append(f"taps {', '.join(idle)} change no stage: their losses train their own heads alone")
    return "\n".join(lines)


def describe_taps(config: Config, net: LocalNetwork) -> list[str]:
    """Return what the taps read and minimise, and what happens to signals on their way: one line, or one per tap."""
    plain = [config.provenance, f"noise {config.noise}", f"transport {config.transport}"]
    if config.patches != "none":
        plain.append(f"patches {config.patches}, {net.patches_per_image} per image")
    lists = [("readout", config.readout), ("head", config.head), ("objective", config.objective)]
    if not any("," in text for _, text in lists):
        widths = f" {'-'.join(map(str, config.projector))}" if config.head == "projector" else ""
        return [
            f"every tap: readout {config.readout}, head {config.head}{widths}, objective {config.objective}; "
            + ", ".join(plain)
        ]
    number = len(net.taps)
    told = [
        f"tap on stage {tap.stage + 1}: "
        + ", ".join(f"{what} {at_tap(listed(text, what), i, number, what)}" for what, text in lists)
        for i, tap in enumerate(net.taps)
    ]
    return [*told, ", ".join(plain)]


def describe_phases(config: Config, net: LocalNetwork, schedule: Schedule) -> list[str]:
    """Return what a sequential schedule does, as no line or one."""
    if len(schedule.phases) < 2:
        return []
    told = f"sequential: {len(schedule.phases)} taps, one after the other from the lowest up, "
    told += (
        f"about {schedule.total_steps // len(schedule.phases)} steps each; what lies below a tap's reach is frozen, "
    )
    told += "without noise"
    if config.feature_cache:
        told += ", and its outputs for one draw of views are kept on disk"
    if config.view_strength != "uniform":
        strengths = ", ".join(f"{strength:.2f}" for strength in view_strengths(config, net))
        told += f"; strength of the views, by the receptive field: {strengths}"
    return [told]


def draw_views(data: Data, batch: Batch, patches: Patches | None = None) -> Figure:
    """Return a contact sheet: the first images of a batch, each above the views that the network sees.

    Where views are cut into patches, white lines stand at every multiple of the stride, where patches begin.
    """
    shown = batch.indices[:8]
    size = batch.views[0].shape[-1]
    originals = next(plain_batches(data.train.subset(shown), size=size, batch_size=8, mean=data.mean, std=data.std))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.mean, data.std))
    pictures = [(x[: len(shown)].cpu() * std + mean).clamp(0, 1) for x in (originals.views[0], *batch.views)]
    if patches is not None:
        for views in pictures[1:]:
            views[:, :, patches.stride :: patches.stride] = 1
            views[..., patches.stride :: patches.stride] = 1
    labels = None if batch.labels is None else [data.classes[int(label)] for label in batch.labels[: len(shown)]]
    return plots.contact_sheet(pictures[0], pictures[1:], labels)


def draw_credit(net: LocalNetwork) -> Figure:
    """Return a picture of the network's credit matrix."""
    names = [stage.name for stage in net.stages] if len(net.stages) <= 6 else None
    return net.credit.draw(names, "Credit matrix")


def peak_memory(device: torch.device) -> str:
    """Return how much memory this process has taken at most, as a phrase."""
    if device.type == "cuda":
        return f"at most {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory"
    # kilobytes, but bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return f"at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB of memory"
