"""Partial fine-tuning as a curve: top-1 accuracy over the number of tuned blocks, measured and published."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from leaderboard.columns import group_by
from leaderboard.published import PublishedRow, load_published
from leaderboard.sections import (
    Figure,
    Figures,
    Header,
    LineChart,
    Paragraph,
    Point,
    Results,
    Section,
    Series,
    Table,
    TableCell,
)
from leaderboard.table import Comparison, Measured
from leaderboard.wording import format_metric, name_column, name_data

TITLE = "Partial fine-tuning: only the last blocks are tuned"
POINT = re.compile(r"top1_blocks_(\d+(?:\.\d+)?)")
READING = (
    "0 tuned blocks are a linear probe, 0.5 is the MLP half of the last block. "
    "Mean and sample standard deviation over the seeds."
)
LEGEND = "Whiskers: one standard deviation. Numbers of blocks are evenly spaced."


@dataclass(frozen=True)
class Curve:
    """One line per row over the number of tuned blocks.

    points: by row, then by the number of tuned blocks.
    num_seeds: by row.
    note: how a published curve was measured.
    """

    name: str
    place: str
    points: dict[str, dict[float, Measured]]
    num_seeds: dict[str, int]
    note: str = ""

    @property
    def num_blocks(self) -> list[float]:
        """Every number of tuned blocks, in rising order."""
        return sorted({count for points in self.points.values() for count in points})


def is_point(metric: str) -> bool:
    """Return whether a metric is a point of such a curve."""
    return POINT.fullmatch(metric) is not None


def build_curves(comparison: Comparison) -> list[Curve]:
    """Return one curve per column whose records have points for at least two numbers of blocks."""
    curves = []
    for i, column in enumerate(comparison.columns):
        cells = {row: cells[i] for row, cells in comparison.cells.items()}
        points = {row: _select_points(cell.metrics) for row, cell in cells.items()}
        points = {row: own for row, own in points.items() if own}
        num_seeds = {row: len(cells[row].values) for row in points}
        place = f"{name_data(column)}, top1 (%), higher is better"
        curves.append(Curve(name_column(column), place, points, num_seeds))
    return [curve for curve in curves if len(curve.num_blocks) > 1]


def _select_points(metrics: dict[str, Measured]) -> dict[float, Measured]:
    points = {}
    for name, value in metrics.items():
        match = POINT.fullmatch(name)
        if match:
            points[float(match[1])] = value
    return dict(sorted(points.items()))


def build_published_curves() -> list[Curve]:
    """Return the published curves, one per source and dataset."""
    rows = [row for row in load_published() if row.blocks is not None]
    groups = group_by(rows, lambda row: (row.source, row.place, row.backbone, row.dataset))
    return [_build_published_curve(members) for _, members in groups]


def _build_published_curve(rows: list[PublishedRow]) -> Curve:
    first = rows[0]
    points: dict[str, dict[float, Measured]] = {}
    for row in rows:
        if row.blocks is not None:
            own = points.setdefault(row.method, {})
            own[row.blocks] = Measured(row.value, None, 1, row.unit, "higher")
    name = f"Published: {first.source}, {first.place}, {first.backbone}"
    place = f"{first.dataset} {first.split}, {first.metric} ({first.unit}), not comparable with the runs"
    return Curve(name, place, points, dict.fromkeys(points, 1), first.note)


def build_section(results: Results) -> Section | None:
    """Return the measured curves with the published ones in charts and tables of their own."""
    comparison = results.comparison
    curves = build_curves(comparison)
    if not curves:
        return None
    curves += build_published_curves()
    figures = Figures(tuple(build_figure(curve, comparison.baseline) for curve in curves), LEGEND)
    return Section(TITLE, (Paragraph(READING), figures, *map(build_table, curves)))


def build_table(curve: Curve) -> Table:
    """Return the points of a curve, one row per line."""
    counts = curve.num_blocks
    num_seeds = list(curve.num_seeds.values())
    columns = []
    for count in counts:
        own = [points.get(count) for points in curve.points.values()]
        columns.append(build_cells(own, num_seeds))
    rows = tuple((TableCell(row), *own) for row, *own in zip(curve.points, *columns, strict=True))
    headers = (Header("tuned blocks", align="left"), *(Header(f"{count:g}") for count in counts))
    caption = f"{curve.name}: {curve.place}. {curve.note}".strip()
    return Table(f"Points of {curve.name}", headers, rows, caption=caption)


def build_cells(values: Sequence[Measured | None], num_seeds: Sequence[int]) -> list[TableCell]:
    """Return one metric of several cells as table cells."""
    texts = format_metric(values, num_seeds)
    return [
        TableCell(text, value=value.mean if value else None)
        for text, value in zip(texts, values, strict=True)
    ]


def build_figure(curve: Curve, baseline: str) -> Figure:
    """Return a curve as a line chart."""
    series = tuple(
        Series(row, tuple(Point(x, value.mean, value.std) for x, value in points.items()), row == baseline)
        for row, points in curve.points.items()
    )
    return Figure(
        curve.name,
        curve.place,
        f"{curve.name}, {curve.place}. {_describe_points(build_table(curve))}",
        LineChart(series, "tuned blocks"),
    )


def _describe_points(table: Table) -> str:
    """Return the rows of a curve's table as text."""
    names = [header.text for header in table.headers[1:]]
    rows = []
    for row, *cells in table.rows:
        points = [f"{name} blocks {cell.text}" for name, cell in zip(names, cells, strict=True)]
        rows.append(f"{row.text}: {', '.join(points)}")
    return "; ".join(rows)
