"""From a rule's name to a trained, probed and plotted run: what `localsim run` does, as functions."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from localsim import runs
from localsim.analysis import plots
from localsim.analysis.stage_probe import probe
from localsim.assembly import build_network, build_trunk, trunk_size
from localsim.backbones import Backbone, unit_shapes
from localsim.checksums import set_damaged_aside
from localsim.config import FREE, Config
from localsim.credit import Credit
from localsim.data import Batch, Data, ViewLoader
from localsim.distributed.team import Team, join
from localsim.errors import UserError
from localsim.files import write_text
from localsim.network import LocalNetwork
from localsim.opening import open_data, open_device, open_loader
from localsim.partition import cut_table
from localsim.plan import describe, draw_credit, draw_views, peak_memory
from localsim.presets import PRESETS, resolve
from localsim.rng import key
from localsim.rules import get_rule
from localsim.rules.choices import merged
from localsim.runs import Run
from localsim.schedule import Schedule
from localsim.sources import scaled_views
from localsim.train import OnMetrics, StepCost, rehearse, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Say = Callable[[str], None]


def run(
    rule: str | None = None,
    *,
    preset: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    credit: Credit | Mapping[str, Any] | None = None,
    quiet: bool = False,
    on_metrics: OnMetrics | None = None,
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
        credit: a matrix of your own in place of the rule's, as a `Credit` or as `Credit.to_config()`.
        quiet: print and show nothing.
        on_metrics: a function that is called with every row of `metrics.jsonl`, a dictionary, right after it was
            written: for a plot that grows or for another tracker of experiments. What it raises ends the run, which
            can be resumed.
        settings: any field of `localsim.config.Config`, e.g. `granularity=4, epochs=10, batch_size=128`.

    Returns:
        The run, finished.

    Raises:
        UserError: something asked for cannot be done.
        localsim.train.TrainingFailed: a loss is not finite or a stage has collapsed.
        ProcessLost: of several processes that train together, one is gone or does not answer.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was written.
    """
    if credit is not None:
        settings["credit"] = credit.to_config() if isinstance(credit, Credit) else credit
    settings = {name: value for name, value in settings.items() if value is not None}
    began = time.monotonic()
    with ExitStack() as held:
        with join(_timeout_seconds(rule, preset, out, settings, resume)) as team:
            say: Say = print if team.writes and not quiet else lambda _text: None
            with team.together():
                opened = _reopen(rule, preset, out, settings) if resume else _open_new(rule, preset, out, settings)
                # all that can be wrong with a configuration shows here, before a folder is made
                prepared = prepare(opened.config, team)
            with team.together():
                if team.writes:
                    held.enter_context(runs.writing(opened.path))
                    _start(opened, prepared, say, new=not resume, processes=team.size)
            with team.watched(opened.path):
                _train(opened, prepared, team, say, progress=team.writes and not quiet, on_metrics=on_metrics)
                unreadable = team.everyones(prepared.loader.skipped)
        if team.writes:
            _conclude(opened, prepared, say, num_skipped=len(unreadable), whole=team.relay is None)
            say(f"\ndone in {(time.monotonic() - began) / 60:.1f} min; figures in {opened.path / 'figures'}")
    return opened


def _timeout_seconds(
    rule: str | None, preset: str | None, out: str | Path | None, settings: Mapping[str, Any], resume: bool
) -> float | None:
    """Return how long to wait for other processes: as given, or as the run that goes on has it; None for neither."""
    with suppress(UserError):  # of all processes one says what is wrong, when they have met
        if "timeout_seconds" in settings:
            return resolve("blockwise", None, {"timeout_seconds": settings["timeout_seconds"]}).timeout_seconds
        if resume:
            return runs.load_run(_folder(rule, preset, out, settings)).config.timeout_seconds
    return None


def _open_new(rule: str | None, preset: str | None, out: str | Path | None, settings: dict[str, Any]) -> Run:
    config = resolve(rule or "blockwise", preset, settings)
    opened = Run(Path(out) if out is not None else _default_folder(config), config)
    runs.refuse_existing(opened.path)
    if opened.path.is_dir() and any(one.name != "lock" for one in opened.path.iterdir()):
        raise UserError(f"{opened.path} holds something else than a run; choose another --out, or an empty folder")
    return opened


@dataclass(frozen=True)
class Prepared:
    """A configuration made real: images in reach, a network on its device, and what the run will say of itself."""

    data: Data
    net: LocalNetwork
    loader: ViewLoader
    plan: str
    views: Figure
    cost: StepCost | None  # None where nothing is trained, and where this process is to have some of the stages only


def prepare(config: Config, team: Team | None = None) -> Prepared:
    """Build the network, open the images, rehearse a step: what is wrong shows before a folder is made.

    Of several processes each rehearses its own share of a batch, and says nothing to the others.
    """
    from localsim.analysis.probes import MIN_TEST_IMAGES

    team = team or Team()
    device = open_device(team.device(config.device))
    trunk = backbone, stages = build_trunk(config)
    team.arrange(config, len(stages))
    # before the network is made of it: a transport changes what autograd holds of a layer
    cuts = cut_table(backbone, stages, trunk_size(config))
    net = build_network(config, trunk).to(device)
    if config.channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    check_precision(config, net, backbone)
    if config.compile:
        net.compile_stages()
    data = open_data(config)
    loader = open_loader(config, data, device, share=(team.copy, team.copies))
    first_views = loader
    if len(net.taps):
        schedule = Schedule.of(config, loader.steps_per_epoch, len(net.taps))
        schedule.optimizer(net, config)
        first_views = scaled_views(net, loader, config, schedule.phases[0])
    if data.test is not None and len(data.test) < MIN_TEST_IMAGES and config.probe_protocol != "none":
        raise UserError(
            f"{data.name!r} has {len(data.test)} test images; a probe needs {MIN_TEST_IMAGES} or more "
            "(--set probe_protocol=none trains without one)"
        )
    batch = next(iter(first_views.epoch(0)))
    check_labels(config, net, data, batch)
    cost = rehearse(net, batch, config) if len(net.taps) and team.groups is None else None
    plan = "\n".join([describe(config, net, cuts, data, loader, cost), *team.describe()])
    return Prepared(data, net, loader, plan, draw_views(data, batch, net.patches), cost)


def check_precision(config: Config, net: LocalNetwork, backbone: Backbone) -> None:
    """Raise UserError where torch's bfloat16 convolutions on the CPU return garbage as the gradient of their weights.

    A strided convolution whose kernel is larger than its map of one position leaves part of that gradient unwritten
    (seen with torch 2.15: whatever the memory held before, now and then not a number).
    """
    if config.precision != "bf16" or net.device.type != "cpu" or not len(net.taps):
        return
    shapes = unit_shapes(backbone, trunk_size(config))
    for unit, (_, height, width) in zip(net.units[1:], shapes, strict=False):
        convolutions = [module for module in unit.modules() if isinstance(module, torch.nn.Conv2d)]
        if height == width == 1 and any(c.stride[0] > 1 and c.kernel_size[0] > 1 for c in convolutions):
            raise UserError(
                f"{unit.name} of {config.backbone} gets maps of one position, on which bf16 gradients are wrong on the "
                f"CPU; give --set precision=full, {'larger patches' if net.patches else 'larger images'} or another "
                "backbone"
            )


def check_labels(config: Config, net: LocalNetwork, data: Data, batch: Batch) -> None:
    """Raise UserError if a tap needs labels that the training images lack, or other classes than they have."""
    if not any(getattr(tap.objective, "needs_labels", False) for tap in net.taps):
        return
    if batch.labels is None:
        raise UserError(f"objective {config.objective} needs labels, which the training images of {data.name!r} lack")
    if len(data.classes) != config.num_classes:
        raise UserError(
            f"{data.name!r} has {len(data.classes)} classes, but num_classes is {config.num_classes}; "
            f"give --set num_classes={len(data.classes)}"
        )


def _start(opened: Run, prepared: Prepared, say: Say, *, new: bool, processes: int) -> None:
    path = opened.path
    if new:
        runs.start_run(path, opened.config)
    set_damaged_aside(path)
    runs.record_environment(path, processes)
    write_text(path / "plan.txt", prepared.plan + "\n")
    say(prepared.plan + f"\n\nrun folder: {path}\n")
    plots.save(prepared.views, path / "figures" / "views.png")
    plots.save(draw_credit(prepared.net), path / "figures" / "credit.png")


def _train(
    opened: Run, prepared: Prepared, team: Team, say: Say, *, progress: bool, on_metrics: OnMetrics | None
) -> None:
    path, config, net, loader = opened.path, opened.config, prepared.net, prepared.loader
    if not len(net.taps):
        return
    began = time.monotonic()
    total = Schedule.of(config, loader.steps_per_epoch, len(net.taps)).total_steps
    if team.writes and (before := runs.checkpoint_step(path)):
        say(f"continued after step {before} of {total}\n")
        if before < total:
            runs.set_probe_aside(path, before)
    num_classes = len(prepared.data.classes)
    step = train(
        net, loader, config, path, num_classes=num_classes, progress=progress, on_metrics=on_metrics, team=team
    )
    if not team.writes:
        return
    if rows := runs.read_metrics(path):
        plots.save(plots.loss_curves(rows), path / "figures" / "loss.png")
    say(f"trained {step} steps in {(time.monotonic() - began) / 60:.1f} min; {peak_memory(net.device)}\n")
    if step < total:
        say(f"stopped by max_steps after {step} of {total} steps; continue with --resume\n")


def _conclude(opened: Run, prepared: Prepared, say: Say, *, num_skipped: int, whole: bool) -> None:
    path, data = opened.path, prepared.data
    if num_skipped := num_skipped + data.num_skipped:
        say(f"skipped {num_skipped} unreadable images (the warnings name them)\n")
    if data.test is None:
        say(f"data set {data.name!r} has no labels: nothing to probe")
    elif opened.config.probe_protocol == "none":
        say(f"not probed; `localsim probe {path} --protocol logistic` does it")
    else:
        # of a network whose stages were spread over processes, the folder alone has all weights
        say(str(probe(opened, data=data, trained=prepared.net if whole else None)))


def _reopen(rule: str | None, preset: str | None, out: str | Path | None, settings: dict[str, Any]) -> Run:
    opened = runs.load_run(_folder(rule, preset, out, settings))
    given = {**settings, "rule": get_rule(rule).name if rule else None, "preset": preset}
    for options in ("objective_options", "head_options"):
        if isinstance(given.get(options), dict):
            # a rule's options stay but for those given: those of the run count as said again
            given[options] = merged(getattr(opened.config, options), given[options])
    changed = opened.config.changed_by({name: value for name, value in given.items() if value is not None})
    if changed:
        name, (there, here) = next(iter(changed.items()))
        raise UserError(
            f"{opened.path} was started with {name}={there!r}, not {here!r}; resume it without "
            f"--{name.replace('_', '-')}, or start another run with another --out"
        )
    # a limit holds for the call that names it: without one, a resumed run goes on to its end
    free = {"max_steps": None, **{name: value for name, value in settings.items() if name in FREE}}
    return Run(opened.path, dataclasses.replace(opened.config, **free))


def _folder(rule: str | None, preset: str | None, out: str | Path | None, settings: Mapping[str, Any]) -> Path:
    """Return the folder of a run: `out`, or the one that its settings give it."""
    return _default_folder(resolve(rule or "blockwise", preset, settings)) if out is None else Path(out)


def _default_folder(config: Config) -> Path:
    parts = [config.rule]
    if config.granularity is not None:
        parts.append(f"g{config.granularity}")
    if config.cuts != "auto":
        parts.append(config.cuts.replace(",", "+"))
    if config.reach is not None:
        parts.append(f"r{config.reach}")
    parts += [config.preset, f"s{config.seed}"]
    data = {"data": config.data} if not PRESETS[config.preset]["data"] else {}
    usual = resolve(config.rule, config.preset, data).to_json()
    named = ("rule", "preset", "granularity", "cuts", "reach", "seed")
    others = {n: value for n, value in config.to_json().items() if n not in (*named, *FREE) and value != usual[n]}
    if others:
        parts.append(f"{key(json.dumps(others, sort_keys=True)) % 16**6:06x}")
    return Path("runs") / "-".join(parts)
