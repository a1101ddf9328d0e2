"""The state of training as the sum of the parts that several processes have, and one process's part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from localsim.network import LocalNetwork

if TYPE_CHECKING:
    from localsim.monitor import Monitor

State = dict[str, Any]
"""`trunk` and `taps` (tensors by name), `optimizer`, and `monitor` (`Monitor.state`)."""


def keep_only(net: LocalNetwork, stages: range) -> None:
    """Leave memory and values to some of the stages and their taps; the rest keep names and shapes alone."""
    for number, stage in enumerate(net.stages):
        if number not in stages:
            stage.to("meta")
    for tap in net.taps:
        if tap.stage not in stages:
            tap.to("meta")


def keep_only_of_monitor(net: LocalNetwork, stages: range, monitor: Monitor) -> None:
    """Leave a monitor what it has of some of the stages and their taps: the rest is for other processes to tell."""
    for number, tap in enumerate(net.taps):
        if tap.stage not in stages:
            monitor.suspicions[number] = monitor.num_steps[number] = 0
            monitor.loss_sum[number] = 0.0
    if monitor.probe is not None:
        for stage in set(range(len(net.stages))) - set(stages):
            monitor.probe.weights[stage] = None
            monitor.probe.hits[stage] = monitor.probe.seen[stage] = 0


def state_of(net: LocalNetwork, stages: range, optimizer: torch.optim.Optimizer, monitor: Mapping[str, Any]) -> State:
    """Return the state of training of some of the stages and their taps; the optimiser's is by parameter name."""
    held = optimizer.state_dict()
    entries = {name: held["state"][place] for place, name in enumerate(_order(net, stages)) if place in held["state"]}
    groups = [{name: value for name, value in group.items() if name != "params"} for group in held["param_groups"]]
    return {
        "trunk": _here(net.trunk_state_dict()),
        "taps": _here(net.taps.state_dict()),
        "optimizer": {"state": entries, "param_groups": groups},
        "monitor": dict(monitor),
    }


def joined(net: LocalNetwork, parts: Sequence[tuple[range, State]]) -> State:
    """Return the state of the whole network, the optimiser's as its state_dict, from that of parts.

    Args:
        net: of which names, shapes and places of taps are asked.
        parts: stages that ran together, and what `state_of` gave for them; together all stages.
    """
    entries = {name: entry for _, part in parts for name, entry in part["optimizer"]["state"].items()}
    groups = max((part["optimizer"]["param_groups"] for _, part in parts), key=len)
    names = _order(net, range(len(net.stages)))
    num_weights = len([p for p in net.parameters() if p.ndim > 1])
    places = [list(range(num_weights)), list(range(num_weights, len(names)))]
    return {
        "trunk": {name: tensor for _, part in parts for name, tensor in part["trunk"].items()},
        "taps": {name: tensor for _, part in parts for name, tensor in part["taps"].items()},
        "optimizer": {
            "state": {place: entries[name] for place, name in enumerate(names) if name in entries},
            "param_groups": [
                {**group, "params": members}
                for group, members in zip(groups, [group for group in places if group], strict=True)
            ],
        },
        "monitor": _joined_monitor(net, [(stages, part["monitor"]) for stages, part in parts]),
    }


def optimizer_part(net: LocalNetwork, stages: range, state: Any) -> Any:
    """Return the part of an optimiser's state_dict for the whole network that is about some of the stages.

    What is not such a state_dict is returned as it is, for `localsim.optim.load_state` to refuse.
    """
    if not (isinstance(state, dict) and isinstance(state.get("state"), dict)):
        return state
    place_of = {name: place for place, name in enumerate(_order(net, range(len(net.stages))))}
    wanted = _order(net, stages)
    kept = {new: state["state"][place_of[name]] for new, name in enumerate(wanted) if place_of[name] in state["state"]}
    shapes = dict(net.named_parameters())
    num_weights = len([name for name in wanted if shapes[name].ndim > 1])
    members = [group for group in (list(range(num_weights)), list(range(num_weights, len(wanted)))) if group]
    return {"state": kept, "param_groups": [{"params": group} for group in members]}


def _order(net: LocalNetwork, stages: range) -> list[str]:
    """Return the names of the parameters of some stages and their taps, in `localsim.optim.make_optimizer`'s order."""
    chosen = {
        id(parameter)
        for part in (
            *(stage for number, stage in enumerate(net.stages) if number in stages),
            *(tap for tap in net.taps if tap.stage in stages),
        )
        for parameter in part.parameters()
    }
    held = [(name, p.ndim) for name, p in net.named_parameters() if id(p) in chosen]
    return [name for name, ndim in held if ndim > 1] + [name for name, ndim in held if ndim <= 1]


def _here(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not tensor.is_meta}


def _joined_monitor(net: LocalNetwork, parts: Sequence[tuple[range, dict[str, Any]]]) -> dict[str, Any]:
    """Return a monitor's state with the entry of every stage and tap from where it ran."""
    by_tap = ("suspicions", "loss_sum", "num_steps")

    def part_with(stage: int) -> dict[str, Any]:
        return next(state for stages, state in parts if stage in stages)

    probes = [part_with(stage)["probe"] for stage in range(len(net.stages))]
    probe = None
    if all(kept is not None for kept in probes):
        probe = [[kept[which][stage] for stage, kept in enumerate(probes)] for which in range(3)]
    lists = {name: [part_with(tap.stage)[name][index] for index, tap in enumerate(net.taps)] for name in by_tap}
    return {"probe": probe, **lists}
