"""Networks as points of comparison: which regime each belongs to, which of its layers correspond, and its controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from localsim.analysis.controls import CONTROLS, calibrated_control
from localsim.analysis.extraction import features
from localsim.analysis.feature_store import Features
from localsim.analysis.sources import Source
from localsim.assembly import build_trunk
from localsim.config import FREE, Config
from localsim.data import ImageSet, class_balanced
from localsim.errors import UserError, one_of
from localsim.network import LocalNetwork
from localsim.opening import open_data
from localsim.runs import Run, load_run

LAYERS = ("ends", "stages", "units", "readouts")
"""Which layers: those that end the backbone's own stages, or all stages, unit blocks or readouts."""
_ARCHITECTURE = ("backbone", "backbone_width", "stem", "zero_init_residual", "patches", "image_size", "data")
_OBSERVED = ("log_every", "probe_protocol", "probe_images", "test_images")
_WITHIN = ("seed", "preset", *_OBSERVED, *FREE)  # what runs of one regime may differ in


@dataclass(frozen=True)
class Layer:
    """A layer of a network, as a point of comparison.

    Attributes:
        regime: what trained the network: its rule and what sets it apart; equal for all seeds.
        seed: of the run; None where there is none.
        step: of training, 0 for an untrained network; None for the end of a run, and where there is none.
        name: of the layer.
        depth: share of the trunk that lies in and below it, in unit blocks, above 0 to 1.
    """

    regime: str
    seed: int | None
    step: int | None
    name: str
    depth: float

    def __str__(self) -> str:
        seed = "" if self.seed is None else f" seed {self.seed}"
        step = "" if self.step is None else f" step {self.step}"
        return f"{self.regime}{seed}{step} {self.name}"


@dataclass(frozen=True)
class Subject:
    """A network, or arrays of one, of which layers are to be compared.

    Attributes:
        regime, seed, step: see `Layer`.
        open: returns the network.
        features: its features, where these are given in its place.
        run: the run it comes from.
        learned: whether it may have learned anything: no control, nor a run without training.
    """

    regime: str
    seed: int | None
    step: int | None
    open: Callable[[], Source] | None = None
    features: Features | None = None
    run: Run | None = None
    learned: bool = True

    def read(self, images: Any, choice: str | Mapping[str, Any], **settings: Any) -> tuple[Features, list[Layer]]:
        """Return the features of its layers and the layers, lowest first.

        Args:
            images: see `localsim.analysis.features`.
            choice: of layers, see `compare`; features that are given are all taken.
            settings: its other arguments.
        """
        if self.open is not None:
            source = self.open()
            found = features(source, images, **layers_to_read(self.run, choice), **settings)
            return found, layers_of(source, found.names, self.regime, self.seed, self.step)
        assert self.features is not None
        depths = {name: (place + 1) / len(self.features) for place, name in enumerate(self.features)}
        return self.features, [Layer(self.regime, self.seed, self.step, name, depths[name]) for name in depths]


def open_subjects(
    given: Sequence[Any], *, controls: Sequence[str] = ("untrained",), over_training: bool = False, seed: int = 0
) -> list[Subject]:
    """Return the networks to compare, controls first.

    Args:
        given: runs or their folders, networks as `features` takes them, `Features`, or mappings of layers to arrays.
        controls: of `CONTROLS`, those to add for the runs: one for each architecture, seed and data set.
        over_training: add the untrained network and every snapshot of each run as steps of its training.
        seed: of untrained networks by name.

    Raises:
        UserError: an unknown control, a run that is given twice, or one asked for over training without snapshots.
    """
    for control in controls:
        if control not in CONTROLS:
            raise one_of("control", control, CONTROLS)
    opened = [load_run(one) if isinstance(one, str | Path) and Path(one).is_dir() else one for one in given]
    runs = [one for one in opened if isinstance(one, Run)]
    names = dict(zip(map(id, runs), regime_names([run.config for run in runs]), strict=True))
    subjects: list[Subject] = []
    for number, one in enumerate(opened, start=1):
        if isinstance(one, Run):
            subjects += _of_run(one, names[id(one)], over_training)
        elif isinstance(one, Mapping):
            made = one if isinstance(one, Features) else Features.of_arrays(one, name=f"arrays {number}")
            subjects.append(Subject(str(made.record["source"]), None, None, features=made))
        else:
            source = Source.of(one, seed=seed)
            subjects.append(Subject(source.name, None, None, lambda source=source: source))
    subjects = _told_apart(subjects)
    present = {_architecture(run.config) for run in runs if not _learns(run)}
    added: dict[Any, Subject] = {}
    for run in runs:
        for control in controls:
            place = (control, _architecture(run.config))
            if place in added or (control == "untrained" and place[1] in present):
                continue
            regime = " ".join([control, *_apart(run.config, [other.config for other in runs])])
            added[place] = Subject(regime, run.config.seed, None, _control(run, control), run=run, learned=False)
    return [*added.values(), *subjects]


def regime_names(configs: Sequence[Config]) -> list[str]:
    """Return a name for each run: its rule, and where regimes share a rule what sets them apart; seeds share a name."""
    plain = [{name: value for name, value in config.to_json().items() if name not in _WITHIN} for config in configs]
    names = []
    for config, own in zip(configs, plain, strict=True):
        rivals = [other for other in plain if other["rule"] == own["rule"] and other != own]
        apart = [name for name in own if any(other[name] != own[name] for other in rivals)]
        names.append(" ".join([config.rule, *(f"{name}={own[name]}" for name in apart)]))
    return names


def untrained_twins(subjects: Sequence[Subject]) -> dict[str, str | None]:
    """Return for the regime of every run that learned the regime of its untrained network; None if not among them."""
    controls = {}
    for one in subjects:
        if one.run is not None and not one.learned and one.regime.split()[0] == "untrained":
            controls[_architecture(one.run.config)] = one.regime
    twins: dict[str, str | None] = {}
    for one in subjects:
        if one.run is not None and one.learned:
            twins[one.regime] = twins.get(one.regime) or controls.get(_architecture(one.run.config))
    return twins


def common_images(runs: Sequence[Run], number: int | None) -> ImageSet:
    """Return the runs' test images, `number` of them balanced over classes; None: all.

    Raises:
        UserError: there is no run, the runs have other images each, or none for testing.
    """
    if not runs:
        raise UserError(
            "networks without a run have no images of their own; give images, in Python compare(images=...)"
        )
    seen = {(run.config.data, run.config.test_images) for run in runs}
    if len(names := sorted({data for data, _ in seen})) > 1:
        raise UserError(
            f"the runs were trained on {', '.join(names)}; give the images to compare them on, in Python "
            "compare(images=...)"
        )
    test = open_data(max(runs, key=lambda run: run.config.image_size).config).test
    if test is None:
        raise UserError(f"data set {runs[0].config.data!r} has no test images; give images")
    return test if number is None else class_balanced(test, number, "test")


def _of_run(run: Run, regime: str, over_training: bool) -> list[Subject]:
    seed = run.config.seed
    final = Subject(regime, seed, None, _source(run, "trained"), run=run, learned=_learns(run))
    if not over_training or not _learns(run):
        return [final]
    if not run.snapshots:
        raise UserError(f"{run.path} has no snapshots to compare over training; train with --set snapshot_every=1")
    steps = [Subject(regime, seed, step, _source(run, step or "untrained"), run=run) for step in (0, *run.snapshots)]
    return [*steps, final]


def _source(run: Run, which: str | int) -> Callable[[], Source]:
    return lambda: Source.of(run, which=which)


def _control(run: Run, control: str) -> Callable[[], Source]:
    def opened() -> Source:
        source = Source.of(run, which="untrained")
        if control == "untrained":
            return source
        assert isinstance(source.network, LocalNetwork)
        network = calibrated_control(source.network, run.config, open_data(run.config))
        if network is None:
            raise UserError(f"{run.path} has no batch norm to calibrate; compare without the control calibrated")
        return replace(source, network=network)

    return opened


def _learns(run: Run) -> bool:
    return run.step > 0


def _told_apart(subjects: Sequence[Subject]) -> list[Subject]:
    """Return the subjects with a number behind names that several networks have; UserError where a run comes twice."""
    named: dict[Any, list[Subject]] = {}
    for subject in subjects:
        named.setdefault((subject.regime, subject.seed, subject.step), []).append(subject)
    for (regime, seed, _), same in named.items():
        if len(same) > 1 and (twice := [str(one.run.path) for one in same if one.run is not None]):
            raise UserError(f"{' and '.join(twice)} are both {regime} with seed {seed}; give one run of each seed")
    places = {id(one): place for same in named.values() if len(same) > 1 for place, one in enumerate(same, start=1)}
    return [replace(one, regime=f"{one.regime} {places[id(one)]}") if id(one) in places else one for one in subjects]


def _apart(config: Config, others: Sequence[Config]) -> list[str]:
    """Return what it takes to tell the architecture of a run from others that are compared with it."""
    words, alike = [], list(others)
    for name in _ARCHITECTURE:
        still = [one for one in alike if getattr(one, name) == getattr(config, name)]
        if len(still) < len(alike):
            words.append(("" if name == "backbone" else f"{name}=") + str(getattr(config, name)))
        alike = still
    return words


def _architecture(config: Config) -> tuple[Any, ...]:
    return tuple(getattr(config, name) for name in (*_ARCHITECTURE, "seed"))


def layers_to_read(run: Run | None, choice: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a choice of layers in the words of `features`."""
    if not isinstance(choice, str):
        return choice
    if choice not in LAYERS:
        raise one_of("choice of layers", choice, LAYERS)
    if choice != "ends":
        return {choice: "all"}
    if run is None:
        return {}  # what `features` takes where nothing is chosen are the ends of a network's own stages
    backbone, _ = build_trunk(run.config)
    last = [cut - 1 for cut in (*backbone.natural_cuts[1:], len(backbone.units))]
    return {"units": [backbone.units[unit].name for unit in last]}


def layers_of(
    source: Source, names: Sequence[str], regime: str, seed: int | None = None, step: int | None = None
) -> list[Layer]:
    """Return layers of a network, given by name, as points of comparison: with their depths."""
    depths = _depths(source, names)
    return [Layer(regime, seed, step, name, depths[name]) for name in names]


def _depths(source: Source, names: Sequence[str]) -> dict[str, float]:
    """Return how far up the trunk each layer lies; where one lies in no unit block, the places among the layers."""
    places = {name: place + 1 for place, name in enumerate(source.points.units)}
    net = source.network
    if isinstance(net, LocalNetwork):
        ends = np.cumsum(net.units_per_stage)
        for stage, end in enumerate(ends):
            places |= {f"stage{stage + 1}": int(end), f"readout{stage + 1}": int(end)}
        # the stem's parts have names of their own
        places |= {part: place + 1 for place, unit in enumerate(net.units) for part in unit.part_names}
    inside = {name: _deepest(name, places) for name in names}
    if places and all(inside.values()):
        return {name: inside[name] / len(source.points.units) for name in names}
    return {name: (place + 1) / len(names) for place, name in enumerate(names)}


def _deepest(name: str, places: Mapping[str, int]) -> int:
    """Return the place of the unit block that a module is, is part of, or ends with; 0 if there is none."""
    if name in places:
        return places[name]
    related = [place for unit, place in places.items() if name.startswith(f"{unit}.") or unit.startswith(f"{name}.")]
    return max(related, default=0)
