"""Cost of each backbone: times, throughput and sizes, from what its records state."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from leaderboard.columns import PRETRAIN, group_by, task_sort_key
from leaderboard.index import Run
from leaderboard.sections import Header, Paragraph, Results, Section, Table, TableCell
from leaderboard.table import Cost, Total
from leaderboard.wording import format_count, format_duration
from mae_bench.record import ResultRecord

TIMES = ("seconds_train", "seconds_features", "seconds_eval")
FIELDS = (*TIMES, "images_per_second", "params", "gmacs", "peak_memory_mib")  # of a record's cost
HEADERS = ("runs", "training", "features", "evaluation", "img/s", "parameters", "GMACs", "peak MiB")


def compute_costs(records: list[Run], rows: list[str]) -> list[Cost]:
    """Return the mean cost per row and protocol, in the order of `rows`, pretraining first."""
    costs = []
    for (backbone, task, protocol), members in group_by(
        [run.record for run in records], lambda record: (record.backbone, record.task, record.protocol)
    ):
        means = {name: compute_mean(record.cost.get(name) for record in members) for name in FIELDS}
        costs.append(Cost(backbone, task, protocol, len(members), **means))
    return sorted(costs, key=lambda cost: (rows.index(cost.backbone), task_sort_key(cost.task)))


def compute_totals(records: list[Run], rows: list[str]) -> list[Total]:
    """Return the seconds that all runs of each row took, pretraining and transfer apart."""
    totals = []
    for row in rows:
        own = [run.record for run in records if run.record.backbone == row]
        pretrain = [compute_seconds(record) for record in own if record.task == PRETRAIN]
        transfer = [compute_seconds(record) for record in own if record.task != PRETRAIN]
        totals.append(Total(row, _compute_sum(pretrain), _compute_sum(transfer)))
    return totals


def compute_seconds(record: ResultRecord) -> float | None:
    """Return the seconds of training, feature extraction and evaluation.

    None where the record states none of them, or lacks the time of a training that took place.
    """
    known = [record.cost[name] for name in TIMES if name in record.cost]
    lacks_training = "epochs" in record.config and "seconds_train" not in record.cost
    return sum(known) if known and not lacks_training else None


def compute_mean(values: Iterable[float | None]) -> float | None:
    """Return the mean, or None where any value is missing."""
    known = _require_all(list(values))
    return fmean(known) if known else None


def _compute_sum(values: Sequence[float | None]) -> float | None:
    known = _require_all(values)
    return sum(known) if known else None


def _require_all(values: Sequence[float | None]) -> list[float]:
    """Return all values, or none where one is missing: a partial sum would pass for the total."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []


def build_total_section(results: Results) -> Section:
    """Return the total time of each backbone."""
    rows = tuple(
        (TableCell(total.backbone), _time_cell(total.seconds_pretrain), _time_cell(total.seconds_transfer))
        for total in results.comparison.totals
    )
    headers = (Header("backbone", align="left"), Header("pretraining"), Header("transfer"))
    reading = Paragraph("Total time of all runs and seeds. - where a record does not state it.")
    return Section("Cost", (reading, Table("Cost", headers, rows)), medium="terminal")


def build_run_section(results: Results) -> Section:
    """Return the mean cost of a run, per backbone and protocol."""
    names = (Header("backbone", align="left"), Header("job", align="left"))
    headers = (*names, *(Header(name) for name in HEADERS))
    rows = tuple(map(_build_row, results.comparison.costs))
    return Section(
        "Cost per run", (Paragraph("Means over the runs of a job."), Table("Cost per run", headers, rows))
    )


def _build_row(cost: Cost) -> tuple[TableCell, ...]:
    times = (cost.seconds_train, cost.seconds_features, cost.seconds_eval)
    numbers = (cost.images_per_second, cost.params, cost.gmacs, cost.peak_memory_mib)
    return (
        TableCell(cost.backbone),
        TableCell(f"{cost.task} {cost.protocol}"),
        TableCell(str(cost.num_runs), value=cost.num_runs),
        *map(_time_cell, times),
        *(TableCell(format_count(number), value=number) for number in numbers),
    )


def _time_cell(seconds: float | None) -> TableCell:
    return TableCell(format_duration(seconds), value=seconds)
