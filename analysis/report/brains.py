"""Section: scores against neural recordings that `localsim brain` has saved."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localsim.analysis.report.asked import Asked
from localsim.analysis.report.elements import (
    Note,
    Part,
    Section,
    Table,
    Text,
    Title,
    in_interval,
    listed,
    png_picture,
)
from localsim.analysis.report.reported import Reported
from localsim.errors import UserError

SAVED = "brain.json"
FIGURES = {"regimes": "Scores against depth, by region, as localsim brain drew them.",
           "differences": "Paired differences between regimes and from their untrained networks, as `localsim brain` "
                          "drew them."}  # fmt: skip


def section(runs: Sequence[Reported], asked: Asked) -> Section:
    """Return the section; UserError where a folder was given that holds no scores."""
    files = [file for folder in asked.brain for file in _files(Path(folder))]
    if not asked.brain:  # where `localsim brain` saves unless it is told otherwise
        files = [file for file in sorted(Path("brain").glob(f"*/*/{SAVED}")) if _paths(file) & _places(runs)]
    parts: list[Part] = []
    for file in files:
        parts += _scored(file, runs)
    if not files:
        folders = shlex.join(run.name for run in runs)
        parts.append(Note("There are no scores of these runs. This makes them, and --brain shows them here:",
                          f"localsim brain {folders} --recordings FOLDER"))  # fmt: skip
    return Section(
        "brain", "Brain scores",
        "How well layers predict, or are arranged like, neural responses, by layer and region, beside the untrained "
        "network and baselines that are no networks. Read from what localsim brain has saved; nothing is computed "
        "here. No best layer is chosen: to choose one on the scores that are shown would flatter every network.",
        parts,
    )  # fmt: skip


def _files(folder: Path) -> list[Path]:
    found = [folder / SAVED] if (folder / SAVED).is_file() else sorted(folder.glob(f"*/{SAVED}"))
    if not found:
        raise UserError(f"{folder} holds no scores of `localsim brain`: neither it nor a folder in it has a {SAVED}")
    return found


def _read(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["rows"] and found["metric"]["name"] and found["record"]:
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{file} cannot be read as scores of `localsim brain`")


def _paths(file: Path) -> set[Path]:
    """Return the run folders that scores are of; a name alone does not tell: cells of all sweeps are called alike."""
    try:
        return {Path(one).resolve() for one in _read(file)["record"].get("runs", ())}
    except (UserError, TypeError, AttributeError):
        return set()


def _places(runs: Sequence[Reported]) -> set[Path]:
    return {run.run.path.resolve() for run in runs}


def _scored(file: Path, runs: Sequence[Reported]) -> list[Part]:
    found = _read(file)
    try:
        metric, rows = found["metric"], [row for row in found["rows"] if row["step"] is None]
        parts: list[Part] = [
            Title(f"{metric['name']}, {file.parent.parent.name}"),
            Text(f"{metric['summary']} Source: {metric['source']}."),
            *_tables(rows, found["record"]),
        ]
        for name, caption in FIGURES.items():
            path = file.parent / f"{name}.png"
            if path.is_file():
                alt = _alt(rows) if name == "regimes" else _differences_alt(found.get("differences") or ())
                parts.insert(2, png_picture(path.read_bytes(), alt, caption))
    except UserError:  # which is a ValueError too
        raise
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{file} is not of this version of localsim") from None
    theirs, ours = {path.name for path in _paths(file)}, {path.name for path in _places(runs)}
    if others := theirs - ours:
        parts.append(Note(f"These scores are also of runs that this report is not of: {', '.join(sorted(others))}."))
    if missing := ours - theirs:
        parts.append(Note(f"They are not of {', '.join(sorted(missing))}."))
    if moved := {path.name for path in _places(runs) - _paths(file)} & theirs:
        names = ", ".join(sorted(moved))
        parts.append(Note(f"They were made of folders called {names} in another place: the same runs if moved since."))
    return parts


def _headline(rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return recordings and regions; of a region with several recordings their mean only."""
    pooled = {(one, group["region"]) for group in record.get("pooled", ()) for one in group["of"]}
    places = dict.fromkeys((row["recording"], row["region"]) for row in rows)
    return [place for place in places if place not in pooled]


def _tables(rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> list[Table]:
    made = []
    over = record.get("interval") or "nothing: there are none"
    for recording, region in _headline(rows, record):
        mine = [row for row in rows if (row["recording"], row["region"]) == (recording, region)]
        lines = [
            [f"{row['regime']}" + ("" if row["seed"] is None else f", seed {row['seed']}"), str(row["layer"]),
             in_interval(row["value"], row["low"], row["high"]), in_interval(row["chance"], None, None),
             in_interval(row["ceiling"], None, None), in_interval(row["ceiled"], None, None)]
            for row in mine
        ]  # fmt: skip
        first = mine[0]
        made.append(Table(
            f"{region}, {'mean over recordings' if recording == 'all' else f'recording {recording}'}: raw scores with "
            f"95 % intervals over {over}; n = {first['n']} images, {first['neurons']} neurons or matrices. Chance: "
            "every image gets the responses to another.",
            ["network", "layer", "score", "chance", "ceiling", "score / ceiling"], lines, names=(0, 1),
        ))  # fmt: skip
    return made


def _alt(rows: Sequence[Mapping[str, Any]]) -> str:
    told = []
    for region in dict.fromkeys(row["region"] for row in rows):
        for regime in dict.fromkeys(row["regime"] for row in rows):
            values = [row["value"] for row in rows if (row["region"], row["regime"]) == (region, regime)]
            if values:
                ends = f"{min(values):.2f}" if len(values) == 1 else f"{min(values):.2f} to {max(values):.2f}"
                told.append(f"{region}, {regime}: {ends}")
    return f"Brain scores by layer. Range over layers and seeds: {listed(told)}"


def _differences_alt(rows: Sequence[Mapping[str, Any]]) -> str:
    told = [f"{row['regime']} minus {row['reference']} at {row['layer']} for {row['region']}: "
            f"{in_interval(row['value'], row['low'], row['high'], '+.3f')}" for row in rows]  # fmt: skip
    return f"Differences of brain scores. {listed(told, 6)}"
