"""What a page is made of: sentences, tables, pictures, code. Plain text throughout: the template escapes all of it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from localsim.analysis.canvas import styled
from localsim.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_SVG = 160_000
"""Bytes above which a figure is stored as pixels: a heat map or a bundle of curves has more strokes than dots."""
PIXELS_PER_INCH = 96
WIDE = 480
"""Pixels, as wide as which a larger picture stays where the screen is narrower: it scrolls, or nobody could read it."""
_FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/:,;'\"]+/)+")
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Text:
    """A paragraph, with code to type at its end if there is any."""

    kind: ClassVar[str] = "text"
    words: str
    code: str = ""


@dataclass(frozen=True)
class Note(Text):
    """A paragraph that says what is missing."""

    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Title:
    """A heading within a section."""

    kind: ClassVar[str] = "title"
    words: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first of each is its heading.

    Attributes:
        caption: says what the numbers are, their n and intervals.
        head: of the columns.
        rows: as long as the head.
        names: the columns, from 0, that are words and no numbers.
    """

    kind: ClassVar[str] = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: Sequence[int] = (0,)


@dataclass(frozen=True)
class Picture:
    """A figure as a data URI.

    Attributes:
        source: the URI.
        alt: what it shows, in numbers, for those who do not see it.
        caption: how to read it.
        width, height: in pixels, at full size.
    """

    kind: ClassVar[str] = "picture"
    source: str
    alt: str
    caption: str
    width: int
    height: int

    @property
    def wide(self) -> bool:
        """Whether it scrolls on a phone."""
        return self.width > WIDE


@dataclass(frozen=True)
class Code:
    """Lines to type, or a file."""

    kind: ClassVar[str] = "code"
    label: str
    text: str


@dataclass(frozen=True)
class Fold:
    """What is shown when its line is opened, and in print."""

    kind: ClassVar[str] = "fold"
    summary: str
    parts: Sequence[Part]


Part = Text | Note | Title | Table | Picture | Code | Fold


@dataclass(frozen=True)
class Section:
    """One of the parts of the page; `lead` says what is shown and what is not."""

    name: str
    title: str
    lead: str
    parts: list[Part] = field(default_factory=list)


@styled
def picture(figure: Figure, alt: str, caption: str) -> Picture:
    """Return a figure as part of a page: as strokes, which stay sharp, or as pixels where these are fewer."""
    width, height = (round(PIXELS_PER_INCH * inches) for inches in figure.get_size_inches())
    kind, data = "svg+xml", _drawn(figure, "svg", {"Date": None})
    if len(data) > LARGEST_SVG:
        kind, data = "png", _drawn(figure, "png", {"Software": None})
    return Picture(_uri(kind, data), alt, caption, width, height)


def png_picture(data: bytes, alt: str, caption: str) -> Picture:
    """Return a PNG file of twice the usual resolution as part of a page; UserError if it is none."""
    if not data.startswith(PNG) or data[12:16] != b"IHDR":
        raise UserError("the file is not a PNG picture")
    width, height = (int.from_bytes(data[place : place + 4], "big") // 2 for place in (16, 20))
    return Picture(_uri("png", data), alt, caption, width, height)


def listed(sentences: Sequence[str], most: int = 8) -> str:
    """Return the first sentences in one line, and how many there are beyond."""
    more = len(sentences) - most
    return "; ".join(sentences[:most]) + (f"; and {more} more, see the table" if more > 0 else "") + "."


def said(error: Exception) -> str:
    """Return what an error says, as a sentence without the folders of this machine."""
    text = _FOLDERS.sub(".../", str(error))
    return text if text.endswith(".") else f"{text}."


def parts_or_note(make: Callable[[], list[Part]], words: str) -> list[Part]:
    """Return what `make` returns or, where images or weights cannot be had, a note of these words and why."""
    try:
        return make()
    except (UserError, OSError) as error:
        return [Note(f"{words}: {said(error)}")]


def in_interval(value: float | None, low: float | None, high: float | None, form: str = ".3f") -> str:
    """Return a number with its interval; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:{form}}" + ("" if low is None or high is None else f" [{low:{form}}, {high:{form}}]")


def _drawn(figure: Figure, kind: str, metadata: dict[str, None]) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format=kind, metadata=metadata)
    return file.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
