"""Group records into columns of comparable cells and report the conflicts between the others."""

import json
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from leaderboard.index import Run
from leaderboard.table import Column
from leaderboard.wording import choose_decimals, name_code, name_column
from mae_bench.record import NOT_IDENTITY, Failure, ResultRecord

PRETRAIN = "pretrain"  # the task of pretraining jobs: a cost and a picture, never a column
TASKS = (PRETRAIN, "imagenet", "coco", "ade20k")  # the order of tasks; others follow by name
MOST_SHOWN = 5  # differences in the sentence about a conflict


def group_columns(runs: list[Run], problems: list[str]) -> list[tuple[Column, list[Run]]]:
    """Return the runs per column.

    Runs of one column that were measured under different conditions are split into variants, and `problems`
    gains a sentence that names the differences. It also gains one for each column whose rows were computed
    with different code or versions of torch, which may change a score.
    """
    columns = []
    for _, group in group_by(runs, lambda run: _column_key(run.record)):
        variants = [members for _, members in group_by(group, lambda run: _encode_conditions(run.record))]
        variants.sort(key=len, reverse=True)
        for i, members in enumerate(variants):
            letter = _name_variant(i) if len(variants) > 1 else ""
            column = _build_column(members, letter)
            columns.append((column, members))
            problems += _describe_mixtures(column, members)
        if len(variants) > 1:
            problems.append(_describe_conflict([members[0].record for members in variants]))
    return columns


def _column_key(record: ResultRecord) -> tuple[str, ...]:
    return record.task, record.protocol, record.dataset, record.split, record.main_metric


def _encode_conditions(record: ResultRecord) -> str:
    return json.dumps(_collect_conditions(record), sort_keys=True, default=str)


def _collect_conditions(record: ResultRecord) -> dict[str, Any]:
    """Return what two scores must share to be comparable."""
    return {
        "protocol_version": record.protocol_version,
        "data_digest": record.data_digest,
        "num_samples": record.num_samples,
        "unit": record.score.unit,
        "direction": record.score.direction,
        "config": _select_method(record),
    }


def _select_method(record: ResultRecord) -> dict[str, Any]:
    """Return the part of the config that may change a score."""
    return {key: value for key, value in record.config.items() if key not in NOT_IDENTITY}


def _name_variant(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _build_column(members: list[Run], variant: str) -> Column:
    record = members[0].record
    largest = max(abs(run.record.score.value) for run in members)
    return Column(
        task=record.task,
        protocol=record.protocol,
        protocol_version=record.protocol_version,
        dataset=record.dataset,
        split=record.split,
        metric=record.main_metric,
        unit=record.score.unit,
        direction=record.score.direction,
        num_samples=record.num_samples,
        data_digest=record.data_digest,
        config=_select_method(record),
        variant=variant,
        decimals=choose_decimals(largest, record.score.unit),
    )


def _describe_conflict(records: list[ResultRecord]) -> str:
    """Return a sentence that names what the records of the variants of a column differ in."""
    conditions = [_flatten(_collect_conditions(record)) for record in records]
    keys = sorted({key for flat in conditions for key in flat})
    differing = [key for key in keys if len({repr(flat.get(key)) for flat in conditions}) > 1]
    shown = [
        f"{key} ({' / '.join(_abbreviate(flat.get(key)) for flat in conditions)})"
        for key in differing[:MOST_SHOWN]
    ]
    hidden = len(differing) - MOST_SHOWN
    more = f" and {hidden} more" if hidden > 0 else ""
    first = records[0]
    return (
        f"{first.task} {first.protocol} on {first.dataset} {first.split}: "
        f"records differ in {', '.join(shown)}{more}, "
        f"so they are shown in {len(records)} separate columns"
    )


def _describe_mixtures(column: Column, members: list[Run]) -> list[str]:
    """Return a sentence each if not all of a column was computed with one code, and with one torch."""
    found: dict[str, dict[str, set[str]]] = {"code": {}, "torch": {}}
    for run in members:
        record = run.record
        found["code"].setdefault(name_code(record), set()).add(record.backbone)
        found["torch"].setdefault(str(record.versions.get("torch")), set()).add(record.backbone)
    return [
        f"{name_column(column)} was computed with different {what}: "
        + " / ".join(f"{value} ({_list_some(sorted(rows))})" for value, rows in sorted(by_value.items()))
        for what, by_value in found.items()
        if len(by_value) > 1
    ]


def _list_some(names: list[str]) -> str:
    """Return the first names, and the number of the others."""
    hidden = len(names) - MOST_SHOWN
    return ", ".join(names[:MOST_SHOWN]) + (f" and {hidden} more" if hidden > 0 else "")


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat.update(_flatten(item, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _abbreviate(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."


def build_failed_columns(failures: list[Failure], columns: list[Column]) -> list[Column]:
    """Return a column for each protocol that has failures and no score."""
    scored = {(column.task, column.protocol) for column in columns}
    wanted = {(failure.task, failure.protocol) for failure in failures if failure.task != PRETRAIN}
    return [Column(task, protocol) for task, protocol in sorted(wanted - scored)]


def column_sort_key(column: Column) -> tuple[Any, ...]:
    """Return the key that sorts columns by task, then by name."""
    return (
        task_sort_key(column.task),
        column.protocol,
        column.dataset,
        column.split,
        column.metric,
        column.variant,
    )


def task_sort_key(task: str) -> tuple[int, str]:
    """Return the key that sorts tasks: pretraining, the known tasks, then others by name."""
    return (TASKS.index(task) if task in TASKS else len(TASKS)), task


def group_by(items: Iterable[Any], key: Callable[[Any], Any]) -> list[tuple[Any, list[Any]]]:
    """Return the items per key, in the order of the keys."""
    return [(name, list(members)) for name, members in groupby(sorted(items, key=key), key=key)]
