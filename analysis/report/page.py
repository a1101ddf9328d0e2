"""From run folders to one HTML page that loads nothing: what `localsim report` does, as a function."""

from __future__ import annotations

import base64
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from localsim import __version__
from localsim.analysis.on_runs import folder_for, refuse_existing
from localsim.analysis.report.asked import IMAGES, Asked
from localsim.analysis.report.elements import Note, Section
from localsim.analysis.report.reported import Reported, by_regime, open_reported
from localsim.errors import UserError, one_of
from localsim.files import write_text
from localsim.runs import Run

SECTIONS = ("runs", "credit", "training", "probes", "similarity", "geometry", "brain", "cost", "remake")
OPTIONAL = ("similarity", "geometry", "cost")
"""Sections that take time, and can be left out."""
FEWEST = 8
"""Images that intervals of geometry can be of."""


def write_report(
    runs: Sequence[str | Path | Run],
    out: str | Path | None = None,
    *,
    images: int = IMAGES,
    measure: str = "cka_debiased",
    brain: Sequence[str | Path] = (),
    without: Sequence[str] = (),
    title: str | None = None,
    rule: str | None = None,
    data: str | None = None,
    data_root: str | None = None,
    device: str | None = None,
    cache: str | None = None,
    progress: bool = False,
) -> Path:
    """Write one HTML page on runs, which loads nothing and runs nothing, and return its path.

    Sections that cannot be made, because the images are not here or a run has no checkpoint, say so in a sentence. The
    same runs and options give the same page, byte for byte, with the same versions.

    Args:
        runs: folders, or runs.
        out: the file, .html; by default in `reports/`, named after the runs.
        images: test images for similarity and geometry, balanced over classes, or all if they are fewer.
        measure: of similarity, see `localsim.analysis.similarity.MEASURES`.
        brain: folders that `localsim brain` saved; by default those in `brain/` that name one of the runs.
        without: of `OPTIONAL`, the sections to leave out.
        title: of the page.
        rule: the file of a rule of one's own; executed.
        data, data_root, device: where the runs' images lie and the networks run now.
        cache: where features are kept for another time, see `features`.
        progress: show bars on a terminal.

    Raises:
        UserError: something asked for cannot be done; the file is there already.
    """
    from localsim.analysis.similarity import get_measure
    from localsim.opening import open_device
    from localsim.rules import get_rule

    for name in without:
        if name not in OPTIONAL:
            raise one_of("section to leave out", name, OPTIONAL)
    if isinstance(images, bool) or not isinstance(images, int) or images < FEWEST:
        raise UserError(f"images is {images!r}; allowed: whole numbers from {FEWEST}")
    get_measure(measure)
    if device is not None:
        open_device(device)
    own = (get_rule(rule).name, Path(rule).name) if rule is not None else None
    reported = open_reported(runs, data=data, data_root=data_root, device=device)
    path = _path(reported, out)
    options = {"images": images if images != IMAGES else None,
               "measure": measure if measure != "cka_debiased" else None,
               "without": ",".join(without) or None, "title": title, "rule": own and own[1]}  # fmt: skip
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    # of places on this machine only the last part
    words += [w for one in brain for w in ("--brain", Path(one).name if Path(one).is_absolute() else str(one))]
    words += [] if out is None else ["--out", path.name]
    with tempfile.TemporaryDirectory() as temporary:
        asked = Asked(images=images, measure=measure, brain=[str(folder) for folder in brain], device=device,
                      cache=cache or temporary, progress=progress)  # fmt: skip
        sections = _sections(reported, asked, without, words, own)
    write_text(path, render(sections, title or _title(reported), _summary(reported)))
    return path


def _path(runs: Sequence[Reported], out: str | Path | None) -> Path:
    """Return where the page goes: a place that is free and can be written; UserError if it is none."""
    parent = None if out is None else str(Path(out).parent)
    folder = folder_for("reports", [run.name.replace("/", "-") for run in runs], parent)
    path = folder.with_name(f"{folder.name}.html") if out is None else Path(out)
    if path.suffix not in (".html", ".htm"):
        raise one_of("format of a report", path.suffix or path.name, (".html",))
    return refuse_existing(path)


def _sections(
    runs: Sequence[Reported],
    asked: Asked,
    without: Sequence[str],
    words: Sequence[str],
    own: tuple[str, str] | None,
) -> list[Section]:
    from matplotlib import rc_context

    from localsim.analysis.report import brains, costs, curves, cuts, depth, likeness, made, probed, remaking

    makers: dict[str, Callable[[], Section]] = {
        "brain": lambda: brains.section(runs, asked),  # first, for a folder may not be what it is said to be
        "runs": lambda: made.section(runs),
        "credit": lambda: cuts.section(runs),
        "training": lambda: curves.section(runs),
        "probes": lambda: probed.section(runs),
        "similarity": lambda: likeness.section(runs, asked),
        "geometry": lambda: depth.section(runs, asked),
        "cost": lambda: costs.section(runs),
        "remake": lambda: remaking.section(runs, words, own),
    }
    # a name with dollars in it is a name, and no formula that may be wrong
    with rc_context({"text.parse_math": False}):
        found = {name: make() for name, make in makers.items() if name not in without}
    for name in without:
        words_for = {"similarity": "Similarity", "geometry": "Geometry", "cost": "Cost"}[name]
        found[name] = Section(name, words_for, "", [Note(f"Left out as asked: --without {name}.")])
    return [found[name] for name in SECTIONS]


def render(sections: Sequence[Section], title: str, summary: str) -> str:
    """Return the page: everything but the style is escaped."""
    from jinja2 import Environment, StrictUndefined

    here = files("localsim.analysis.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = here.joinpath("style.css").read_text(encoding="utf-8")
    # as a browser counts it: what stands between the tags
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    fields: dict[str, Any] = {"sections": sections, "title": title, "summary": summary, "style": style,
                              "digest": digest, "version": __version__}  # fmt: skip
    return environment.from_string(here.joinpath("page.html.j2").read_text(encoding="utf-8")).render(fields)


def _title(runs: Sequence[Reported]) -> str:
    rules = list(dict.fromkeys(run.run.config.rule for run in runs))
    return "localsim report: " + (", ".join(rules) if len(rules) <= 5 else f"{len(rules)} rules")


def _summary(runs: Sequence[Reported]) -> str:
    regimes = by_regime(runs)
    seeds = [f"{regime} ({len(mine)} seed{'s' * (len(mine) > 1)})" for regime, mine in regimes.items()]
    data = ", ".join(dict.fromkeys(Path(run.run.config.data).name for run in runs))
    return f"{'; '.join(seeds)}. Trained on {data}."
