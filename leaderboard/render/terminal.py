"""Print a report to a terminal of 100 columns."""

from collections.abc import Iterable, Iterator

from rich.box import HORIZONTALS
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from leaderboard.sections import (
    Block,
    Bullets,
    Code,
    Facts,
    Figures,
    Fold,
    Header,
    Paragraph,
    Report,
    Table,
    TableCell,
)

STYLES = {"plain": "", "soft": "dim", "better": "green", "worse": "red"}
NARROWEST = 20  # characters of a row's name before it is folded


def print_report(report: Report, console: Console) -> None:
    """Print the sections that are meant for a terminal."""
    console.print(render_terminal(report))


def render_terminal(report: Report) -> RenderableType:
    """Return the sections that are meant for a terminal, each with its title."""
    parts: list[RenderableType] = []
    for section in report.select_sections("terminal"):
        parts.append(Text(section.title, style="bold red" if section.is_warning else "bold"))
        parts += [*_draw_blocks(section.blocks), Text()]
    return Group(*parts[:-1])


def _draw_blocks(blocks: Iterable[Block]) -> Iterator[RenderableType]:
    for block in blocks:
        yield from _draw_block(block)


def _draw_block(block: Block) -> Iterator[RenderableType]:
    match block:
        case Paragraph(text) | Code(text):
            yield Text(text)
        case Bullets(items):
            yield from (Text(f"- {item if isinstance(item, str) else item.text}") for item in items)
        case Table():
            yield from _draw_table(block)
        case Figures():
            return
        case Facts(facts):
            yield from (Text(f"- {name}: {value}") for name, value in facts.items() if value)
        case Fold(summary, blocks):
            yield Text(summary)
            yield from _draw_blocks(blocks)


def _draw_table(table: Table) -> Iterator[RenderableType]:
    notes = f"{table.caption} {table.colours}".strip()
    if notes:
        yield Text(notes)
    has_lines = any(cell.lines for row in table.rows for cell in row)
    drawn = RichTable(box=HORIZONTALS, header_style="bold", show_lines=has_lines)
    longest = max((len(row[0].text) for row in table.rows), default=0)
    for i, header in enumerate(table.headers):
        narrowest = min(NARROWEST, longest) if i == 0 else None
        drawn.add_column(_draw_header(header), justify=header.align, overflow="fold", min_width=narrowest)
    for row in table.rows:
        drawn.add_row(*map(_draw_cell, row))
    yield drawn


def _draw_header(header: Header) -> Text:
    """Return a header whose lines break at commas, so that columns stay narrow."""
    return Text("\n".join((header.text, *header.lines)).replace(", ", "\n"))


def _draw_cell(cell: TableCell) -> Text:
    """Return a cell whose lines break after their first word, so that columns stay narrow."""
    text = Text(cell.text + cell.rest, style="bold" if cell.is_best else "")
    for line in cell.lines:
        text.append("\n" + line.text.replace(" ", "\n", 1), style=f"not bold {STYLES[line.tone]}".strip())
    return text
