"""The main section: scores of every backbone under every protocol, with differences to the baseline."""

import math

from leaderboard.sections import Header, Line, Paragraph, Results, Section, Table, TableCell
from leaderboard.table import Cell, Column, Comparison, Difference
from leaderboard.wording import (
    describe_difference,
    format_difference,
    format_number,
    format_score,
    name_data,
    name_metric,
    name_protocol,
)

TITLE = "Comparison"
MOST_COLUMNS = 4  # of one table: as many as a terminal of 100 columns and a page without scrolling hold
COLOURS = "Coloured differences: the interval excludes 0."


def build_section(results: Results) -> Section:
    """Return one table per group of neighbouring columns."""
    comparison = results.comparison
    groups = _group_columns(comparison.columns)
    tables = []
    for i, group in enumerate(groups):
        part = f"part {i + 1} of {len(groups)}" if len(groups) > 1 else ""
        tables.append(_build_table(comparison, group, part))
    return Section(TITLE, (Paragraph(_explain(comparison)), *tables), medium="terminal")


def _explain(comparison: Comparison) -> str:
    return (
        "Mean and sample standard deviation over n seeds; below it, the difference to "
        f"{comparison.baseline} with its 95 % confidence interval. Bold: best score of the column. "
        "A missing score is shown as -, never as 0."
    )


def _group_columns(columns: list[Column]) -> list[range]:
    """Divide the columns evenly into as few tables as possible, between two tasks where possible."""
    groups = []
    start, num_columns = 0, len(columns)
    while start < num_columns:
        rest = num_columns - start
        num_tables = math.ceil(rest / MOST_COLUMNS)
        sizes = range(max(1, rest - MOST_COLUMNS * (num_tables - 1)), min(MOST_COLUMNS, rest) + 1)
        even = math.ceil(rest / num_tables)
        tasks = [column.task for column in columns[start:]]
        size = min(sizes, key=lambda n: (n < rest and tasks[n - 1] == tasks[n], abs(n - even)))
        groups.append(range(start, start + size))
        start += size
    return groups


def _build_table(comparison: Comparison, group: range, part: str) -> Table:
    columns = [comparison.columns[i] for i in group]
    rows = []
    for row in comparison.rows:
        marks = (Line("baseline"),) if row == comparison.baseline else ()
        cells = [_build_cell(comparison.cells[row][i], comparison.columns[i]) for i in group]
        rows.append((TableCell(row, lines=marks), *cells))
    headers = (Header("backbone", align="left"), *map(_build_header, columns))
    name = f"{TITLE}, {part}" if part else TITLE
    caption = f"{part.capitalize()}." if part else ""
    differences = [comparison.cells[row][i].difference for row in comparison.rows for i in group]
    colours = COLOURS if any(change and change.is_clear for change in differences) else ""
    return Table(name, headers, tuple(rows), caption, colours, is_compact=False)


def _build_header(column: Column) -> Header:
    lines = (name_protocol(column), name_data(column), name_metric(column))
    return Header(column.task, tuple(line for line in lines if line))


def _build_cell(cell: Cell, column: Column) -> TableCell:
    text = format_score(cell, column)
    if cell.mean is None:
        return TableCell(text, tone="soft", hint="; ".join(failure.reason for failure in cell.failures))
    mean = format_number(cell.mean, column)
    lines = (_build_line(cell.difference, column),) if cell.difference else ()
    return TableCell(mean, text.removeprefix(mean), lines, value=cell.mean, is_best=cell.is_best)


def _build_line(change: Difference, column: Column) -> Line:
    label = describe_difference(change)
    text = format_difference(change, column)
    if not change.is_clear:
        return Line(text, "soft", label)
    return Line(text, "better" if change.better else "worse", label)
