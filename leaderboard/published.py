"""Published results with their sources, for reference next to the runs and never mixed with them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from leaderboard.columns import group_by, task_sort_key
from leaderboard.sections import (
    Block,
    Bullets,
    Fold,
    Header,
    Line,
    Link,
    Paragraph,
    Results,
    Section,
    Table,
    TableCell,
)

FOLDER = Path(__file__).parent / "published"
TITLE = "Published results for reference, not comparable with the runs above"
SHARED = ("task", "dataset", "split", "metric", "unit", "direction", "note")  # of all rows of a table
TEXTS = ("method", "backbone", "protocol", "data", "metric")  # headers to the left of the value


@dataclass(frozen=True)
class PublishedRow:
    """One quoted number.

    source: short name of the source; `title`: its full reference; `place`: where in the source, for example
        "Table 3"; `url`: its address.
    ablation: the setting of an ablation, named as the row of our suites; "" for a result of its own.
    blocks: number of tuned blocks, for a point of a curve of partial fine-tuning.
    """

    method: str
    backbone: str
    task: str
    protocol: str
    dataset: str
    split: str
    metric: str
    value: float
    unit: str
    direction: str
    source: str
    title: str
    place: str
    url: str
    note: str = ""
    ablation: str = ""
    blocks: float | None = None


@cache
def load_published() -> tuple[PublishedRow, ...]:
    """Load every quoted number in `published/*.json`, each a list of tables with a source and rows."""
    rows = []
    for path in sorted(FOLDER.glob("*.json")):
        for table in json.loads(path.read_text(encoding="utf-8")):
            rows += [_build_row(table, row) for row in table["rows"]]
    return tuple(rows)


def _build_row(table: dict[str, Any], row: dict[str, Any]) -> PublishedRow:
    source = table["source"]
    return PublishedRow(
        **row,
        **{name: table[name] for name in SHARED},
        source=source["name"],
        title=source["title"],
        place=source["place"],
        url=source["url"],
    )


def select_published(tasks: set[str]) -> list[PublishedRow]:
    """Return the quoted numbers of these tasks, without those of ablations and curves."""
    return [row for row in load_published() if row.task in tasks and not row.ablation and row.blocks is None]


def build_section(results: Results) -> Section | None:
    """Return the published results of the tasks of a comparison, with their sources."""
    rows = select_published({column.task for column in results.comparison.columns})
    if not rows:
        return None
    groups = group_by(rows, lambda row: task_sort_key(row.task))
    folds: list[Block] = [_build_fold(task, members) for (_, task), members in groups]
    sources = sorted({(row.source, row.title, row.url) for row in rows})
    links = tuple(Link(f"{name}: {title}", url) for name, title, url in sources)
    return Section(TITLE, (*folds, Paragraph("Sources:"), Bullets(links)))


def _build_fold(task: str, rows: list[PublishedRow]) -> Fold:
    left = [Header(name, align="left") for name in TEXTS]
    headers = (*left, Header("value"), Header("source", align="left"))
    caption = "Quoted as printed: full-size models on the full datasets."
    table = Table(f"Published results, {task}", headers, tuple(map(_build_cells, rows)), caption)
    return Fold(f"{task}: {len(rows)} published numbers", (table,))


def _build_cells(row: PublishedRow) -> tuple[TableCell, ...]:
    texts = (
        row.method,
        row.backbone,
        row.protocol,
        f"{row.dataset} {row.split}",
        f"{row.metric} ({row.unit})",
    )
    note = (Line(row.note),) if row.note else ()
    source = TableCell(f"{row.source}, {row.place}", lines=note, url=row.url)
    return (*map(TableCell, texts), TableCell(f"{row.value}", value=row.value), source)
