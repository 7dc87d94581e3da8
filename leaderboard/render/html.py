"""Render a report as one self-contained HTML file: styles, script and pictures are embedded."""

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

from leaderboard.render.bar_chart import draw_bars
from leaderboard.render.line_chart import draw_lines, starts_at_zero
from leaderboard.sections import (
    BarChart,
    Block,
    Bullets,
    Code,
    Facts,
    Figure,
    Figures,
    Fold,
    Header,
    Line,
    LineChart,
    Link,
    Paragraph,
    Picture,
    Report,
    Section,
    Table,
    TableCell,
)
from leaderboard.wording import MISSING

HERE = Path(__file__).parent
GRIDS = {BarChart: "charts", LineChart: "curves", Picture: "gallery"}  # CSS classes


def render_html(report: Report) -> str:
    """Return a complete page. All text of the report is escaped."""
    css = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    title = escape(report.title)
    sections = "\n".join(map(_draw_section, report.select_sections("page")))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{css}</style>\n</head>\n"
        f'<body>\n<main>\n<h1>{title}</h1><p class="lead">{escape(report.lead)}</p>\n{sections}\n</main>\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _draw_section(section: Section) -> str:
    kind = ' class="problems"' if section.is_warning else ""
    return f"<section{kind}><h2>{escape(section.title)}</h2>{_draw_blocks(section.blocks)}</section>"


def _draw_blocks(blocks: Iterable[Block]) -> str:
    return "".join(map(_draw_block, blocks))


def _draw_block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return f'<p class="soft">{escape(text)}</p>'
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{_draw_item(item)}</li>' for item in items)}</ul>"
        case Table():
            return _draw_table(block)
        case Figures():
            return _draw_figures(block)
        case Facts(facts):
            return f"<dl>{''.join(_draw_fact(name, value) for name, value in facts.items() if value)}</dl>"
        case Code(text):
            return f"<pre>{escape(text)}</pre>"
        case Fold(summary, blocks):
            content = _draw_blocks(blocks)
            return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _draw_item(item: str | Link) -> str:
    return escape(item) if isinstance(item, str) else _draw_link(item.text, item.url)


def _draw_link(text: str, url: str) -> str:
    return f'<a href="{escape(url)}">{escape(text)}</a>'


def _draw_fact(name: str, value: str) -> str:
    lines = "<br>".join(map(escape, value.splitlines()))
    return f"<dt>{escape(name)}</dt><dd>{lines}</dd>"


def _draw_table(table: Table) -> str:
    """Return a sortable table that scrolls on a narrow screen, by keyboard too."""
    text = f"{table.caption} {table.colours}".strip()
    caption = f"<caption>{escape(text)}" if text else f'<caption class="hidden">{escape(table.name)}'
    head = "".join(map(_draw_header, table.headers))
    body = "".join(_draw_row(table.headers, row) for row in table.rows)
    kind = "sortable compact" if table.is_compact else "sortable"
    return (
        f'<div class="scroll" role="region" aria-label="{escape(table.name)}" tabindex="0">'
        f'<table class="{kind}">{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _draw_header(header: Header) -> str:
    kind = ' class="text"' if header.align == "left" else ""
    lines = "".join(f"<small>{escape(line)}</small>" for line in header.lines)
    return f'<th scope="col"{kind}>{_escape_name(header.text)}{lines}</th>'


def _draw_row(headers: tuple[Header, ...], row: tuple[TableCell, ...]) -> str:
    name, *cells = row
    lines = "".join(map(_draw_line, name.lines))
    body = "".join(_draw_cell(header, cell) for header, cell in zip(headers[1:], cells, strict=True))
    return f'<tr><th scope="row">{_escape_name(name.text)}{lines}</th>{body}</tr>'


def _draw_cell(header: Header, cell: TableCell) -> str:
    """Return a cell. `data-value` is what the script sorts by: empty for a missing value."""
    is_number = header.align == "right"
    text = _draw_text(cell, is_number)
    lines = "".join(_draw_line(line, is_number) for line in cell.lines)
    if not is_number:
        return f'<td class="text">{text}{lines}</td>'
    value = "" if cell.value is None else repr(cell.value)
    best = ' class="best"' if cell.is_best else ""
    return f'<td data-value="{value}"{best}>{text}{lines}</td>'


def _draw_text(cell: TableCell, is_number: bool) -> str:
    text = _escape_number(cell.text) if is_number else escape(cell.text)
    if cell.url:
        text = _draw_link(cell.text, cell.url)
    if cell.hint:
        return f'<span class="hint" title="{escape(cell.hint)}">{text}</span>'
    if cell.rest:
        text = f'<span class="score">{text}</span><span class="soft">{_escape_number(cell.rest)}</span>'
    elif cell.tone != "plain":
        text = f'<span class="{cell.tone}">{text}</span>'
    return f'{text}<span class="hidden"> best</span>' if cell.is_best else text


def _draw_line(line: Line, is_number: bool = False) -> str:
    text = _escape_number(line.text) if is_number else escape(line.text)
    label = f" {escape(line.label)}" if line.label else ""
    return f'<small class="{line.tone}">{text}{label}</small>'


def _escape_number(text: str) -> str:
    """Return the text with minus signs for hyphens; a lone hyphen marks a missing value."""
    return text if text == MISSING else escape(text.replace("-", "\N{MINUS SIGN}"))


def _escape_name(text: str) -> str:
    """Return the text with places to break a long name between its words."""
    return escape(text).replace("_", "_<wbr>")


def _draw_figures(block: Figures) -> str:
    legend = f'<p class="soft">{escape(block.legend)}</p>' if block.legend else ""
    grid = GRIDS[type(block.figures[0].drawing)]
    return f'{legend}<div class="{grid}">{"".join(map(_draw_figure, block.figures))}</div>'


def _draw_figure(figure: Figure) -> str:
    caption = f"<strong>{escape(figure.title)}</strong><br>{escape(figure.caption)}"
    alternative = escape(figure.alternative)
    drawing = figure.drawing
    match drawing:
        case BarChart():
            content = draw_bars(drawing, alternative)
        case LineChart():
            content = draw_lines(drawing, alternative)
            if not starts_at_zero(drawing):
                caption += "<br>The vertical axis does not start at 0."
        case Picture():
            content = _draw_picture(drawing, alternative)
    return f"<figure><figcaption>{caption}</figcaption>{content}</figure>"


def _draw_picture(picture: Picture, alternative: str) -> str:
    headings = "".join(f"<span>{escape(heading)}</span>" for heading in picture.headings)
    data = base64.b64encode(picture.png).decode()
    return (
        f'<div class="headings" aria-hidden="true">{headings}</div>'
        f'<img src="data:image/png;base64,{data}" alt="{alternative}">'
    )
