"""The comparison as CSV: a line a cell, full precision, nothing in place of what was not measured."""

import csv
import io

from leaderboard.table import Cell, Column, Comparison, Difference

FIELDS = (
    *(
        "backbone",
        "task",
        "protocol",
        "variant",
        "dataset",
        "split",
        "metric",
        "unit",
        "direction",
        "n",
        "mean",
        "std",
    ),
    *(
        "difference",
        "low",
        "high",
        "status",
        "seconds",
        "reason",
        "published",
        "published_in",
        "published_differs",
    ),
)


def render_csv(comparison: Comparison) -> str:
    """`n` seeds; `difference` to the baseline with its interval `low`..`high`; `seconds` of training, features and evaluation;
    `published` of an ablation's row, and in `published_differs` why it is not to be compared with the mean."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(FIELDS)
    for row in comparison.rows:
        for i, (column, cell) in enumerate(zip(comparison.columns, comparison.cells[row], strict=True)):
            writer.writerow([row, *_line(column, cell), *_quoted(comparison, i, row)])
    return file.getvalue()


def _line(column: Column, cell: Cell) -> list[object]:
    place = [column.task, column.protocol, column.variant, column.dataset, column.split]
    metric = [column.metric, column.unit, column.direction]
    change = cell.difference or Difference(0, None)
    value = change.value if cell.difference else None
    reason = "; ".join(f"seed {failure.seed}: {failure.reason}" for failure in cell.failures)
    numbers = [len(cell.values), cell.mean, cell.std, value, change.low, change.high]
    return [*place, *metric, *numbers, cell.status, cell.seconds, reason]


def _quoted(comparison: Comparison, column: int, row: str) -> list[object]:
    for beside in comparison.beside:
        if beside.column == column and row in beside.values:
            return [beside.values[row], f"{beside.source}, {beside.places[row]}", "; ".join(beside.differs)]
    return [None, None, None]
