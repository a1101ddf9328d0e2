"""From a configuration to an untrained network: backbone, cuts, credit, taps."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from localsim.backbones import Backbone, build_backbone, receptive_fields, unit_shapes
from localsim.config import Config
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.network import IMAGES, LocalNetwork, Stage, Tap, tensors_of
from localsim.partition import Stages, partition
from localsim.patches import Patches
from localsim.presets import resolve
from localsim.rng import keyed
from localsim.rules import get_rule
from localsim.rules.choices import at_tap, listed, options_at
from localsim.rules.heads import make_head
from localsim.rules.noise import Noise, make_boundary
from localsim.rules.objectives import OBJECTIVES, make_objective
from localsim.rules.readouts import make_readout
from localsim.rules.site import Site
from localsim.transport import set_transport

MAX_ERROR = 20_000
"""Entries of an embedding that direct feedback broadcasts: its matrices have as many rows, for every layer."""


def build(
    rule: str = "blockwise",
    *,
    preset: str = "imagenet",
    credit: Credit | Mapping[str, Any] | None = None,
    **settings: Any,
) -> LocalNetwork:
    """Return the untrained network of a rule, e.g. `build("blockwise", granularity=4, backbone="resnet50")`.

    Args:
        rule: its name, see `localsim.rules.rules`, or the path of a file that holds one.
        preset: where every other setting comes from; `imagenet` has the paper's widths (2.4 GB of projectors for
            four taps), `quick` small ones.
        credit: a matrix of your own in place of the rule's.
        settings: any field of `localsim.config.Config`.

    Raises:
        UserError: see `localsim.presets.resolve`.
    """
    if credit is not None:
        settings["credit"] = credit.to_config() if isinstance(credit, Credit) else credit
    config = resolve(rule, preset, settings)
    net = build_network(config)
    if config.compile:
        net.compile_stages()
    return net


def build_network(config: Config, trunk: tuple[Backbone, Stages] | None = None) -> LocalNetwork:
    """Return the untrained network of a configuration.

    The trunk's initialisation depends on backbone and seed only, so that all rules of one seed start from the same
    weights; every tap's head has draws of its own. Stages are not compiled here, whatever the configuration: see
    `LocalNetwork.compile_stages`.

    Args:
        config: the configuration.
        trunk: what `build_trunk(config)` gave, where it was called already; the network takes its unit blocks.

    Raises:
        UserError: the partition, reach, readout, head or matrix does not fit the backbone.
    """
    backbone, stages = build_trunk(config) if trunk is None else trunk
    credit = build_credit(config, len(stages))
    noise = Noise.parse(config.noise)
    recompute = config.recompute == "units"
    net_stages = [
        Stage([backbone.units[unit] for unit in units], make_boundary(noise), recompute=recompute) for units in stages
    ]
    shapes = unit_shapes(backbone, trunk_size(config))
    taps = [build_tap(config, backbone, stages, shapes, credit, tap) for tap in range(credit.num_taps)]
    if config.provenance == "identical":
        _copy_first(taps)
    net = LocalNetwork(
        net_stages,
        taps,
        credit,
        patches=open_patches(config),
        image_size=config.image_size,
        transport=config.transport,
    )
    set_transport(_crossed(net, config.transport), config.transport, config.seed, error_width=_error_width(net, config))
    return net


def _crossed(net: LocalNetwork, transport: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that gradients cross, by names that do not depend on the cuts.

    Under direct feedback the taps' own layers are trained exactly: the error arises in their embeddings.
    """
    for stage in net.stages:
        yield f"top of {stage.units[-1].name}", stage
        for unit in stage.units:
            for name, part in zip(unit.part_names, unit.parts, strict=True):
                yield from part.named_modules(prefix=name)
    if transport != "direct_feedback":
        yield from net.taps.named_modules(prefix="taps")


def build_tap(
    config: Config,
    backbone: Backbone,
    stages: Stages,
    shapes: list[tuple[int, int, int]],
    credit: Credit,
    tap: int,
) -> Tap:
    """Return one tap: readout, head and objective as the configuration lists them for it."""
    stage, num_taps = credit.taps[tap], credit.num_taps
    unit = stages[stage][-1]
    objectives, heads, readouts = (
        listed(text, what)
        for text, what in ((config.objective, "objective"), (config.head, "head"), (config.readout, "readout"))
    )
    objective_name = at_tap(objectives, tap, num_taps, "objective")
    head_name = at_tap(heads, tap, num_taps, "head")
    place = tap / (num_taps - 1) if num_taps > 1 else 1.0
    objective = make_objective(objective_name, options_at(config.objective_options, objective_name, objectives, place))
    patches = open_patches(config)
    with keyed(config.seed, "init", "readout", tap):
        readout = make_readout(
            at_tap(readouts, tap, num_taps, "readout"),
            shapes[unit],
            expand_width=config.expand_width,
            grid=patches.grid(config.image_size) if patches else None,
            impl=config.readout_impl,
        )
    plain_head: str = OBJECTIVES[objective_name].head

    def end(width: int) -> nn.Module:
        return make_head(plain_head, dataclasses.replace(site, shape=(width,)), kind="vector")

    site = Site(
        stage=stage,
        num_stages=len(stages),
        unit=unit,
        num_units=len(backbone.units),
        shape=readout.out_shape,
        top_shape=shapes[-1],
        above=backbone.units[unit + 1 :],
        image_shape=(3, trunk_size(config), trunk_size(config)),
        widths=tuple(config.projector),
        num_classes=config.num_classes,
        end=end,
    )
    with keyed(config.seed, "init", "projector", tap):
        head = make_head(head_name, site, options_at(config.head_options, head_name, heads, place), kind=readout.kind)
    contexts = {"top": len(stages) - 1, "images": IMAGES}
    made = Tap(stage, readout, head, objective, context=contexts.get(getattr(head, "context", "")))
    if config.provenance == "frozen":
        for parameter in made.parameters():
            parameter.requires_grad = False
    return made


def _copy_first(taps: list[Tap]) -> None:
    """Give the parameters of all heads the values of the lowest tap's, wherever names and shapes agree.

    Heads that read vectors of different widths differ in their first layer.
    """
    first = dict(taps[0].head.named_parameters()) if taps else {}
    with torch.no_grad():
        for tap in taps[1:]:
            for name, parameter in tap.head.named_parameters():
                if name in first and first[name].shape == parameter.shape:
                    parameter.copy_(first[name])


def build_trunk(config: Config) -> tuple[Backbone, Stages]:
    """Return the backbone and where it is cut."""
    with keyed(config.seed, "init", "trunk"):
        backbone = build_backbone(
            config.backbone,
            stem=config.stem,
            zero_init_residual=config.zero_init_residual,
            width=config.backbone_width,
        )
    return backbone, partition(backbone, config.granularity, config.cuts, image_size=trunk_size(config))


def build_credit(config: Config, num_stages: int) -> Credit:
    """Return the credit matrix: an explicit one, or the rule's, with its own reach or another."""
    if config.credit is not None:
        own = Credit.from_config(config.credit)
        if own.num_stages != num_stages:
            raise UserError(f"the credit matrix has {own.num_stages} stages but the network has {num_stages}")
        return own
    make = get_rule(config.rule).credit
    if config.reach is not None and len(inspect.signature(make).parameters) < 2:
        raise UserError(f"rule {config.rule} has no reach to choose: its matrix follows from the number of stages")
    try:
        return make(num_stages) if config.reach is None else make(num_stages, config.reach)
    except UserError:
        raise
    except Exception as error:  # whatever a user's function may raise
        told = f"{type(error).__name__}: {error}"
        raise UserError(f"the credit of rule {config.rule} failed for {num_stages} stages: {told}") from error


def open_patches(config: Config) -> Patches | None:
    """Return how images are cut into patches, or None if they are not."""
    return None if config.patches == "none" else Patches.parse(config.patches)


def trunk_size(config: Config) -> int:
    """Return the side in pixels of what enters the first stage: an image, or a patch."""
    patches = open_patches(config)
    return config.image_size if patches is None else patches.size


def view_strengths(config: Config, net: LocalNetwork) -> list[float]:
    """Return for every tap how strong its views are: 1, or the share of the image that its stage sees at a place.

        strength = min(1, receptive field / image size),    where images are cut into patches of at most a patch's

    Parthasarathy et al. 2024 (LCL-V2) scale deformations with the receptive field; the proportion is ours.
    """
    if config.view_strength == "uniform":
        return [1.0] * len(net.taps)
    fields = receptive_fields(net.units)
    last = [sum(net.units_per_stage[: tap.stage + 1]) - 1 for tap in net.taps]
    strengths = [min(fields[unit], trunk_size(config)) / config.image_size for unit in last]
    if min(strengths, default=0) == 1:
        raise UserError(
            "view_strength receptive_field changes nothing: every tap's stage sees all of an image of "
            f"{config.image_size} px; give larger images, a finer cut or a backbone with smaller receptive fields"
        )
    return strengths


def _error_width(net: LocalNetwork, config: Config) -> int:
    """Return how many numbers per image the widest embedding of a tap has: what direct feedback broadcasts."""
    if config.transport != "direct_feedback" or not len(net.taps):
        return 0
    images = torch.zeros(2, 3, config.image_size, config.image_size)
    net.eval()
    with torch.no_grad():
        outputs = {**dict(enumerate(net.stage_outputs(images))), IMAGES: images}
        widths = [sum(part[0].numel() for part in tensors_of(tap.embed(outputs))) for tap in net.taps]
    net.train()
    if max(widths) > MAX_ERROR:
        raise UserError(
            "direct_feedback sends every entry of an error to every layer, and the embeddings of head "
            f"{config.head} have {max(widths):,}; allowed: up to {MAX_ERROR:,}"
        )
    return max(widths)
