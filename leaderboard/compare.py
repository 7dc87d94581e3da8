"""Puts rows side by side, each against the baseline, with the spread and the interval that its seeds allow."""

import json
import math
from dataclasses import replace
from statistics import fmean

from leaderboard.ablation import beside_columns
from leaderboard.columns import PRETRAIN, column_order, columns_of, columns_of_failures
from leaderboard.costs import costs_of, mean_of, seconds_of, totals_of
from leaderboard.index import Run, Runs
from leaderboard.metrics import metrics_of
from leaderboard.table import Cell, Column, Comparison, Difference
from leaderboard.wording import column_name, verdict
from mae_bench.intervals import paired_interval, sample_std, welch_interval
from mae_bench.record import Failure, ResultRecord


def compare(runs: Runs, baseline: str = "supervised") -> Comparison:
    """Rows are backbones, columns are (task, protocol, dataset, split, main metric).

    Records of one column that differ in images, in their number or in config stand in separate columns (A, B, ...), and
    `problems` names what differs. Of two records of one row, column and seed the newer counts, and `problems` names
    both. A baseline without scores leaves the table without differences.
    """
    problems = runs.problems + _strangers(runs)
    groups = columns_of([run for run in runs.records if run.record.task != PRETRAIN], problems)
    columns = [column for column, _ in groups] + columns_of_failures(
        runs.failures, [column for column, _ in groups]
    )
    columns.sort(key=column_order)
    members = {id(column): members for column, members in groups}
    rows = _rows(runs, baseline)
    cells: dict[str, list[Cell]] = {row: [] for row in rows}
    for column in columns:
        for row, cell in _fill(runs, column, rows, members.get(id(column), []), baseline, problems).items():
            cells[row].append(cell)
    verdicts = [
        verdict(baseline, column, {row: cells[row][i] for row in rows}) for i, column in enumerate(columns)
    ]
    costs, totals = costs_of(runs.records, rows), totals_of(runs.records, rows)
    notes = _notes(runs.records, cells, baseline)
    beside = beside_columns(runs, columns, rows)
    return Comparison(
        baseline, rows, columns, cells, costs, totals, runs.failures, verdicts, notes, problems, beside
    )


def _strangers(runs: Runs) -> list[str]:
    """Transfers of another backbone than the one whose making their row records."""
    made: dict[str, set[str]] = {}
    for run in runs.records:
        if run.record.task == PRETRAIN:
            made.setdefault(run.record.backbone, set()).add(run.record.backbone_digest)
    return [
        f"{runs.name(run.path)} scores another backbone than the {run.record.backbone} whose making is recorded: run it again"
        for run in runs.records
        if run.record.task != PRETRAIN
        and run.record.backbone_digest not in made.get(run.record.backbone, {run.record.backbone_digest})
    ]


def _rows(runs: Runs, baseline: str) -> list[str]:
    names = {run.record.backbone for run in runs.records} | {failure.backbone for failure in runs.failures}
    return sorted(names, key=lambda name: (name != baseline, name))


def _fill(
    runs: Runs, column: Column, rows: list[str], members: list[Run], baseline: str, problems: list[str]
) -> dict[str, Cell]:
    """The cells of one column, with their differences to the baseline's and the best marked."""
    cells = {}
    for row in rows:
        own = _one_a_seed(runs, column, [run for run in members if run.record.backbone == row], problems)
        lost = [
            f
            for f in runs.failures
            if (f.backbone, f.task, f.protocol) == (row, column.task, column.protocol)
        ]
        cells[row] = _cell(own, [failure for failure in lost if failure.seed not in own])
    means = [cell.mean for cell in cells.values() if cell.mean is not None]
    best = (max if column.direction == "higher" else min)(means) if len(means) > 1 else None
    base = cells.get(baseline, Cell())
    return {
        row: replace(
            cell,
            is_best=best is not None and cell.mean == best,
            difference=None if row == baseline else _difference(cell, base, column.direction == "higher"),
        )
        for row, cell in cells.items()
    }


def _one_a_seed(
    runs: Runs, column: Column, members: list[Run], problems: list[str]
) -> dict[int, ResultRecord]:
    chosen: dict[int, Run] = {}
    for run in sorted(members, key=lambda run: (run.record.finished, run.path), reverse=True):
        if newer := chosen.get(run.record.seed):
            problems.append(
                f"{run.record.backbone}, {column_name(column)}, seed {run.record.seed} was recorded more than once: "
                f"{runs.name(newer.path)} is the newest and counts, {runs.name(run.path)} is left out"
            )
        else:
            chosen[run.record.seed] = run
    if len({_signature_of_backbone(run.record) for run in chosen.values()}) > 1:
        problems.append(
            f"{members[0].record.backbone}, {column_name(column)}: its seeds are of different architectures"
        )
    return {seed: chosen[seed].record for seed in sorted(chosen)}


def _signature_of_backbone(record: ResultRecord) -> str:
    return json.dumps(record.backbone_spec, sort_keys=True, default=str)


def _cell(own: dict[int, ResultRecord], lost: list[Failure]) -> Cell:
    if not own:
        return Cell(status=lost[0].status if lost else "absent", failures=tuple(lost))
    values = tuple(float(record.score.value) for record in own.values())
    seconds = [seconds_of(record) for record in own.values()]
    return Cell(
        "measured",
        seeds=tuple(own),
        values=values,
        mean=fmean(values),
        std=sample_std(values),
        seconds=mean_of(seconds),
        failures=tuple(lost),
        metrics=metrics_of(list(own.values())),
    )


def _difference(cell: Cell, base: Cell, higher_is_better: bool) -> Difference | None:
    if cell.mean is None or base.mean is None:
        return None
    value = cell.mean - base.mean
    better = None if math.isclose(value, 0, abs_tol=1e-12) else (value > 0) == higher_is_better
    paired = cell.seeds == base.seeds
    if (
        min(len(cell.values), len(base.values)) < 2 or cell.std == base.std == 0
    ):  # where nothing is drawn, seeds say nothing
        return Difference(value, better, paired)
    low, high = (paired_interval if paired else welch_interval)(cell.values, base.values)
    return Difference(value, better, paired, low, high)


def _notes(records: list[Run], cells: dict[str, list[Cell]], baseline: str) -> list[str]:
    """What the reader must know to read the numbers rightly."""
    notes = (
        []
        if baseline in cells
        else [
            f"There is no row named {baseline}, so the table has no differences (--baseline NAME of a row gives them)."
        ]
    )
    everything = [cell for row in cells.values() for cell in row]
    if any(cell.difference and cell.difference.low is not None for cell in everything):
        notes.append(
            "Intervals hold 95 % by Student's t over the seeds, each for itself: no correction for many comparisons."
        )
    if any(len(cell.values) == 1 for cell in everything):
        notes.append("A cell with one seed has no spread: its difference may be noise.")
    if any(cell.std == 0 for cell in everything):
        notes.append(
            "A deviation of 0 says that every seed gave the same: where nothing is drawn, it is no evidence."
        )
    repeated = [row for row in cells if any(len(cell.values) > 1 for cell in cells[row])]
    shared = [row for row in repeated if len(_backbones_of(records, row)) == 1]
    if shared:
        notes.append(
            f"All seeds of {', '.join(shared)} transfer one and the same backbone: "
            "their spread is that of the transfer, not of the pretraining."
        )
    return notes


def _backbones_of(records: list[Run], row: str) -> set[str]:
    return {
        run.record.backbone_digest
        for run in records
        if run.record.backbone == row and run.record.task != PRETRAIN
    }
