"""Writes docs/api.md from the docstrings: `python docs/api_reference.py > docs/api.md`."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import localsim
from localsim import analysis
from localsim.analysis import brain, similarity
from localsim.config import FREE, Config
from localsim.presets import resolve

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# Reference

Made by `python docs/api_reference.py` from the docstrings; a test compares the two. The [guides](README.md) show how
the parts go together. A function that cannot do what it is asked raises `localsim.UserError`, whose message is one
sentence with the offending value and what is allowed. Stages and taps count from 0 in Python, from 1 in text.
"""
WIDTH = 100
# at the beginning of a line of a docstring
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises):$")


@dataclass(frozen=True)
class Entry:
    """A public name: how it is imported, and what it is."""

    module: str
    name: str
    what: Any

    @property
    def path(self) -> str:
        """What a user types, e.g. `localsim.analysis.cka`."""
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Docstring:
    """A docstring in its parts: one sentence, the rest of the text, and sections of `(name, text)`."""

    summary: str
    text: str
    sections: Mapping[str, list[tuple[str, str]]]

    @classmethod
    def of(cls, what: Any) -> Docstring:
        """Read the docstring of an object, or the text of one."""
        lines = inspect.cleandoc(what if isinstance(what, str) else own_docstring(what)).splitlines()
        body: list[str] = []
        sections: dict[str, list[str]] = {}
        into = body
        for line in lines:
            if found := SECTION.match(line):
                into = sections.setdefault(found[1], [])
            elif line and not line.startswith(" ") and into is not body:
                into = body  # text after a section
                body += ["", line]
            else:
                into.append(line)
        summary, _, rest = "\n".join(body).partition("\n\n")
        return cls(" ".join(summary.split()), rest.strip("\n"), {name: items(part) for name, part in sections.items()})


def own_docstring(what: Any) -> str:
    """Return the docstring that an object itself has: not an inherited one, nor the one that dataclasses make."""
    made = f"{getattr(what, '__name__', '')}("
    text = vars(what).get("__doc__") if inspect.isclass(what) else getattr(what, "__doc__", None)
    return "" if not text or text.startswith(made) else text


def items(lines: list[str]) -> list[tuple[str, str]]:
    """Return the entries of a section: `name: text` with indented continuations; without names, one text."""
    found: list[tuple[str, list[str]]] = []
    for line in inspect.cleandoc("\n" + "\n".join(lines)).splitlines():
        start = re.match(r"((?:\*{0,2}\w[\w.]*(?:, )?)+): (.*)", line)
        if start:
            found.append((start[1], [start[2]]))
        elif found:
            found[-1][1].append(line)
        elif line:
            found.append(("", [line]))
    return [(name, " ".join(" ".join(text).split())) for name, text in found]


# -- what is public ---------------------------------------------------------------------------------------------------


def listed(module: str, *names: str) -> list[Entry]:
    """Return the named things of a module."""
    found = importlib.import_module(module)
    return [Entry(module, name, getattr(found, name)) for name in names]


def functions_of(module: str) -> list[Entry]:
    """Return the public functions and classes that a module defines, in the order of its source."""
    found = importlib.import_module(module)
    return [
        Entry(module, name, what)
        for name, what in vars(found).items()
        if not name.startswith("_") and getattr(what, "__module__", "") == module and callable(what)
    ]


def exported(package: ModuleType, *, leave: tuple[str, ...] = ()) -> list[Entry]:
    """Return what a package exports and that is no module, but for what has its place elsewhere."""
    entries = listed(package.__name__, *(name for name in package.__all__ if name not in leave))
    return [entry for entry in entries if not inspect.ismodule(entry.what)]


def groups() -> dict[str, list[Entry]]:
    """Return all public names by task."""
    measures = set(similarity.__all__)
    rest_of_similarity = tuple(name for name in similarity.__all__ if name in analysis.__all__)
    shared = [entry for entry in exported(analysis) if entry.name in measures]
    return {
        "Train, open, build": [
            *exported(localsim, leave=("Credit",)),
            *listed("localsim.runs", "Run"),
        ],
        "Credit": listed("localsim.credit", "Credit"),
        "The step": [
            *listed("localsim.engine", "backward", "Hooks"),
            *listed("localsim.network", "LocalNetwork", "Tap", "Stage"),
        ],
        "Rules": [
            *listed("localsim.rules", "Rule", "get_rule", "load_rule", "own_rules"),
            *listed("localsim.rules.objectives", "OBJECTIVES", "make_objective"),
            *listed("localsim.rules.heads", "HEADS", "make_head"),
            *listed("localsim.rules.readouts", "make_readout"),
            *listed("localsim.rules.site", "Site"),
            *listed("localsim.rules.noise", "Noise"),
            *listed("localsim.gradients", "constant"),
        ],
        "Backbones": [
            *listed("localsim.backbones", "register_backbone", "build_backbone", "BACKBONES"),
            *listed("localsim.unit_blocks", "UnitBlock", "Backbone"),
            *listed("localsim.partition", "partition"),
        ],
        "Presets and cost": [
            *listed("localsim.presets", "resolve", "PRESETS"),
            *listed("localsim.cost", "cost", "Cost"),
        ],
        "Features, comparisons, probes": [
            entry for entry in exported(analysis) if entry.name not in measures
        ],
        "Measures of similarity": [*shared, *exported(similarity, leave=rest_of_similarity)],
        "Statistics": listed("localsim.analysis.statistics", "centred_interval"),
        "Geometry": functions_of("localsim.analysis.geometry"),
        "Recordings and the brain": exported(brain),
        "Plots": functions_of("localsim.analysis.plots"),
    }  # fmt: skip


# -- as Markdown ------------------------------------------------------------------------------------------------------


def signature_of(function: Callable[..., Any], *, types: bool = True) -> str:
    """Return the parameters as Python would write them: annotations as in the source, no addresses of objects."""
    if inspect.isclass(function) and issubclass(function, BaseException):
        return "(message)"
    shown, kinds = [], inspect.Parameter
    star = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is kinds.KEYWORD_ONLY and not star:
            shown.append("*")
        star = star or parameter.kind in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL)
        text = {kinds.VAR_POSITIONAL: "*", kinds.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name
        typed = types and parameter.annotation is not kinds.empty
        if typed:
            text += f": {as_type(parameter.annotation)}"
        if parameter.default is not kinds.empty:
            text += f" = {as_value(parameter.default)}" if typed else f"={as_value(parameter.default)}"
        shown.append(text)
    return f"({', '.join(shown)})" if len(", ".join(shown)) < WIDTH else "(\n    " + ",\n    ".join(shown) + ",\n)"


def as_type(annotation: Any) -> str:
    """Return an annotation as it stands in the source."""
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def as_value(value: Any) -> str:
    """Return a default value as Python would write it."""
    if callable(value):
        return getattr(value, "__name__", "...")
    return "..." if repr(value).startswith("<") else repr(value)


def in_markdown(text: str) -> str:
    """Return the text of a docstring: indented lines as code, what would be HTML escaped outside of code."""
    parts: list[str] = []
    for paragraph in re.split(r"\n{2,}", text):
        if paragraph.startswith("    "):
            parts.append(f"```text\n{inspect.cleandoc(chr(10) + paragraph)}\n```")
        elif paragraph:
            parts.append(escaped(paragraph))
    return "\n\n".join(parts)


def escaped(text: str) -> str:
    """Return text in which `<` and `*` mean themselves, but for what is code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([<*])", r"\\\1", part) for part in parts)


def described(entry: Entry) -> str:
    """Return the section of a public name."""
    lines = [f'<a id="{entry.path}"></a>', "", f"### `{entry.path}`", ""]
    if not callable(entry.what):
        return "\n".join([*lines, escaped(comment_of(entry)), "", shown_value(entry.what), "", source_of(entry), ""])
    told = Docstring.of(entry.what)
    returns = "" if inspect.isclass(entry.what) else as_type(inspect.signature(entry.what).return_annotation)
    arrow = f" -> {returns}" if returns and returns != "_empty" else ""
    lines += ["```text", f"{entry.name}{signature_of(entry.what)}{arrow}", "```", "", escaped(told.summary), ""]
    if told.text:
        lines += [in_markdown(told.text), ""]
    for section, entries in told.sections.items():
        lines += [f"**{section}**", ""]
        lines += [f"- `{name}`: {escaped(text)}" if name else f"- {escaped(text)}" for name, text in entries]
        lines.append("")
    if methods := [f"- {member}" for member in members(entry.what)]:
        lines += ["**Members**", "", *methods, ""]
    return "\n".join([*lines, source_of(entry), ""])


def members(what: Any) -> Iterator[str]:
    """Yield the methods and properties that a class adds, each with its sentence."""
    if not inspect.isclass(what):
        return
    for name, member in vars(what).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if name.startswith("_") or not (inspect.isfunction(function) or isinstance(function, property)):
            continue
        call = "" if isinstance(function, property) else " ".join(signature_of(function, types=False).split())
        yield f"`.{name}{call}`: {escaped(Docstring.of(function).summary)}"


def shown_value(value: Any) -> str:
    """Return what a registry or a tuple of names holds."""
    return ", ".join(f"`{name}`" for name in value)


@cache
def comments_in(file: Path) -> dict[str, str]:
    """Return the texts that stand under the assignments of a file."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    found = {}
    for node, after in pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            found |= {target.id: after.value.value for target in targets if isinstance(target, ast.Name)}
    return found


def comment_of(entry: Entry) -> str:
    """Return the text under the assignment that makes a value, in the file that is imported or one beside it."""
    file = file_of(entry)
    texts = [comments_in(path).get(entry.name) for path in (file, *sorted(file.parent.rglob("*.py")))]
    return " ".join(next((text for text in texts if text), "").split())


def file_of(entry: Entry) -> Path:
    """Return the file that defines a name."""
    module = entry.what.__module__ if callable(entry.what) else entry.module
    return Path(inspect.getfile(importlib.import_module(module))).resolve()


def source_of(entry: Entry) -> str:
    """Return a link to the file that defines a name."""
    path = file_of(entry).relative_to(ROOT).as_posix()
    return f"Source: [{path}](../{path})"


def summary_of(entry: Entry) -> str:
    """Return the one sentence of a name."""
    return Docstring.of(entry.what if callable(entry.what) else comment_of(entry)).summary


def configuration() -> str:
    """Return the table of all settings, with what they are under two presets."""
    quick, full = (resolve("blockwise", preset).to_json() for preset in ("quick", "imagenet"))
    lines = [
        "## Configuration", "",
        "The fields of `localsim.config.Config`: keyword arguments of `localsim.run` and `localsim.build`, and on the "
        "command line `--set NAME=VALUE`. Values are those of the rule `blockwise` under two presets. A field marked * "
        "does not change the numbers, and may differ when a run is resumed.",
    ]  # fmt: skip
    for heading, rows in fields():
        lines += ["", f"**{heading[0].upper()}{heading[1:]}**", ""]
        lines += ["| field | `quick` | `imagenet` | meaning |", "|---|---|---|---|"]
        for name, meaning in rows:
            cells = [f"`{name}`" + " *" * (name in FREE), as_cell(quick[name]), as_cell(full[name]), meaning]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, "", "Source: [localsim/config.py](../localsim/config.py)", ""])


# fields whose names say enough in the source
PLAIN = {
    "rule": "a name of `localsim rules`",
    "preset": "quick, cifar10, stl10, folder, imagenet",
    "readout": "one, or one per tap",
    "head": "one, or one per tap",
    "head_options": "as `objective_options`",
    "backbone": "a name of `localsim.backbones.BACKBONES`, or a registered one",
    "stem": "imagenet, or cifar: one 3x3 convolution, no pooling",
    "zero_init_residual": "residual branches start at zero",
    "test_images": "a class-balanced part of the test images; None: all",
    "augmentation": "barlow_twins, small, small_strong, crop_flip, ...",
    "epochs": "passes over the training images",
    "batch_size": "images in a step",
    "optimizer": "lars, sgd, adamw, ...",
    "weight_decay": "of weights; not of biases and norms",
    "warmup_epochs": "of linearly rising learning rate",
    "channels_last": "layout of maps in memory",
    "seed": "of initialisation, order, views and noise",
    "device": "auto, cpu, cuda, cuda:N",
}  # fmt: skip


def fields() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the headings of the configuration with `(field, meaning)`, from the comments in its source."""
    heading, rows = "", []
    for line in inspect.getsource(Config).splitlines():
        if found := re.match(r"    # (.+)", line):
            if rows:
                yield heading, rows
            heading, rows = found[1], []
        elif found := re.match(r"    (\w+): .*?(?:  # (.+))?$", line):
            if found[1] in {field.name for field in dataclasses.fields(Config)}:
                rows.append((found[1], escaped(found[2] or PLAIN[found[1]])))
        elif line.startswith("    def "):
            break
    yield heading, rows


def as_cell(value: Any) -> str:
    """Return a value of the configuration in a table."""
    return f"`{value}`" if value not in ({}, "", None) else "-"


def document() -> str:
    """Return the whole page."""
    found = groups()
    contents = [f"- [{title}](#{re.sub('[^a-z -]', '', title.lower()).replace(' ', '-')})" for title in found]
    contents.insert(list(found).index("Presets and cost") + 1, "- [Configuration](#configuration)")
    parts = [HEAD, "\n".join(contents) + "\n"]
    for title, entries in found.items():
        rows = [f"| [`{entry.path}`](#{entry.path}) | {cell(summary_of(entry))} |" for entry in entries]
        parts.append("\n".join([f"## {title}", "", "| name | what it is |", "|---|---|", *rows, ""]))
        parts += [described(entry) for entry in entries]
        if title == "Presets and cost":
            parts.append(configuration())
    return "\n".join(parts)


def cell(text: str) -> str:
    """Return text that may stand in a table."""
    return escaped(text).replace("|", "\\|")


if __name__ == "__main__":
    print(document(), end="")
