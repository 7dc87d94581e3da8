"""Partial fine-tuning as a curve: top1 over the number of tuned blocks, and the published curve apart from it."""

import re
from dataclasses import dataclass

from leaderboard.columns import grouped
from leaderboard.published import PublishedRow, published_rows
from leaderboard.table import Comparison, Measured
from leaderboard.wording import column_name, measured

HEADING = "Partial fine-tuning: the last blocks alone"
POINT = re.compile(r"top1_blocks_(\d+(?:\.\d+)?)")
READING = "0 tuned blocks are a linear probe, 0.5 the MLP half of the last block. Mean and sample deviation over the seeds."


@dataclass(frozen=True)
class Curve:
    """One line a row, by the number of tuned blocks. seeds: how many each row has. note: how a published curve was made."""

    name: str
    place: str
    points: dict[str, dict[float, Measured]]
    seeds: dict[str, int]
    note: str = ""

    @property
    def counts(self) -> list[float]:
        """Every number of tuned blocks, rising."""
        return sorted({count for points in self.points.values() for count in points})


def is_point(metric: str) -> bool:
    """Whether a metric is a point of such a curve."""
    return POINT.fullmatch(metric) is not None


def curves(comparison: Comparison) -> list[Curve]:
    """One for each column whose records have points; of a single number of blocks there is no curve."""
    found = []
    for i, column in enumerate(comparison.columns):
        cells = {row: cells[i] for row, cells in comparison.cells.items()}
        points = {row: _points(cell.metrics) for row, cell in cells.items()}
        points = {row: own for row, own in points.items() if own}
        seeds = {row: len(cells[row].values) for row in points}
        place = f"{column.dataset} {column.split}, top1 (%), higher is better"
        found.append(Curve(column_name(column), place, points, seeds))
    return [curve for curve in found if len(curve.counts) > 1]


def _points(metrics: dict[str, Measured]) -> dict[float, Measured]:
    found = {float(match[1]): value for name, value in metrics.items() if (match := POINT.fullmatch(name))}
    return dict(sorted(found.items()))


def published_curves() -> list[Curve]:
    """The quoted curves, one a source and data set."""
    quoted = [row for row in published_rows() if row.blocks is not None]
    return [
        _quoted(members)
        for _, members in grouped(quoted, lambda row: (row.source, row.place, row.backbone, row.dataset))
    ]


def _quoted(rows: list[PublishedRow]) -> Curve:
    first = rows[0]
    methods = dict.fromkeys(row.method for row in rows)
    points = {
        method: {row.blocks: Measured(row.value, None, 1, row.unit, "higher") for row in rows
                 if row.method == method and row.blocks is not None}
        for method in methods
    }  # fmt: skip
    name = f"Published: {first.source}, {first.place}, {first.backbone}"
    place = f"{first.dataset} {first.split}, {first.metric} ({first.unit}), not comparable with the runs"
    return Curve(name, place, points, dict.fromkeys(methods, 1), first.note)


def headers(curve: Curve) -> list[str]:
    """Of the table that `lines` fills."""
    return ["tuned blocks", *(f"{count:g}" for count in curve.counts)]


def lines(curve: Curve) -> list[list[str]]:
    """A line a row, `-` where nothing was measured."""
    texts = [
        measured([own.get(count) for own in curve.points.values()], list(curve.seeds.values()))
        for count in curve.counts
    ]
    return [[row, *own] for row, *own in zip(curve.points, *texts, strict=True)]
