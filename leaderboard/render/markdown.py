"""Render a report as Markdown."""

import re
from collections.abc import Iterable

from leaderboard.sections import (
    Block,
    Bullets,
    Code,
    Facts,
    Figures,
    Fold,
    Header,
    Link,
    Paragraph,
    Report,
    Section,
    Table,
    TableCell,
)

RULES = {"left": "---", "right": "---:"}


def render_markdown(report: Report) -> str:
    """Return headings, tables and lists. Text from records is escaped so that it stays text."""
    sections = [_draw_section(section) for section in report.select_sections("document")]
    return "\n\n".join([f"# {_escape(report.title)}", _escape(report.lead), *sections]) + "\n"


def _draw_section(section: Section) -> str:
    return f"## {_escape(section.title)}\n\n{_draw_blocks(section.blocks)}"


def _draw_blocks(blocks: Iterable[Block]) -> str:
    drawn = [_draw_block(block) for block in blocks]
    return "\n\n".join(text for text in drawn if text)


def _draw_block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return _escape(text)
        case Bullets(items):
            return "\n".join(f"- {_draw_item(item)}" for item in items)
        case Table():
            return _draw_table(block)
        case Figures():
            return ""
        case Facts(facts):
            return "\n".join(f"- {_escape(f'{name}: {value}')}" for name, value in facts.items() if value)
        case Code(text):
            return "\n".join(f"    {line}" for line in text.splitlines())
        case Fold(summary, blocks):
            return f"### {_escape(summary)}\n\n{_draw_blocks(blocks)}"


def _draw_item(item: str | Link) -> str:
    return _escape(item) if isinstance(item, str) else _draw_link(item.text, item.url)


def _draw_link(text: str, url: str) -> str:
    return f"[{_escape(text)}]({url})"


def _draw_table(table: Table) -> str:
    lines = [
        [_draw_header(header) for header in table.headers],
        [RULES[header.align] for header in table.headers],
        *([_draw_cell(cell) for cell in row] for row in table.rows),
    ]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{_escape(table.caption)}\n\n{text}" if table.caption else text


def _draw_header(header: Header) -> str:
    return "<br>".join(map(_escape, (header.text, *header.lines)))


def _draw_cell(cell: TableCell) -> str:
    text = _escape(cell.text + cell.rest)
    if cell.url:
        text = f"{_draw_link(cell.text, cell.url)} {_escape(cell.rest)}".strip()
    if cell.is_best:
        text = f"**{text}**"
    return "<br>".join((text, *(_escape(line.text) for line in cell.lines)))


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
