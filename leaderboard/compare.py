"""Compare backbones: each against the baseline, with the spread and the interval that their seeds allow."""

import json
import math
from dataclasses import replace
from statistics import fmean

from leaderboard.ablation import match_published
from leaderboard.columns import PRETRAIN, build_failed_columns, column_sort_key, group_columns
from leaderboard.costs import compute_costs, compute_mean, compute_seconds, compute_totals
from leaderboard.index import Run, Runs
from leaderboard.metrics import aggregate_metrics
from leaderboard.table import Cell, Column, Comparison, Difference
from leaderboard.wording import describe_column, name_code, name_column
from mae_bench.intervals import paired_interval, sample_std, welch_interval
from mae_bench.record import Failure, ResultRecord


def compare(runs: Runs, baseline: str = "supervised") -> Comparison:
    """Compare all runs: rows are backbones, columns are (task, protocol, dataset, split, metric).

    Records of one column that differ in version, images or config are shown in separate columns
    (A, B, ...). If a row has two records for one column and seed, the newer one is used. `problems` names
    both cases. Without scores of the baseline there are no differences.
    """
    problems = runs.problems + _find_mismatches(runs)
    groups = group_columns([run for run in runs.records if run.record.task != PRETRAIN], problems)
    columns = [column for column, _ in groups]
    columns += build_failed_columns(runs.failures, columns)
    columns.sort(key=column_sort_key)
    members = {id(column): own for column, own in groups}
    rows = _list_rows(runs, baseline)
    cells: dict[str, list[Cell]] = {row: [] for row in rows}
    verdicts = []
    for column in columns:
        own = _build_cells(runs, column, rows, members.get(id(column), []), baseline, problems)
        verdicts.append(describe_column(baseline, column, own))
        for row, cell in own.items():
            cells[row].append(cell)
    return Comparison(
        baseline=baseline,
        rows=rows,
        columns=columns,
        cells=cells,
        costs=compute_costs(runs.records, rows),
        totals=compute_totals(runs.records, rows),
        failures=runs.failures,
        verdicts=verdicts,
        notes=_write_notes(runs.records, cells, baseline),
        problems=problems,
        published_comparisons=match_published(runs, columns, rows),
    )


def _find_mismatches(runs: Runs) -> list[str]:
    """Return a sentence for each transfer of a backbone that its row's pretraining did not produce."""
    pretrained: dict[str, set[str]] = {}
    for run in runs.records:
        if run.record.task == PRETRAIN:
            pretrained.setdefault(run.record.backbone, set()).add(run.record.backbone_digest)
    problems = []
    for run in runs.records:
        name, digest = run.record.backbone, run.record.backbone_digest
        if run.record.task != PRETRAIN and digest not in pretrained.get(name, {digest}):
            problems.append(
                f"{runs.name(run.path)} scores a backbone that differs from the recorded pretraining of "
                f"{name}: run it again"
            )
    return problems


def _list_rows(runs: Runs, baseline: str) -> list[str]:
    """Return the names of all backbones, the baseline first."""
    names = {run.record.backbone for run in runs.records} | {failure.backbone for failure in runs.failures}
    return sorted(names, key=lambda name: (name != baseline, name))


def _build_cells(
    runs: Runs, column: Column, rows: list[str], members: list[Run], baseline: str, problems: list[str]
) -> dict[str, Cell]:
    """Return the cells of one column, with differences to the baseline and the best cell marked."""
    cells = {}
    for row in rows:
        own = _select_newest(runs, column, [run for run in members if run.record.backbone == row], problems)
        place = (row, column.task, column.protocol)
        lost = [f for f in runs.failures if (f.backbone, f.task, f.protocol) == place and f.seed not in own]
        cells[row] = _build_cell(own, lost)
    higher_is_better = column.direction == "higher"
    means = [cell.mean for cell in cells.values() if cell.mean is not None]
    best = (max if higher_is_better else min)(means) if len(means) > 1 else None
    base = cells.get(baseline, Cell())
    return {
        row: replace(
            cell,
            is_best=best is not None and cell.mean == best,
            difference=None if row == baseline else _compute_difference(cell, base, higher_is_better),
        )
        for row, cell in cells.items()
    }


def _select_newest(
    runs: Runs, column: Column, members: list[Run], problems: list[str]
) -> dict[int, ResultRecord]:
    """Return the newest record per seed, in the order of the seeds."""
    chosen: dict[int, Run] = {}
    for run in sorted(members, key=lambda run: (run.record.finished, run.path), reverse=True):
        newer = chosen.setdefault(run.record.seed, run)
        if newer is not run:
            problems.append(
                f"{run.record.backbone}, {name_column(column)}, seed {run.record.seed} "
                f"was recorded more than once: {runs.name(newer.path)} is the newest and is used, "
                f"{runs.name(run.path)} is ignored"
            )
    specs = {json.dumps(run.record.backbone_spec, sort_keys=True, default=str) for run in chosen.values()}
    if len(specs) > 1:
        problems.append(
            f"{members[0].record.backbone}, {name_column(column)}: the seeds have different architectures"
        )
    return {seed: chosen[seed].record for seed in sorted(chosen)}


def _build_cell(own: dict[int, ResultRecord], lost: list[Failure]) -> Cell:
    """Return a cell from its records by seed and its failures."""
    if not own:
        return Cell(status=lost[0].status if lost else "absent", failures=tuple(lost))
    values = tuple(float(record.score.value) for record in own.values())
    return Cell(
        "measured",
        seeds=tuple(own),
        values=values,
        mean=fmean(values),
        std=sample_std(values),
        seconds=compute_mean(compute_seconds(record) for record in own.values()),
        failures=tuple(lost),
        code=tuple(sorted({name_code(record) for record in own.values()})),
        metrics=aggregate_metrics(list(own.values())),
    )


def _compute_difference(cell: Cell, base: Cell, higher_is_better: bool) -> Difference | None:
    if cell.mean is None or base.mean is None:
        return None
    value = cell.mean - base.mean
    better = None if math.isclose(value, 0, abs_tol=1e-12) else (value > 0) == higher_is_better
    paired = cell.seeds == base.seeds
    is_deterministic = cell.std == base.std == 0  # where nothing is drawn, seeds are no evidence
    if min(len(cell.values), len(base.values)) < 2 or is_deterministic:
        return Difference(value, better, paired)
    compute_interval = paired_interval if paired else welch_interval
    low, high = compute_interval(cell.values, base.values)
    return Difference(value, better, paired, low, high)


def _write_notes(records: list[Run], cells: dict[str, list[Cell]], baseline: str) -> list[str]:
    """Return what a reader must know to interpret the scores."""
    notes = []
    if baseline not in cells:
        notes.append(
            f"No differences are shown: there is no row named {baseline} (choose one with --baseline NAME)."
        )
    everything = [cell for row in cells.values() for cell in row]
    if any(cell.difference and cell.difference.low is not None for cell in everything):
        notes.append(
            "Intervals are two-sided 95 % Student's t confidence intervals over seeds, one per difference, "
            "without correction for multiple comparisons."
        )
    if any(len(cell.values) == 1 for cell in everything):
        notes.append("A cell with one seed has no spread, so its difference may be noise.")
    if any(cell.std == 0 for cell in everything):
        notes.append(
            "A standard deviation of 0 means that every seed gave the same score: if the protocol draws "
            "nothing at random, it is no evidence of precision."
        )
    repeated = [row for row in cells if any(len(cell.values) > 1 for cell in cells[row])]
    shared = [row for row in repeated if len(_collect_digests(records, row)) == 1]
    if shared:
        notes.append(
            f"All seeds of {', '.join(shared)} transfer the same backbone: "
            "the spread is that of the transfer, not of the pretraining."
        )
    return notes


def _collect_digests(records: list[Run], row: str) -> set[str]:
    """Return the digests of the backbones that a row transfers."""
    transfers = [run.record for run in records if run.record.task != PRETRAIN]
    return {record.backbone_digest for record in transfers if record.backbone == row}
