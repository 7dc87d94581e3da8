"""Numbers that others published, each with its source: for orientation beside the runs, never mixed with them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "published"
HEADING = "Published, for orientation: not comparable with the runs above"


@dataclass(frozen=True)
class PublishedRow:
    """One quoted number. `source` is a short name, `title` the whole one, `place` where in it, `url` leads there.

    ablation: the setting that it was measured for, called as the row of our suites; "" for a result that stands alone.
    blocks: how many of the last blocks were tuned, for a point of a curve of partial fine-tuning.
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
def published_rows() -> tuple[PublishedRow, ...]:
    """Every quoted number of the package's `published/*.json` (a list of tables, each with its source and its rows)."""
    tables = [
        table
        for path in sorted(FOLDER.glob("*.json"))
        for table in json.loads(path.read_text(encoding="utf-8"))
    ]
    return tuple(_row(table, row) for table in tables for row in table["rows"])


def _row(table: dict, row: dict) -> PublishedRow:
    shared = {
        name: table[name] for name in ("task", "dataset", "split", "metric", "unit", "direction", "note")
    }
    source = table["source"]
    return PublishedRow(
        **row,
        **shared,
        source=source["name"],
        title=source["title"],
        place=source["place"],
        url=source["url"],
    )


def published_for(tasks: set[str]) -> list[PublishedRow]:
    """The quoted numbers of these tasks, without those of single ablations and of curves."""
    return [row for row in published_rows() if row.task in tasks and not row.ablation and row.blocks is None]
