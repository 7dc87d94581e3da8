"""Reference boards: published results alone, one table per protocol or per table of a paper."""

import csv
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leaderboard.published import PublishedRow, build_links, load_results
from leaderboard.render.files import write_texts
from leaderboard.render.html import render_html
from leaderboard.render.markdown import render_markdown
from leaderboard.sections import Block, Bullets, Header, Report, Section, Table, TableCell
from leaderboard.wording import MISSING
from mae_bench.errors import UserError

LEAD = (
    "Published results, quoted as printed; nothing here was measured by mae_bench. Only rows of one protocol "
    "may be compared; in finetune, linear, knn, transfer and upernet each source has its own recipe."
)
ROBUST = (
    "ImageNet-A",
    "ImageNet-C",
    "ImageNet-R",
    "ImageNet-ReaL",
    "ImageNet-Sketch",
    "ImageNet-V2",
    "ObjectNet",
)


@dataclass(frozen=True)
class Board:
    """A selection of published rows. by_place: the tables are those of the source, in its order."""

    title: str
    shows: Callable[[PublishedRow], bool]
    by_place: bool = False


def _on_imagenet(*kinds: str) -> Callable[[PublishedRow], bool]:
    return lambda row: row.dataset == "ImageNet-1K" and row.kind in kinds


def _is_other(row: PublishedRow) -> bool:
    return row.kind != "frozen" and row.dataset not in ("ImageNet-1K", *ROBUST, "COCO", "LVIS v1", "ADE20K")


BOARDS = {
    "imagenet-finetune": Board("ImageNet-1K, fine-tuned", _on_imagenet("finetune", "supervised", "eval")),
    "imagenet-linear": Board("ImageNet-1K, linear and attentive probes", _on_imagenet("linear", "attentive")),
    "imagenet-knn": Board("ImageNet-1K, nearest neighbours", _on_imagenet("knn")),
    "imagenet-few-shot": Board("ImageNet-1K, few labels", _on_imagenet("few")),
    "imagenet-robust": Board("ImageNet variants", lambda row: row.dataset in ROBUST),
    "transfer": Board("Other sets, fine-tuned or probed", _is_other),
    "coco": Board("COCO, Mask R-CNN and Cascade Mask R-CNN", lambda row: row.dataset == "COCO"),
    "lvis": Board("LVIS v1, Mask R-CNN and Cascade Mask R-CNN", lambda row: row.dataset == "LVIS v1"),
    "ade20k": Board("ADE20K, fine-tuned", lambda row: row.task == "ade20k" and row.kind != "frozen"),
    "frozen-dense": Board("Segmentation and depth on frozen features", lambda row: row.kind == "frozen"),
    "mae": Board("The MAE paper", lambda row: row.source == "arXiv 2111.06377", by_place=True),
    "vitdet": Board("The ViTDet paper", lambda row: row.source == "arXiv 2203.16527", by_place=True),
}


def select_board(name: str) -> list[PublishedRow]:
    """Return the rows of a board, in the order of `results.csv`. UserError for an unknown name."""
    if name not in BOARDS:
        raise UserError(
            f"no board of published results is named {name}",
            expected=f"one of {', '.join(BOARDS)}",
            fix="mae-bench report --published imagenet-finetune",
        )
    return [row for row in load_results() if BOARDS[name].shows(row)]


def build_board(name: str) -> Report:
    """Return a board as a report: its tables, each with the notes of its rows, then the sources."""
    rows, board = select_board(name), BOARDS[name]
    groups: dict[str, list[PublishedRow]] = {}
    for row in sorted(rows, key=_place_sort_key if board.by_place else _protocol_sort_key):
        place = f"{row.place}: {row.dataset} {row.split}"
        protocol = f"{row.dataset} {row.split}, {row.protocol}"
        groups.setdefault(place if board.by_place else protocol, []).append(row)
    sections = [
        Section(title, _build_table(title, members, board.by_place), medium="terminal")
        for title, members in groups.items()
    ]
    sources = Section("Sources", (Bullets(build_links(rows)),), medium="terminal")
    return Report(f"Published: {board.title}", LEAD, (*sections, sources))


def _place_sort_key(row: PublishedRow) -> tuple[bool, int, str]:
    """Return the key that sorts tables by number, and before other places."""
    number = re.match(r"Table (\d+)", row.place)
    return number is None, int(number[1]) if number else 0, row.place


def _protocol_sort_key(row: PublishedRow) -> tuple[bool, str, str]:
    """Return the key that sorts the full ImageNet-1K, COCO and ADE20K before other sets, then by protocol."""
    return row.dataset not in ("ImageNet-1K", "COCO", "ADE20K"), row.dataset, row.protocol


def _build_table(title: str, rows: list[PublishedRow], by_place: bool) -> tuple[Block, ...]:
    """Return a table, best first by its first metric, and its notes. `by_place`: its title is its source."""
    metrics = {row.metric: row for row in rows}
    notes = list(dict.fromkeys(row.note for row in rows if row.note))
    headers = (
        *(Header(name, align="left") for name in ("method", "backbone", "pretraining")),
        *(Header(metric, (_name_unit(row),)) for metric, row in metrics.items()),
        Header("protocol" if by_place else "source", align="left"),
    )
    lines = sorted(_join_metrics(rows), key=lambda line: _score_sort_key(line, rows[0]))
    cells = tuple(_build_cells(line, list(metrics), notes, by_place) for line in lines)
    numbered = tuple(f"[{i}] {note}" for i, note in enumerate(notes, 1))
    table = Table(title, headers, cells)
    return (table, Bullets(numbered)) if numbered else (table,)


def _build_cells(
    line: dict[str, PublishedRow], metrics: list[str], notes: list[str], by_place: bool
) -> tuple[TableCell, ...]:
    """Return the cells of a model; the last one also refers to the notes."""
    row = next(iter(line.values()))
    found = [line.get(metric) for metric in metrics]
    numbers = sorted({notes.index(own.note) + 1 for own in line.values() if own.note})
    last = row.protocol if by_place else f"{row.source}, {row.place}"
    return (
        *(TableCell(text or MISSING) for text in (row.method, row.backbone, row.pretraining)),
        *(TableCell(f"{own.value}", value=own.value) if own else TableCell(MISSING) for own in found),
        TableCell(last, "".join(f" [{number}]" for number in numbers), url="" if by_place else row.url),
    )


def _name_unit(row: PublishedRow) -> str:
    return f"{row.unit}, lower is better" if row.direction == "lower" else row.unit


def _join_metrics(rows: list[PublishedRow]) -> list[dict[str, PublishedRow]]:
    """Return the rows of each model by metric; a second value of a metric (another seed) begins a line."""
    lines: list[dict[str, PublishedRow]] = []
    for row in rows:
        open_lines = (line for line in lines if row.metric not in line and _is_same_model(line, row))
        line = next(open_lines, None)
        if line is None:
            lines.append({row.metric: row})
        else:
            line[row.metric] = row
    return lines


def _is_same_model(line: dict[str, PublishedRow], row: PublishedRow) -> bool:
    names = ("method", "backbone", "pretraining", "protocol", "source", "place")
    first = next(iter(line.values()))
    return all(getattr(first, name) == getattr(row, name) for name in names)


def _score_sort_key(line: dict[str, PublishedRow], main: PublishedRow) -> float:
    """Return the key that sorts lines best first by the metric of `main`; lines without it are last."""
    row = line.get(main.metric)
    if row is None:
        return math.inf
    return row.value if main.direction == "lower" else -row.value


def build_json(name: str) -> dict[str, Any]:
    """Return the name, title and rows of a board as JSON types."""
    rows = [asdict(row) for row in select_board(name)]
    return {"board": name, "title": BOARDS[name].title, "note": LEAD, "rows": rows}


def write_board(name: str, out_dir: str | Path) -> list[Path]:
    """Write a board as `published-NAME.md`, `.csv`, `.json` and `.html`, and return their paths."""
    report = build_board(name)
    value = build_json(name)
    texts = {
        "md": render_markdown(report),
        "csv": _render_csv(value["rows"]),
        "json": json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "html": render_html(report),
    }
    return write_texts(out_dir, {f"published-{name}.{suffix}": text for suffix, text in texts.items()})


def _render_csv(rows: list[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
