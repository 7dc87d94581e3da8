"""The published numbers of an ablation beside the measured ones, with all that keeps the two from being compared."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from leaderboard.columns import PRETRAIN, grouped
from leaderboard.index import Runs
from leaderboard.published import PublishedRow, published_rows
from leaderboard.table import Beside, Column, Comparison
from leaderboard.wording import MISSING, column_name, number, score, signed

HEADING = "Ablation, with the published numbers beside the measured ones"
SHOWN = 4  # differences in a sentence; JSON and CSV have all
DEFAULT = "default"  # the row that the others change in one respect
IMAGES = {"ImageNet-1K": 50_000}  # of the published split
MODELS = {"ViT-L/16": {"embed_dim": 1024, "depth": 24, "patch_size": [16, 16], "img_size": [224, 224]}}
PRETRAINING = {  # of the default row: arXiv 2111.06377, Table 8 and the caption of Table 1
    **{"epochs": 800, "global_batch_size": 4096, "mask_ratio": 0.75, "mask_sampling": "random"},
    **{"target": "pixels", "norm_pix_loss": False, "decoder_depth": 8, "decoder_embed_dim": 512},
}


def beside_columns(runs: Runs, columns: list[Column], rows: list[str]) -> list[Beside]:
    """What is published for rows of these names, a member for each column whose kind of protocol it was measured by.

    Names meet by chance: a single row that is called as a published one makes no ablation.
    """
    found = []
    for i, column in enumerate(columns):
        quoted = [row for row in published_rows() if row.ablation in rows and _is_like(row, column)]
        for (model, protocol, dataset, source), members in grouped(
            quoted, lambda row: (row.backbone, row.protocol, row.dataset, row.source)
        ):
            values = {row.ablation: row.value for row in reversed(members)}
            places = {row.ablation: row.place for row in reversed(members)}
            if len(values) > 1:
                differs = _differences(runs, column, members[0])
                found.append(
                    Beside(i, model, protocol, dataset, source, members[0].url, values, places, differs)
                )
    return found


def _is_like(row: PublishedRow, column: Column) -> bool:
    """Both fine-tuned, or both probed: protocols open with the word for it."""
    kinds = [protocol.partition("-")[0] for protocol in (row.protocol, column.protocol)]
    return (row.task, row.metric, kinds[0]) == (column.task, column.metric, kinds[1])


def _differences(runs: Runs, column: Column, row: PublishedRow) -> tuple[str, ...]:
    """Sentences, none where protocol, data, model and the default row's pretraining are the published ones."""
    records = [run.record for run in runs.records]
    specs = [r.backbone_spec for r in records if (r.task, r.protocol) == (column.task, column.protocol)]
    made = [r.config for r in records if (r.task, r.backbone) == (PRETRAIN, DEFAULT)] or [{}]
    found = [("protocol", column.protocol, row.protocol), ("images", column.num_samples, IMAGES[row.dataset])]
    found += [(name, _given(specs, name, value), value) for name, value in MODELS[row.backbone].items()]
    found += [
        (f"pretraining {name}", _given(made, name, value), value) for name, value in PRETRAINING.items()
    ]
    return tuple(
        f"{name} {_text(ours)}, published {_text(theirs)}" for name, ours, theirs in found if ours != theirs
    )


def _given(values: list[dict[str, Any]], name: str, wanted: Any) -> Any:
    """The first value that is not the wanted one, else the wanted one."""
    return next((value.get(name) for value in values if value.get(name) != wanted), wanted)


def headers(comparison: Comparison) -> list[tuple[str, ...]]:
    """Of the table that `lines` fills: each header in parts, the most important first."""
    named: list[tuple[str, ...]] = [("row",)]
    for beside in comparison.beside:
        named.append(("measured", *column_name(comparison.columns[beside.column]).split(" ", 1)))
        warning = "not comparable" if beside.differs else "same protocol, data and model"
        named.append(("published", f"{beside.model}, {beside.protocol}", beside.dataset, warning))
    return [*named, ("source",)] if comparison.beside else []


def lines(comparison: Comparison) -> list[list[str]]:
    """A line a row in the source's order: scores, in brackets the difference to the default row, and where it is published."""
    published = list(dict.fromkeys(row.ablation for row in published_rows()))
    rows = sorted(
        comparison.rows, key=lambda row: published.index(row) if row in published else len(published)
    )
    return [[row, *(text for beside in comparison.beside for text in _pair(comparison, beside, row)), _place(comparison, row)]
            for row in rows] if comparison.beside else []  # fmt: skip


def sentences(comparison: Comparison) -> list[str]:
    """How the table is to be read."""
    if not comparison.beside:
        return []
    return [
        f"In brackets: the difference to the row {DEFAULT}.",
        *(_verdict(comparison, beside) for beside in comparison.beside),
    ]


def _pair(comparison: Comparison, beside: Beside, row: str) -> tuple[str, str]:
    column = comparison.columns[beside.column]
    means = {name: cells[beside.column].mean for name, cells in comparison.cells.items()}
    own = comparison.cells[row][beside.column]
    measured = score(own, column) if own.mean is None else _with_change(means, row, column)
    return measured, _with_change(beside.values, row, replace(column, decimals=1))  # as it is printed


def _with_change(values: Mapping[str, float | None], row: str, column: Column) -> str:
    value, default = values.get(row), values.get(DEFAULT)
    if value is None:
        return MISSING
    return number(value, column) + (
        "" if default is None or row == DEFAULT else f" ({signed(value - default, column)})"
    )


def _place(comparison: Comparison, row: str) -> str:
    return (
        ", ".join(dict.fromkeys(beside.places[row] for beside in comparison.beside if row in beside.places))
        or MISSING
    )


def _verdict(comparison: Comparison, beside: Beside) -> str:
    name = column_name(comparison.columns[beside.column])
    whose = f"{beside.source}, {beside.model} on {beside.dataset}"
    if beside.differs:
        more = f"; and {len(beside.differs) - SHOWN} more" if len(beside.differs) > SHOWN else ""
        return f"{name}: not comparable with the published numbers ({whose}): {'; '.join(beside.differs[:SHOWN])}{more}."
    return f"{name}: protocol, data, model and the default's pretraining are those of the published numbers ({whose})."


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " x ".join(map(str, value))
    return "not recorded" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
