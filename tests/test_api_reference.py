"""The reference is made of docstrings: it is up to date, and the docstrings say what a reader needs."""

from __future__ import annotations

import inspect
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from localsim.config import Config

ROOT = Path(__file__).resolve().parents[1]
MADE = runpy.run_path(str(ROOT / "docs" / "api_reference.py"))
PAGE = MADE["document"]()
ENTRIES = {entry.path: entry for entries in MADE["groups"]().values() for entry in entries}


def test_the_reference_is_what_the_docstrings_say():
    """Else: `python docs/api_reference.py > docs/api.md`."""
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == PAGE


def test_links_and_anchors_meet():
    anchors = re.findall(r'<a id="([^"]+)">', PAGE)
    headings = [
        re.sub("[^a-z -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.+)", PAGE, re.M)
    ]
    assert len(anchors) == len(set(anchors)) == len(ENTRIES)
    assert len(headings) == len(set(headings)) > 10
    targets = re.findall(r"\]\(#([^)]+)\)", PAGE)
    assert set(targets) == {*anchors, *headings} and len(targets) == len(set(targets))
    for target in set(re.findall(r"\]\((?![#h])([^)#]+)\)", PAGE)):
        assert (ROOT / "docs" / target).exists(), target


@pytest.mark.parametrize("path", sorted(ENTRIES))
def test_every_public_name_has_a_sentence(path):
    said = MADE["summary_of"](ENTRIES[path])
    assert re.fullmatch(r"[\w`].{10,250}[.:?]", said), said


def described_by(function: Any) -> set[str]:
    """Return the parameters that a docstring names: in a section of its own, in backticks, or "as for" another."""
    told = MADE["Docstring"].of(function)
    text = f"{told.summary} {told.text}"
    named = {name.strip("* ") for names, _ in told.sections.get("Args", []) for name in names.split(",")}
    named |= set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", text))))
    others = re.findall(r"(?:Args|Arguments).* as for `(\w+)`", text)
    return named.union(*(described_by(sys.modules[function.__module__].__dict__[other]) for other in others))


@pytest.mark.parametrize("path", sorted(path for path, entry in ENTRIES.items() if inspect.isfunction(entry.what)))
def test_every_parameter_is_described(path):
    function = ENTRIES[path].what
    assert set(inspect.signature(function).parameters) <= described_by(function)


@pytest.mark.parametrize("path", sorted(path for path, entry in ENTRIES.items() if inspect.isclass(entry.what)))
def test_every_member_has_a_sentence(path):
    for member in MADE["members"](ENTRIES[path].what):
        assert re.fullmatch(r"`\..+?`: [A-Z].{8,}[.:]", member), member


def test_every_setting_has_a_meaning_and_none_has_two():
    rows = [name for _, rows in MADE["fields"]() for name, _ in rows]
    assert rows == Config.names()
    source = inspect.getsource(Config)
    commented = set(re.findall(r"^    (\w+): .*  # ", source, flags=re.M))
    assert set(MADE["PLAIN"]) == set(rows) - commented


def test_a_docstring_is_read_in_its_parts():
    told = MADE["Docstring"].of(
        """Return a thing, over
        two lines.

        More, `a < b`:

            y = x
              + 1

        Args:
            first, second: both: of
                them.
            *rest: others.

        Raises:
            UserError: no.

        And the end.
        """
    )
    assert told.summary == "Return a thing, over two lines."
    assert told.text == "More, `a < b`:\n\n    y = x\n      + 1\n\n\nAnd the end."
    assert MADE["in_markdown"](told.text) == "More, `a < b`:\n\n```text\ny = x\n  + 1\n```\n\nAnd the end."
    assert told.sections["Args"] == [("first, second", "both: of them."), ("*rest", "others.")]
    assert told.sections["Raises"] == [("UserError", "no.")]
    assert MADE["in_markdown"]("a <b> c*d `<e>`") == r"a \<b> c\*d `<e>`"


def test_a_dataclass_has_no_docstring_but_its_own():
    from dataclasses import make_dataclass

    assert MADE["own_docstring"](make_dataclass("Plain", ["x"])) == ""
