"""From a rule's name to a trained, probed and plotted run: what `localsim run` does, as functions."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from localsim import runs
from localsim.assembly import build_network
from localsim.config import FREE, Config
from localsim.credit import Credit
from localsim.data import AUGMENTATIONS, Batch, Data, ViewLoader, load_data
from localsim.errors import UserError, one_of
from localsim.files import write_json, write_text
from localsim.network import LocalNetwork
from localsim.plan import describe, save_credit, save_losses, save_views
from localsim.presets import PRESETS, resolve
from localsim.rng import key
from localsim.rules import get_rule
from localsim.runs import Run
from localsim.train import Schedule, rehearse, train

Say = Callable[[str], None]

CALIBRATION_BATCHES = 32
"""Batches from which the calibrated control takes its batch-norm statistics, as many as momentum 0.1 remembers."""


def run(
    rule: str | None = None,
    *,
    preset: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    credit: Credit | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Train a network under a rule, probe every stage against the untrained network, and keep it all in a folder.

    Args:
        rule: a name from `localsim.rules.rules`; `blockwise` if not given.
        preset: a name from `localsim.presets.PRESETS`; without one, that of the data set, `quick` for no data set.
        out: the run folder; by default `runs/` and a name made of rule, cut, preset and seed, and of a code for all
            else that differs from the preset.
        resume: continue the run in the folder from its newest checkpoint. Its configuration is kept; settings given
            again must agree with it.
        credit: a matrix of your own in place of the rule's.
        quiet: print and show nothing.
        settings: any field of `localsim.config.Config`, e.g. `granularity=4, epochs=10, batch_size=128`.

    Returns:
        The run, finished.

    Raises:
        UserError: something asked for cannot be done.
        localsim.train.TrainingFailed: a loss is not finite or a stage has collapsed.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    if credit is not None:
        settings["credit"] = credit.to_config()
    settings = {name: value for name, value in settings.items() if value is not None}
    say: Say = (lambda _text: None) if quiet else print
    if resume:
        opened = _reopen(rule, preset, out, settings)
    else:
        config = resolve(rule or "blockwise", preset, settings)
        opened = Run(Path(out) if out is not None else _default_folder(config), config)
        runs.refuse_existing(opened.path)
    # all that can be wrong with a configuration shows here, before a folder is made
    prepared = prepare(opened.config)
    with runs.writing(opened.path):
        if not resume:
            runs.start_run(opened.path, opened.config)
        _carry_out(opened, prepared, say, progress=not quiet)
    return opened


@dataclass(frozen=True)
class Prepared:
    """What a configuration means on this machine: images in reach, a network on its device."""

    data: Data
    net: LocalNetwork
    loader: ViewLoader
    first: Batch


def prepare(config: Config) -> Prepared:
    """Build the network and open the images of a configuration, so that whatever is wrong with it shows here."""
    from localsim.analysis.probes import MIN_TEST_IMAGES

    device = _device(config.device)
    net = build_network(config).to(device)
    if config.channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = _data(config)
    loader = _loader(config, data, device)
    if len(net.taps):
        Schedule.of(config, loader.steps_per_epoch).optimizer(net, config)
    if data.test is not None and len(data.test) < MIN_TEST_IMAGES and config.probe_protocol != "none":
        raise UserError(
            f"{data.name!r} has {len(data.test)} test images; a probe needs {MIN_TEST_IMAGES} or more "
            "(--set probe_protocol=none trains without one)"
        )
    return Prepared(data, net, loader, next(iter(loader.epoch(0))))


def _loader(config: Config, data: Data, device: torch.device) -> ViewLoader:
    if config.augmentation not in AUGMENTATIONS:
        raise one_of("augmentation", config.augmentation, AUGMENTATIONS)
    return ViewLoader(
        data.train,
        AUGMENTATIONS[config.augmentation],
        size=config.image_size,
        batch_size=config.batch_size,
        seed=config.seed,
        mean=data.mean,
        std=data.std,
        workers=config.workers,
        device=device,
    )


def _data(config: Config) -> Data:
    return load_data(
        config.data,
        root=Path(config.data_root) if config.data_root else None,
        image_size=config.image_size,
        train_images=config.train_images,
        test_images=config.test_images,
    )


def _carry_out(opened: Run, prepared: Prepared, say: Say, *, progress: bool) -> None:
    path, config = opened.path, opened.config
    data, net, loader = prepared.data, prepared.net, prepared.loader
    began = time.monotonic()
    learns = len(net.taps) > 0
    cost = rehearse(net, prepared.first, config) if learns else None
    runs.record_environment(path)
    plan = describe(config, net, data, loader, cost)
    write_text(path / "plan.txt", plan + "\n")
    say(plan + f"\n\nrun folder: {path}\n")
    save_views(path, data, prepared.first)
    save_credit(path, net)
    if learns:
        train(net, loader, config, path, num_classes=len(data.classes), progress=progress)
        save_losses(path)
        say(f"trained {runs.checkpoint_step(path)} steps in {(time.monotonic() - began) / 60:.1f} min\n")
    num_skipped = loader.num_skipped + data.num_skipped
    if num_skipped:
        say(f"skipped {num_skipped} unreadable images (the warnings name them)\n")
    if data.test is None:
        say(f"data set {data.name!r} has no labels: nothing to probe")
    elif config.probe_protocol == "none":
        say(f"not probed; `localsim probe {path} --protocol logistic` does it")
    else:
        say(str(probe_run(opened, data=data, trained=net)))
    say(f"\ndone in {(time.monotonic() - began) / 60:.1f} min; figures in {path / 'figures'}")


def probe_run(
    opened: Run,
    *,
    data: Data | None = None,
    trained: LocalNetwork | None = None,
    protocol: str | None = None,
    images: int | None = None,
    seed: int = 0,
    epochs: int = 100,
    report: str = "last",
) -> Any:
    """Probe a run beside two controls, store the table and the plot in its folder, and return the table.

    The controls are the untrained network of the same seed, and `calibrated`: the same with the batch-norm statistics
    of training images, which a trained network has and an untrained one lacks (see `features.calibrated`).

    Args:
        opened: a run with a checkpoint.
        data: the data set to probe on; by default the run's own.
        trained: the network, where it is in memory already.
        protocol, images: default to the configuration's.
        seed: of the probes.
        epochs, report: of the `paper` protocol, see `localsim.analysis.stage_probe.probe_networks`.

    Returns:
        A `localsim.analysis.stage_probe.ProbeTable`.
    """
    from localsim.analysis import plots
    from localsim.analysis.features import calibrated
    from localsim.analysis.stage_probe import probe_networks

    config = opened.config
    data = _data(config) if data is None else data
    device = trained.device if trained is not None else _device(config.device)
    untrained = opened.network("untrained").to(device)
    networks = {"untrained": untrained}
    if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in untrained.modules()):
        views = itertools.islice(_loader(config, data, device).epoch(0), CALIBRATION_BATCHES)
        networks["calibrated"] = calibrated(untrained, views, seed=config.seed)
    if len(untrained.taps):
        networks[config.rule] = (opened.network() if trained is None else trained).to(device)
    table = probe_networks(
        networks,
        data,
        image_size=config.image_size,
        protocol=protocol or (config.probe_protocol if config.probe_protocol != "none" else "logistic"),
        train_images=images or config.probe_images,
        seed=seed,
        precision=config.precision,
        workers=config.workers,
        epochs=epochs,
        report=report,
    )
    write_json(opened.path / "probe.json", table.to_json())
    write_text(opened.path / "probe.csv", table.to_csv())
    curves = {
        name: [(str(row.stage), row.accuracy, row.low, row.high)
               for row in table.select(network=name, features="raw", probe="linear")]
        for name in reversed(table.networks)
    }  # fmt: skip
    figure = plots.accuracy_by_stage(
        curves, title=f"Linear probe of raw stage output, {data.name}", chance=table.rows[0].chance
    )
    plots.save(figure, opened.path / "figures" / "accuracy_by_stage.png")
    return table


def _reopen(rule: str | None, preset: str | None, out: str | Path | None, settings: dict[str, Any]) -> Run:
    if out is None:
        out = _default_folder(resolve(rule or "blockwise", preset, settings))
    opened = runs.load_run(out)
    given = {**settings, "rule": rule, "preset": preset}
    changed = opened.config.changed_by({name: value for name, value in given.items() if value is not None})
    if changed:
        name, (there, here) = next(iter(changed.items()))
        raise UserError(
            f"{out} was started with {name}={there!r}, not {here!r}; resume it without --{name.replace('_', '-')}, "
            "or start another run with another --out"
        )
    # a limit holds for the call that names it: without one, a resumed run goes on to its end
    free = {"max_steps": None, **{name: value for name, value in settings.items() if name in FREE}}
    return Run(opened.path, dataclasses.replace(opened.config, **free))


def _default_folder(config: Config) -> Path:
    parts = [config.rule]
    if config.granularity is not None:
        parts.append(f"g{config.granularity}")
    if config.cuts != "auto":
        parts.append(config.cuts.replace(",", "+"))
    if config.reach is not None:
        parts.append(f"r{config.reach}")
    parts += [config.preset, f"s{config.seed}"]
    rule = get_rule(config.rule)
    usual = {
        **{field.name: field.default for field in dataclasses.fields(config)},
        "objective": rule.objective,
        "readout": rule.readout,
        "noise": str(rule.noise),
        **PRESETS[config.preset],
    }
    named = ("rule", "preset", "granularity", "cuts", "reach", "seed")
    others = {n: value for n, value in config.to_json().items() if n not in (*named, *FREE) and value != usual[n]}
    if others:
        parts.append(f"{key(json.dumps(others, sort_keys=True)) % 16**6:06x}")
    return Path("runs") / "-".join(parts)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not available ({str(error).splitlines()[0]}); allowed: auto, cpu, cuda, cuda:N") from None  # fmt: skip  # noqa: E501
    return device
