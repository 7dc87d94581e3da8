"""Published results with their sources, for reference next to the runs and never mixed with them."""

import csv
import json
from collections.abc import Iterable
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
from leaderboard.table import Column

FOLDER = Path(__file__).parent / "published"
TITLE = "Published results for reference, not comparable with the runs above"
RESULTS = FOLDER / "results.csv"  # one number per line
TITLES = FOLDER / "titles.json"  # of papers; a repository is its own title
SETTINGS = ("ablations.json", "partial.json")  # tables whose rows have a setting: an ablation, tuned blocks
SHARED = ("task", "dataset", "split", "metric", "unit", "direction", "note")  # of all rows of a table
TEXTS = ("method", "backbone", "protocol", "data", "metric")  # headers to the left of the value


@dataclass(frozen=True)
class PublishedRow:
    """One quoted number.

    protocol: named as our config where the recipe has one; others begin with the same kind (`finetune`,
        `linear`, `maskrcnn` ...) and add what sets them apart.
    source: "arXiv ID" or OWNER/REPOSITORY; `title`: its full reference; `place`: where in the source, for
        example "Table 3" or "README.md at COMMIT"; `url`: its address.
    ablation: the setting of an ablation, named as the row of our suites; "" for a result of its own.
    blocks: number of tuned blocks, for a point of a curve of partial fine-tuning.
    data, epochs: of the pretraining; "" and None where the source does not state them.
    verification: what the number was compared with.
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
    data: str = ""
    epochs: int | None = None
    verification: str = ""

    @property
    def kind(self) -> str:
        """The kind of protocol, which is its first word: `finetune`, `linear`, `maskrcnn` ..."""
        return get_kind(self.protocol)

    @property
    def pretraining(self) -> str:
        """The data and epochs of the pretraining, as far as the source states them."""
        epochs = "" if self.epochs is None else f"{self.epochs} epochs"
        return ", ".join(text for text in (self.data, epochs) if text)


def get_kind(protocol: str) -> str:
    """Return the kind of a protocol, which is its first word."""
    return protocol.partition("-")[0]


@cache
def load_published() -> tuple[PublishedRow, ...]:
    """Load every quoted number: `results.csv`, then the tables of ablations and curves."""
    rows = load_results()
    for name in SETTINGS:
        for table in json.loads((FOLDER / name).read_text(encoding="utf-8")):
            rows += [_build_row(table, row) for row in table["rows"]]
    return tuple(rows)


def load_results() -> list[PublishedRow]:
    """Load `results.csv`, in the order of its lines."""
    titles = json.loads(TITLES.read_text(encoding="utf-8"))
    with RESULTS.open(encoding="utf-8", newline="") as file:
        return [_read_line(line, titles) for line in csv.DictReader(file, strict=True)]


def _read_line(line: dict[str, str], titles: dict[str, str]) -> PublishedRow:
    texts = {name: text for name, text in line.items() if name not in ("architecture", "epochs", "value")}
    return PublishedRow(
        **texts,  # type: ignore[arg-type]
        backbone=line["architecture"],
        value=float(line["value"]),
        epochs=int(line["epochs"]) if line["epochs"] else None,
        title=titles.get(line["source"], line["source"]),
    )


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


def select_published(columns: Iterable[Column]) -> list[PublishedRow]:
    """Return the quoted numbers of the tasks and kinds of protocol of these columns, without settings."""
    kinds = {(column.task, get_kind(column.protocol)) for column in columns}
    return [row for row in load_published() if (row.task, row.kind) in kinds and not has_setting(row)]


def has_setting(row: PublishedRow) -> bool:
    """Return whether a row belongs to an ablation or a curve, which have tables of their own."""
    return bool(row.ablation) or row.blocks is not None


def build_section(results: Results) -> Section | None:
    """Return the published results of the protocols of a comparison, with their sources."""
    rows = select_published(results.comparison.columns)
    if not rows:
        return None
    groups = group_by(rows, lambda row: task_sort_key(row.task))
    folds: list[Block] = [_build_fold(task, members) for (_, task), members in groups]
    return Section(TITLE, (*folds, Paragraph("Sources:"), Bullets(build_links(rows))))


def build_links(rows: Iterable[PublishedRow]) -> tuple[Link, ...]:
    """Return one link per source: papers with their titles, files of repositories at their commits."""
    found = sorted({(row.source, row.title, row.place, row.url) for row in rows})
    texts = {
        url: f"{source}: {title}" if title != source else f"{source}: {place}"
        for source, title, place, url in found
    }
    return tuple(Link(text, url) for url, text in texts.items())


def _build_fold(task: str, rows: list[PublishedRow]) -> Fold:
    left = [Header(name, align="left") for name in TEXTS]
    headers = (*left, Header("value"), Header("source", align="left"))
    caption = "Quoted as printed: full-size models on the full datasets."
    table = Table(f"Published results, {task}", headers, tuple(map(_build_cells, rows)), caption)
    return Fold(f"{task}: {len(rows)} published numbers", (table,))


def _build_cells(row: PublishedRow) -> tuple[TableCell, ...]:
    texts = (
        row.backbone,
        row.protocol,
        f"{row.dataset} {row.split}",
        f"{row.metric} ({row.unit})",
    )
    note = (Line(row.note),) if row.note else ()
    source = TableCell(f"{row.source}, {row.place}", lines=note, url=row.url)
    pretraining = (Line(row.pretraining),) if row.pretraining else ()
    method = TableCell(row.method, lines=pretraining)
    return (method, *map(TableCell, texts), TableCell(f"{row.value}", value=row.value), source)
