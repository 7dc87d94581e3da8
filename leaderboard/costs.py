"""What the runs of a row cost, from the costs that its records state."""

from collections.abc import Sequence
from statistics import fmean

from leaderboard.columns import PRETRAIN, grouped, task_order
from leaderboard.index import Run
from leaderboard.table import Cost, Total
from mae_bench.record import ResultRecord


def costs_of(records: list[Run], rows: list[str]) -> list[Cost]:
    """A line for each row and protocol, in the order of `rows`, the making of the backbone first."""
    fields = (
        "seconds_train",
        "seconds_features",
        "seconds_eval",
        "images_per_second",
        "params",
        "gmacs",
        "peak_memory_mib",
    )
    lines = []
    for (backbone, task, protocol), members in grouped(
        [run.record for run in records], lambda record: (record.backbone, record.task, record.protocol)
    ):
        means = {name: mean_of([record.cost.get(name) for record in members]) for name in fields}
        lines.append(Cost(backbone, task, protocol, len(members), **means))
    return sorted(lines, key=lambda line: (rows.index(line.backbone), task_order(line.task)))


def totals_of(records: list[Run], rows: list[str]) -> list[Total]:
    totals = []
    for row in rows:
        own = [run.record for run in records if run.record.backbone == row]
        made = [seconds_of(record) for record in own if record.task == PRETRAIN]
        used = [seconds_of(record) for record in own if record.task != PRETRAIN]
        totals.append(Total(row, _sum(made), _sum(used)))
    return totals


def seconds_of(record: ResultRecord) -> float | None:
    """Training, features and evaluation; None where the record does not say how long they took, or the training that it had."""
    known = [
        record.cost[name]
        for name in ("seconds_train", "seconds_features", "seconds_eval")
        if name in record.cost
    ]
    lacks_training = "epochs" in record.config and "seconds_train" not in record.cost
    return sum(known) if known and not lacks_training else None


def _known(values: Sequence[float | None]) -> list[float]:
    """All of the values, or none where one of them is missing: a partial sum would pass for the whole."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []


def mean_of(values: Sequence[float | None]) -> float | None:
    return fmean(known) if (known := _known(values)) else None


def _sum(values: Sequence[float | None]) -> float | None:
    return sum(known) if (known := _known(values)) else None
