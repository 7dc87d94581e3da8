"""Sorts records into columns of like cells and names the conflicts between unlike ones."""

import json
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from leaderboard.index import Run
from leaderboard.table import Column
from leaderboard.wording import decimals_of
from mae_bench.record import NOT_THE_METHOD, Failure, ResultRecord

PRETRAIN = "pretrain"  # the task of the jobs that make a backbone: a cost and a picture, never a column
TASKS = (PRETRAIN, "imagenet", "coco", "ade20k")  # shown first and in this order; any other follows by name


def columns_of(measured: list[Run], problems: list[str]) -> list[tuple[Column, list[Run]]]:
    """The records by column; a column whose records are not alike is split and named."""
    found = []
    for _, like in grouped(measured, lambda run: _key(run.record)):
        variants = [members for _, members in grouped(like, lambda run: _signature(run.record))]
        variants.sort(key=len, reverse=True)
        for i, members in enumerate(variants):
            found.append((_column(members, _letter(i) if len(variants) > 1 else ""), members))
        if len(variants) > 1:
            problems.append(_conflict([members[0].record for members in variants]))
    return found


def _key(record: ResultRecord) -> tuple[str, ...]:
    return record.task, record.protocol, record.dataset, record.split, record.main_metric


def _signature(record: ResultRecord) -> str:
    return json.dumps(_conditions(record), sort_keys=True, default=str)


def _conditions(record: ResultRecord) -> dict[str, Any]:
    """What must be the same for two scores to be alike."""
    metric = {"unit": record.score.unit, "direction": record.score.direction}
    return {
        "data_digest": record.data_digest,
        "num_samples": record.num_samples,
        **metric,
        "config": _method(record),
    }


def _method(record: ResultRecord) -> dict[str, Any]:
    return {key: value for key, value in record.config.items() if key not in NOT_THE_METHOD}


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _column(members: list[Run], variant: str) -> Column:
    record = members[0].record
    largest = max(abs(run.record.score.value) for run in members)
    return Column(
        record.task,
        record.protocol,
        record.dataset,
        record.split,
        record.main_metric,
        record.score.unit,
        record.score.direction,
        record.num_samples,
        record.data_digest,
        _method(record),
        variant,
        decimals_of(largest, record.score.unit),
    )


def _conflict(records: list[ResultRecord]) -> str:
    flat = [_flatten(_conditions(record)) for record in records]
    keys = sorted({key for one in flat for key in one if len({repr(other.get(key)) for other in flat}) > 1})
    shown = [f"{key} ({' / '.join(_brief(one.get(key)) for one in flat)})" for key in keys[:5]]
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    first = records[0]
    return (
        f"{first.task} {first.protocol} on {first.dataset} {first.split}: records differ in {', '.join(shown)}{more}, "
        f"so they stand in {len(records)} separate columns"
    )


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item})
    return flat


def _brief(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."


def columns_of_failures(failures: list[Failure], columns: list[Column]) -> list[Column]:
    """A column for each protocol that has failures and no score at all."""
    scored = {(column.task, column.protocol) for column in columns}
    wanted = {(failure.task, failure.protocol) for failure in failures if failure.task != PRETRAIN}
    return [Column(task, protocol) for task, protocol in sorted(wanted - scored)]


def column_order(column: Column) -> tuple[Any, ...]:
    """Sorts columns by task, then by name."""
    return (
        task_order(column.task),
        column.protocol,
        column.dataset,
        column.split,
        column.metric,
        column.variant,
    )


def task_order(task: str) -> tuple[int, str]:
    """Sorts tasks: the making of the backbone, the known ones, any other by name."""
    return (TASKS.index(task) if task in TASKS else len(TASKS)), task


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> list[tuple[Any, list[Any]]]:
    """The items by key, in the order of the keys."""
    return [(name, list(members)) for name, members in groupby(sorted(items, key=key), key=key)]
