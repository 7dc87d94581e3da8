"""Bars of one column as inline SVG: every axis starts at 0, every seed is a dot."""

import math
from html import escape

from leaderboard.table import Cell, Column
from leaderboard.wording import column_metric, column_name, number, score

WIDTH, BAR, ROW, TOP = 320, 10, 38, 4
NICE = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)


def chart(column: Column, cells: dict[str, Cell], baseline: str) -> str:
    """A figure with a bar a row, in the rows' order; rows without a score have their status in its place."""
    values = [value for cell in cells.values() for value in cell.values]
    low = -_nice(-min(values)) if min(values) < 0 else 0.0
    high = 0.0 if max(values) <= 0 and low < 0 else _nice(max(values))
    height = TOP + ROW * len(cells)
    marks = []
    for i, (row, cell) in enumerate(cells.items()):
        marks.append(_bar(row, cell, column, row == baseline, (low, high), TOP + ROW * i))
        marks.append(_reference(cells.get(baseline, Cell()), (low, high), TOP + ROW * i))
    label = f"{column_name(column)}: " + ", ".join(
        f"{row} {score(cell, column)}" for row, cell in cells.items()
    )
    place = escape(f"{column.dataset} {column.split}, {column_metric(column)}")
    return (
        f"<figure><figcaption><strong>{escape(column_name(column))}</strong><br>{place}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height + 22}" role="img" aria-label="{escape(label)}">'
        f"{''.join(marks)}{_axis(low, high, height)}</svg></figure>"
    )


def _nice(value: float) -> float:
    """The smallest round number that is not below a positive value; 1 for 0 and less."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in NICE if step * power >= value * (1 - 1e-9))


def _x(value: float, low: float, high: float) -> float:
    return round((value - low) / (high - low) * WIDTH, 1)


def _bar(row: str, cell: Cell, column: Column, is_baseline: bool, limits: tuple[float, float], y: int) -> str:
    name = row if len(row) <= 28 else f"{row[:27]}…"
    weight = ' font-weight="700"' if cell.is_best else ""
    parts = [
        f'<text x="0" y="{y + 12}">{escape(name)}</text>',
        f'<text x="{WIDTH}" y="{y + 12}" text-anchor="end"{weight}>{escape(_value(cell, column))}</text>',
    ]
    if cell.mean is not None:
        start, end = sorted((_x(0, *limits), _x(cell.mean, *limits)))
        kind = "plain" if is_baseline else "bar"
        parts.append(
            f'<rect class="{kind}" x="{start}" y="{y + 18}" width="{round(end - start, 1)}" height="{BAR}" rx="2"/>'
        )
    centre = y + 18 + BAR / 2
    parts += [
        f'<circle class="seed" cx="{_x(value, *limits)}" cy="{centre}" r="2.5"/>' for value in cell.values
    ]
    return "".join(parts)


def _value(cell: Cell, column: Column) -> str:
    return score(cell, column) if cell.mean is None else number(cell.mean, column)


def _reference(cell: Cell, limits: tuple[float, float], y: int) -> str:
    if cell.mean is None:
        return ""
    x = _x(cell.mean, *limits)
    return f'<line class="reference" x1="{x}" x2="{x}" y1="{y + 15}" y2="{y + 21 + BAR}"/>'


def _axis(low: float, high: float, height: int) -> str:
    ticks = [f'<line class="axis" x1="0" x2="{WIDTH}" y1="{height}" y2="{height}"/>']
    for value in dict.fromkeys((low, (low + high) / 2, high) if low == 0 else (low, 0.0, high)):
        x = _x(value, low, high)
        anchor = "start" if x == 0 else "end" if x == WIDTH else "middle"
        ticks.append(f'<text class="tick" x="{x}" y="{height + 16}" text-anchor="{anchor}">{value:g}</text>')
    return "".join(ticks)
