"""One bar chart per column: means as bars, seeds as dots."""

from leaderboard.sections import Bar, BarChart, Figure, Figures, Results, Section
from leaderboard.table import Cell, Column, Comparison
from leaderboard.wording import format_number, format_score, name_column, name_data, name_metric

TITLE = "Charts"


def build_section(results: Results) -> Section | None:
    """Return a chart for every column that has a score."""
    comparison = results.comparison
    figures = tuple(
        _build_figure(comparison, i) for i, column in enumerate(comparison.columns) if column.metric
    )
    legend = f"Bars are means, dots are seeds, the dashed line is {comparison.baseline}."
    return Section(TITLE, (Figures(figures, legend),), medium="page") if figures else None


def _build_figure(comparison: Comparison, place: int) -> Figure:
    column = comparison.columns[place]
    cells = {row: comparison.cells[row][place] for row in comparison.rows}
    scores = ", ".join(f"{row} {format_score(cell, column)}" for row, cell in cells.items())
    return Figure(
        name_column(column),
        f"{name_data(column)}, {name_metric(column)}",
        f"{name_column(column)}: {scores}",
        BarChart(tuple(_build_bar(row, cell, column, comparison.baseline) for row, cell in cells.items())),
    )


def _build_bar(row: str, cell: Cell, column: Column, baseline: str) -> Bar:
    text = format_score(cell, column) if cell.mean is None else format_number(cell.mean, column)
    return Bar(row, text, cell.values, cell.mean, cell.is_best, row == baseline)
