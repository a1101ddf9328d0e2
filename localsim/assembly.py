"""From a configuration to an untrained network: backbone, cuts, credit, taps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localsim.backbones import Backbone, build_backbone, unit_shapes
from localsim.config import Config
from localsim.credit import Credit
from localsim.errors import UserError
from localsim.network import LocalNetwork, Stage, Tap
from localsim.partition import Stages, partition
from localsim.presets import resolve
from localsim.rng import keyed
from localsim.rules import get_rule
from localsim.rules.heads import projector
from localsim.rules.noise import Noise, make_boundary
from localsim.rules.objectives import make_objective
from localsim.rules.readouts import make_readout


def build(
    rule: str = "blockwise",
    *,
    preset: str = "imagenet",
    credit: Credit | Mapping[str, Any] | None = None,
    **settings: Any,
) -> LocalNetwork:
    """Return the untrained network of a rule, e.g. `build("blockwise", granularity=4, backbone="resnet50")`.

    Args:
        rule: its name, see `localsim.rules.rules`.
        preset: where every other setting comes from; `imagenet` has the paper's widths (2.4 GB of projectors for
            four taps), `quick` small ones.
        credit: a matrix of your own in place of the rule's.
        settings: any field of `localsim.config.Config`.

    Raises:
        UserError: see `localsim.presets.resolve`.
    """
    if credit is not None:
        settings["credit"] = credit.to_config() if isinstance(credit, Credit) else credit
    return build_network(resolve(rule, preset, settings))


def build_network(config: Config) -> LocalNetwork:
    """Return the untrained network of a configuration.

    The trunk's initialisation depends on backbone and seed only, so that all rules of one seed start from the same
    weights; every tap's head has draws of its own.

    Raises:
        UserError: the partition, reach, readout or matrix does not fit the backbone.
    """
    backbone, stages = build_trunk(config)
    credit = build_credit(config, len(stages))
    noise = Noise.parse(config.noise)
    shapes = unit_shapes(backbone, config.image_size)
    net_stages = [Stage([backbone.units[unit] for unit in units], make_boundary(noise)) for units in stages]
    taps = []
    for tap, stage in enumerate(credit.taps):
        with keyed(config.seed, "init", "readout", tap):
            readout = make_readout(config.readout, shapes[stages[stage][-1]], expand_width=config.expand_width)
        with keyed(config.seed, "init", "projector", tap if config.projector_init == "private" else 0):
            head = projector(readout.out_features, config.projector)
        taps.append(Tap(stage, readout, head, make_objective(config.objective, config.objective_options)))
    return LocalNetwork(net_stages, taps, credit)


def build_trunk(config: Config) -> tuple[Backbone, Stages]:
    """Return the backbone and where it is cut."""
    with keyed(config.seed, "init", "trunk"):
        backbone = build_backbone(config.backbone, stem=config.stem, zero_init_residual=config.zero_init_residual)
    return backbone, partition(backbone, config.granularity, config.cuts, image_size=config.image_size)


def build_credit(config: Config, num_stages: int) -> Credit:
    """Return the credit matrix: an explicit one, or the rule's, or the rule's taps with another reach."""
    if config.credit is not None:
        own = Credit.from_config(config.credit)
        if own.num_stages != num_stages:
            raise UserError(f"the credit matrix has {own.num_stages} stages but the network has {num_stages}")
        return own
    credit = get_rule(config.rule).credit(num_stages)
    return credit if config.reach is None else Credit.banded(num_stages, config.reach, credit.taps)
