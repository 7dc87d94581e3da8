"""Measured and published results of an ablation side by side, with the differences between their settings."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from leaderboard.columns import PRETRAIN, group_by
from leaderboard.index import Runs
from leaderboard.published import PublishedRow, get_kind, load_published
from leaderboard.sections import Bullets, Header, Paragraph, Results, Section, Table, TableCell, Tone
from leaderboard.table import Column, Comparison, PublishedComparison
from leaderboard.wording import (
    MISSING,
    format_number,
    format_score,
    format_signed,
    name_column,
    name_protocol,
)

TITLE = "Ablation: measured and published results"
SHOWN = 4  # differences in a sentence; JSON and CSV hold all of them
DEFAULT = "default"  # the row that every other row changes in one respect
IMAGES = {"ImageNet-1K": 50_000}  # in the published split
MODELS = {"ViT-L/16": {"embed_dim": 1024, "depth": 24, "patch_size": [16, 16], "img_size": [224, 224]}}
PRETRAINING = {  # of the default row: arXiv 2111.06377, Table 8 and the caption of Table 1
    "epochs": 800,
    "global_batch_size": 4096,
    "mask_ratio": 0.75,
    "mask_sampling": "random",
    "target": "pixels",
    "norm_pix_loss": False,
    "decoder_depth": 8,
    "decoder_embed_dim": 512,
}


def match_published(runs: Runs, columns: list[Column], rows: list[str]) -> list[PublishedComparison]:
    """Return the published results for the rows of an ablation, per column with the same kind of protocol.

    A single row with the name of a published one is a coincidence and not an ablation.
    """
    found = []
    for i, column in enumerate(columns):
        published = [row for row in load_published() if row.ablation in rows and _matches(row, column)]
        for (model, protocol, dataset, source), members in group_by(
            published, lambda row: (row.backbone, row.protocol, row.dataset, row.source)
        ):
            values = {row.ablation: row.value for row in reversed(members)}
            places = {row.ablation: row.place for row in reversed(members)}
            if len(values) < 2:
                continue
            differs = _find_differences(runs, column, members[0])
            url = members[0].url
            found.append(
                PublishedComparison(i, model, protocol, dataset, source, url, values, places, differs)
            )
    return found


def _matches(row: PublishedRow, column: Column) -> bool:
    """Return whether both were fine-tuned or both were probed, which is the first word of a protocol."""
    return (row.task, row.metric, row.kind) == (column.task, column.metric, get_kind(column.protocol))


def _find_differences(runs: Runs, column: Column, row: PublishedRow) -> tuple[str, ...]:
    """Return every difference in protocol, data, model and the pretraining of the default row."""
    records = [run.record for run in runs.records]
    specs = [r.backbone_spec for r in records if (r.task, r.protocol) == (column.task, column.protocol)]
    configs = [r.config for r in records if (r.task, r.backbone) == (PRETRAIN, DEFAULT)] or [{}]
    settings: list[tuple[str, Any, Any]] = [
        ("protocol", column.protocol, row.protocol),
        ("images", column.num_samples, IMAGES[row.dataset]),
    ]
    for name, value in MODELS[row.backbone].items():
        settings.append((name, _find_other(specs, name, value), value))
    for name, value in PRETRAINING.items():
        settings.append((f"pretraining {name}", _find_other(configs, name, value), value))
    return tuple(
        f"{name} {_format_setting(measured)}, published {_format_setting(published)}"
        for name, measured, published in settings
        if measured != published
    )


def _find_other(values: list[dict[str, Any]], name: str, expected: Any) -> Any:
    """Return the first value that differs from the expected one, else the expected one."""
    return next((value.get(name) for value in values if value.get(name) != expected), expected)


def _format_setting(value: Any) -> str:
    if value is None:
        return "not recorded"
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def build_section(results: Results) -> Section | None:
    """Return the table of an ablation, and for each column whether its numbers may be compared."""
    comparison = results.comparison
    if not comparison.published_comparisons:
        return None
    reading = Paragraph(
        f"Published numbers are quoted from their source. In brackets: the difference to the row {DEFAULT}."
    )
    return Section(
        TITLE, (reading, build_table(comparison), Bullets(describe_settings(comparison))), medium="terminal"
    )


def build_table(comparison: Comparison) -> Table:
    """Return the scores, the published scores and where they are printed, in the order of the source."""
    headers = [Header("row", align="left")]
    for published in comparison.published_comparisons:
        column = comparison.columns[published.column]
        headers.append(Header("measured", (column.task, name_protocol(column))))
        status = "not comparable" if published.differs else "same protocol, data and model"
        lines = (f"{published.model}, {published.protocol}", published.dataset, status)
        headers.append(Header("published", lines))
    headers.append(Header("source", align="left"))
    rows = tuple(_build_row(comparison, row) for row in _sort_rows(comparison.rows))
    return Table("Ablation", tuple(headers), rows, is_compact=False)


def _sort_rows(rows: list[str]) -> list[str]:
    published = list(dict.fromkeys(row.ablation for row in load_published()))
    return sorted(rows, key=lambda row: published.index(row) if row in published else len(published))


def _build_row(comparison: Comparison, row: str) -> tuple[TableCell, ...]:
    cells = [TableCell(row)]
    places = []
    for published in comparison.published_comparisons:
        cells += _build_pair(comparison, published, row)
        if row in published.places:
            places.append(published.places[row])
    return (*cells, TableCell(", ".join(dict.fromkeys(places)) or MISSING))


def _build_pair(comparison: Comparison, published: PublishedComparison, row: str) -> list[TableCell]:
    """Return the measured and the published score of a row."""
    column = comparison.columns[published.column]
    means = {name: cells[published.column].mean for name, cells in comparison.cells.items()}
    own = comparison.cells[row][published.column]
    printed = replace(column, decimals=1)  # as the papers print their numbers
    return [
        TableCell(format_score(own, column)) if own.mean is None else _build_cell(means, row, column),
        _build_cell(published.values, row, printed, "soft"),
    ]


def _build_cell(
    values: Mapping[str, float | None], row: str, column: Column, tone: Tone = "plain"
) -> TableCell:
    value, default = values.get(row), values.get(DEFAULT)
    if value is None:
        return TableCell(MISSING, tone=tone)
    text = format_number(value, column)
    if default is not None and row != DEFAULT:
        text = f"{text} ({format_signed(value - default, column)})"
    return TableCell(text, value=value, tone=tone)


def describe_settings(comparison: Comparison) -> tuple[str, ...]:
    """Return one sentence per measured column: comparable with the published numbers, or what differs."""
    sentences = []
    for published in comparison.published_comparisons:
        name = name_column(comparison.columns[published.column])
        source = f"{published.source}, {published.model} on {published.dataset}"
        if not published.differs:
            sentences.append(
                f"{name}: same protocol, data, model and default pretraining as published ({source})."
            )
            continue
        hidden = len(published.differs) - SHOWN
        more = f"; and {hidden} more" if hidden > 0 else ""
        differs = "; ".join(published.differs[:SHOWN])
        sentences.append(f"{name}: not comparable with the published numbers ({source}): {differs}{more}.")
    return tuple(sentences)
