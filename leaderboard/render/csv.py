"""Render a comparison as CSV: one line per cell in full precision, with empty fields for missing values."""

import csv
import io

from leaderboard.table import Cell, Column, Comparison

FIELDS = (
    "backbone",
    "task",
    "protocol",
    "protocol_version",
    "variant",
    "dataset",
    "split",
    "metric",
    "unit",
    "direction",
    "n",  # number of seeds
    "mean",
    "std",
    "difference",  # to the baseline
    "low",  # of the difference's interval
    "high",
    "status",
    "seconds",  # of training, feature extraction and evaluation
    "code",  # first digits of the digests of the code
    "reason",
    "published",  # number of an ablation's row
    "published_in",
    "published_differs",  # why the published number is not comparable with the mean
)


def render_csv(comparison: Comparison) -> str:
    """Return one line per row and column of the comparison, with the fields in `FIELDS`."""
    file = io.StringIO()
    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
    writer.writeheader()
    for row in comparison.rows:
        for i, (column, cell) in enumerate(zip(comparison.columns, comparison.cells[row], strict=True)):
            writer.writerow(
                {"backbone": row, **_describe_cell(column, cell), **_describe_published(comparison, i, row)}
            )
    return file.getvalue()


def _describe_cell(column: Column, cell: Cell) -> dict[str, object]:
    change = cell.difference
    return {
        "task": column.task,
        "protocol": column.protocol,
        "protocol_version": column.protocol_version,
        "variant": column.variant,
        "dataset": column.dataset,
        "split": column.split,
        "metric": column.metric,
        "unit": column.unit,
        "direction": column.direction,
        "n": len(cell.values),
        "mean": cell.mean,
        "std": cell.std,
        "difference": change.value if change else None,
        "low": change.low if change else None,
        "high": change.high if change else None,
        "status": cell.status,
        "seconds": cell.seconds,
        "code": "; ".join(cell.code),
        "reason": "; ".join(f"seed {failure.seed}: {failure.reason}" for failure in cell.failures),
    }


def _describe_published(comparison: Comparison, column: int, row: str) -> dict[str, object]:
    for published in comparison.published_comparisons:
        if published.column == column and row in published.values:
            return {
                "published": published.values[row],
                "published_in": f"{published.source}, {published.places[row]}",
                "published_differs": "; ".join(published.differs),
            }
    return {}
