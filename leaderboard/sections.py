"""Data model of a report: sections made of blocks, which every renderer draws.

A section is a title and a list of blocks. The renderers (render/html, render/markdown, render/terminal)
draw kinds of blocks and know no section by name. To add a section, write one module with a function
`build_section(results) -> Section | None` and list it in `leaderboard.report.SECTIONS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leaderboard.index import Runs
from leaderboard.table import Comparison

Medium = Literal["terminal", "document", "page"]  # ordered by the room that they offer
Tone = Literal["plain", "soft", "better", "worse"]
Align = Literal["left", "right"]


@dataclass(frozen=True)
class Results:
    """What the sections of a report are built from."""

    runs: Runs
    comparison: Comparison


@dataclass(frozen=True)
class Paragraph:
    """Running text, for example how to read the next table."""

    text: str


@dataclass(frozen=True)
class Link:
    """A text that leads to an address."""

    text: str
    url: str


@dataclass(frozen=True)
class Bullets:
    """An unordered list."""

    items: tuple[str | Link, ...]


@dataclass(frozen=True)
class Line:
    """A line below the text of a table cell.

    label: the tone as a word, for the renderer that shows it by colour (HTML), which not every reader sees.
    """

    text: str
    tone: Tone = "soft"
    label: str = ""


@dataclass(frozen=True)
class TableCell:
    """A cell of a table.

    rest: continues `text` with less emphasis. value: sorts the cells of a right-aligned column; None for
    a missing value, which stays last. is_best: emphasised. hint: more about a cell, shown on request.
    """

    text: str
    rest: str = ""
    lines: tuple[Line, ...] = ()
    value: float | None = None
    tone: Tone = "plain"
    is_best: bool = False
    hint: str = ""
    url: str = ""


@dataclass(frozen=True)
class Header:
    """The header of a column: a text, and smaller lines below it. Numbers are aligned right, text left."""

    text: str
    lines: tuple[str, ...] = ()
    align: Align = "right"


@dataclass(frozen=True)
class Table:
    """A table whose first cell in each row is the row's header.

    name: the accessible name, unique in the report. colours: explains the tones, where colours are shown.
    is_compact: set in smaller type.
    """

    name: str
    headers: tuple[Header, ...]
    rows: tuple[tuple[TableCell, ...], ...]
    caption: str = ""
    colours: str = ""
    is_compact: bool = True


@dataclass(frozen=True)
class Bar:
    """One bar of a chart: its mean (None for a missing bar), a dot per value, and the text at its end."""

    name: str
    text: str
    values: tuple[float, ...] = ()
    mean: float | None = None
    is_best: bool = False
    is_baseline: bool = False


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars on an axis that includes 0."""

    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Point:
    """A point of a line, with one standard deviation where it is known."""

    x: float
    mean: float
    std: float | None = None


@dataclass(frozen=True)
class Series:
    """One line of a chart, with its points in rising order of x."""

    name: str
    points: tuple[Point, ...]
    is_baseline: bool = False


@dataclass(frozen=True)
class LineChart:
    """Lines over evenly spaced values of x."""

    series: tuple[Series, ...]
    x_label: str


@dataclass(frozen=True)
class Picture:
    """A PNG image whose equally wide columns have headings."""

    png: bytes
    headings: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A drawing with a title, a caption below it, and a text that stands for the drawing."""

    title: str
    caption: str
    alternative: str
    drawing: BarChart | LineChart | Picture


@dataclass(frozen=True)
class Figures:
    """Figures next to one another, with a legend for all of them.

    Renderers without graphics omit them: their numbers are in tables of the same report.
    """

    figures: tuple[Figure, ...]
    legend: str = ""


@dataclass(frozen=True)
class Facts:
    """Names and their values, which may have several lines. Empty values are omitted."""

    facts: dict[str, str]


@dataclass(frozen=True)
class Code:
    """Preformatted text."""

    text: str


@dataclass(frozen=True)
class Fold:
    """Blocks that are folded away behind a summary, where the renderer can fold."""

    summary: str
    blocks: tuple[Block, ...]


Block = Paragraph | Bullets | Table | Figures | Facts | Code | Fold


@dataclass(frozen=True)
class Section:
    """A part of a report.

    medium: the smallest medium that shows the section; larger ones show it too.
    is_warning: the section names problems of the report itself.
    """

    title: str
    blocks: tuple[Block, ...]
    medium: Medium = "document"
    is_warning: bool = False


@dataclass(frozen=True)
class Report:
    """A title, an introduction, and the sections in reading order."""

    title: str
    lead: str
    sections: tuple[Section, ...]

    def select_sections(self, medium: Medium) -> list[Section]:
        """Return the sections that a medium has room for."""
        media = ("terminal", "document", "page")
        return [section for section in self.sections if media.index(section.medium) <= media.index(medium)]
