"""Section: the commands that make the runs and the page again, versions, and configurations in full."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from localsim import __version__
from localsim.analysis.report.elements import Code, Fold, Note, Part, Section, Table, Text, said
from localsim.analysis.report.made import shown_setting
from localsim.analysis.report.reported import Reported, by_regime
from localsim.config import FREE, Config
from localsim.errors import UserError
from localsim.presets import PRESETS, resolve

OPTIONS = ("granularity", "cuts", "reach", "objective", "readout", "noise", "backbone", "data", "data_root", "epochs",
           "batch_size", "lr", "seed")  # fmt: skip
"""Settings that `localsim run` has an option for; the others go by --set."""
PLACES = {"data": "IMAGES", "data_root": "DATA_ROOT"}
"""Settings that hold paths, and the variable of the shell that stands for them."""
VERSIONS = ("localsim", "python", "torch", "torchvision", "numpy", "processor", "gpu", "threads")


def section(runs: Sequence[Reported], page_words: Sequence[str], rule: tuple[str, str] | None) -> Section:
    """Return the section.

    Args:
        runs: of the report.
        page_words: the options that this page was made with, the runs left out.
        rule: name and file of a rule of one's own.
    """
    parts: list[Part] = []
    lines = []
    for run in runs:
        try:
            lines.append(run_command(run, rule))
        except UserError as error:
            parts.append(Note(f"No command can be given for {run.label}: {said(error)}"))
            continue
        if run.run.config.probe_protocol == "none" and (run.run.path / "probe.json").exists():
            lines.append(f"localsim probe {shlex.quote(run.name)}")
    lines.append(shlex.join(["localsim", "report", *(run.name for run in runs), *page_words]))
    parts.insert(0, Code("Commands that make the runs and this page again", "\n".join(lines)))
    if any(f"${place}" in line for line in lines for place in PLACES.values()):
        parts.insert(1, Text("DATA_ROOT stands for where named data sets lie, IMAGES for the folder of images: the "
                             "places of the machine at hand are no part of this page."))  # fmt: skip
    parts += [_versions(runs), *_configurations(runs)]
    return Section(
        "remake", "How to remake it",
        "Commands were derived from the configurations and checked to give them again; the runs are bit for bit the "
        "same on the same kind of machine with the same versions and as many threads, elsewhere up to rounding and "
        f"what rounding does to a run. This page was made by localsim {__version__} and bears no date: the same runs "
        "and options give the same page. Host names are left out.",
        parts,
    )  # fmt: skip


def run_command(run: Reported, rule: tuple[str, str] | None = None) -> str:
    """Return the command line that makes a run of this configuration.

    Args:
        run: whose configuration.
        rule: name and file of a rule of one's own.

    Raises:
        UserError: its rule is not known, or no settings give the configuration.
    """
    config = run.run.config
    given = needed_settings(config)
    name = rule[1] if rule is not None and rule[0] == config.rule else config.rule
    words = ["localsim", "run", "--rule", shlex.quote(name), "--preset", shlex.quote(config.preset)]
    if config.data_root is not None:
        given["data_root"] = config.data_root
    given |= {name: getattr(config, name) for name in ("max_steps", "snapshot_every") if getattr(config, name)}
    for name in sorted(given, key=lambda name: (name not in OPTIONS, name)):
        value = given[name]
        if name in PLACES and shown_setting(name, value) != value:
            shown = f'"${PLACES[name]}"'
        else:
            shown = shlex.quote(str(value) if name in OPTIONS else f"{name}={_as_setting(value)}")
        words += [f"--{name.replace('_', '-')}" if name in OPTIONS else "--set", shown]
    return " ".join([*words, "--out", shlex.quote(run.name)])


def needed_settings(config: Config) -> dict[str, Any]:
    """Return the settings that, beside rule and preset, give a configuration: none of them can be left out.

    Raises:
        UserError: the rule is not known, or no settings do.
    """
    given: dict[str, Any] = {"num_classes": config.num_classes}
    if config.preset in PRESETS and not PRESETS[config.preset]["data"]:
        given["data"] = config.data
    for _ in range(4):  # a setting may bring others with it
        apart = _apart(config, given)
        if not apart:
            break
        given |= {name: getattr(config, name) for name in apart}
    else:
        raise UserError(f"no settings of rule {config.rule} in this version give {', '.join(apart)} again")
    for name in list(given):
        less = {other: value for other, value in given.items() if other != name}
        try:
            if not _apart(config, less):
                given = less
        except UserError:  # cannot do without it
            pass
    return {name: value for name, value in given.items() if value is not None}


def _apart(config: Config, given: dict[str, Any]) -> list[str]:
    """Return the settings that decide numbers and that `given` does not give."""
    made = resolve(config.rule, config.preset, given)
    return [name for name in Config.names() if name not in FREE and getattr(made, name) != getattr(config, name)]


def _as_lines(settings: dict[str, Any]) -> str:
    """Return JSON with a line for each setting."""
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in settings.items()) + "\n}"


def _as_setting(value: Any) -> str:
    """Return a value as `--set` reads it: JSON, or a word that is none."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value)


def _versions(runs: Sequence[Reported]) -> Table | Note:
    rows = []
    for run in runs:
        try:
            starts = run.starts
        except UserError:
            starts = []
        if starts:
            rows.append([run.label, *(str(starts[-1].get(name) or "none") for name in VERSIONS), str(len(starts))])
    if not rows:
        return Note("The run folders do not say with which versions they were made.")
    head = ["run", *VERSIONS, "starts"]
    return Table("Versions and kind of machine at the last start of each run.", head, rows, names=range(len(head) - 1))


def _configurations(runs: Sequence[Reported]) -> list[Part]:
    parts: list[Part] = []
    for regime, (run, *others) in by_regime(runs).items():
        shown = {
            name: shown_setting(name, value) if name in PLACES and value is not None else value
            for name, value in run.run.config.to_json().items()
        }
        also = "".join(f", {other.run.config.seed}" for other in others)
        parts.append(Fold(
            f"Configuration of {regime}, seed {run.run.config.seed}{f'; the same with seed{also[1:]}' if also else ''}",
            [Code(f"Configuration of {regime}", _as_lines(shown))],
        ))  # fmt: skip
    return parts
