"""Format numbers, columns, differences and verdicts: the same wording in every rendering."""

from collections.abc import Sequence

from leaderboard.table import Cell, Column, Difference, Measured
from mae_bench.record import Failure, ResultRecord

MISSING = "-"


def choose_decimals(largest: float, unit: str) -> int:
    """Return the number of decimals for scores up to `largest`.

    Percentages have one decimal, as papers print them, and two where all of them are below 10. Other
    units have about three significant digits.
    """
    if unit == "%":
        return 1 if largest >= 10 else 2
    if largest < 10:
        return 3
    return 1 if largest < 1000 else 0


def format_number(value: float, column: Column) -> str:
    """Return the value with the column's number of decimals."""
    return f"{value:.{column.decimals}f}"


def format_signed(value: float, column: Column) -> str:
    """Return the value with its sign; a value that rounds to zero is `+0.0`."""
    text = f"{value:+.{column.decimals}f}"
    return text.replace("-", "+") if float(text) == 0 else text


def format_score(cell: Cell, column: Column) -> str:
    """Return `61.2 ± 0.4 (n=3)`, `61.2 (n=1)`, `61.2 (n=1, 2 failed)`, `failed`, `not installed` or `-`."""
    if cell.mean is None:
        return MISSING if cell.status == "absent" else cell.status
    spread = f" ± {format_number(cell.std, column)}" if cell.std is not None else ""
    lost = f", {len(cell.failures)} {cell.failures[0].status}" if cell.failures else ""
    return f"{format_number(cell.mean, column)}{spread} (n={len(cell.values)}{lost})"


def format_metric(values: Sequence[Measured | None], num_seeds: Sequence[int]) -> list[str]:
    """Format one metric of several cells as `61.2 ± 0.4 (1.1)`, with the margin over draws in brackets.

    `n=2` follows where only that many of the cell's seeds have the metric.
    """
    found = [value for value in values if value is not None]
    decimals = choose_decimals(max(abs(value.mean) for value in found), found[0].unit) if found else 0
    return [_format_measured(value, decimals, n) for value, n in zip(values, num_seeds, strict=True)]


def _format_measured(value: Measured | None, decimals: int, num_seeds: int) -> str:
    if value is None:
        return MISSING
    parts = [f"{value.mean:.{decimals}f}"]
    if value.std is not None:
        parts.append(f"± {value.std:.{decimals}f}")
    if value.margin is not None:
        parts.append(f"({value.margin:.{decimals}f})")
    if value.n != num_seeds:
        parts.append(f"n={value.n}")
    return " ".join(parts)


def format_difference(change: Difference, column: Column) -> str:
    """Return `-1.8 [-2.4, -1.2]`, or `-1.8 (no interval)`."""
    value = format_signed(change.value, column)
    if change.low is None or change.high is None:
        return f"{value} (no interval)"
    return f"{value} [{format_signed(change.low, column)}, {format_signed(change.high, column)}]"


def describe_difference(change: Difference) -> str:
    """Return one word: `better`, `worse`, `equal`, or `unclear` where the interval includes 0."""
    if change.low is not None and not change.is_clear:
        return "unclear"
    return {True: "better", False: "worse", None: "equal"}[change.better]


def name_column(column: Column) -> str:
    """Return `imagenet finetune-100ep`, with the letter of a variant: `imagenet finetune-100ep (A)`."""
    return f"{column.task} {name_protocol(column)}"


def name_protocol(column: Column) -> str:
    """Return `finetune-100ep`, with the letter of a variant."""
    return f"{column.protocol} ({column.variant})" if column.variant else column.protocol


def name_data(column: Column) -> str:
    """Return the dataset and the split, `shapes val`; "" for a column without any score."""
    return f"{column.dataset} {column.split}".strip()


def name_metric(column: Column) -> str:
    """Return `top1 (%), higher is better`; `no score` for a column without any score."""
    if not column.metric:
        return "no score"
    return f"{column.metric} ({column.unit}), {column.direction} is better"


def name_code(record: ResultRecord) -> str:
    """Return the first digits of the digest of a record's code, or of its commit where it has no digest."""
    return record.code_digest[:12] or f"commit {record.git_hash[:12] or 'unknown'}"


def describe_failure(failure: Failure) -> str:
    """Return one line: the cell, its seed, the reason, and what to do next."""
    cell = f"{failure.backbone}, {failure.task} {failure.protocol}, seed {failure.seed}"
    fix = f" (next: {failure.fix})" if failure.fix else ""
    return f"{cell}: {failure.status}: {failure.reason}{fix}"


def format_duration(seconds: float | None) -> str:
    """Return `8.21 s`, `95 s`, `31.3 min` or `2.4 h`."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.3g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def format_count(value: float | None) -> str:
    """Return `86.6 M`, `5.50 k`, or the number itself below 1000."""
    if value is None:
        return MISSING
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def describe_column(baseline: str, column: Column, cells: dict[str, Cell]) -> str:
    """Return the verdict of a column: one sentence that claims no more than its seeds support."""
    base = cells.get(baseline, Cell())
    others = {row: cell for row, cell in cells.items() if row != baseline and cell.mean is not None}
    name = name_column(column)
    if not column.metric:
        return f"{name}: no scores."
    if base.mean is None:
        return f"{name}: no comparison, because {baseline} has no score."
    score_of_baseline = f"{baseline} {format_number(base.mean, column)}"
    if not others:
        return f"{name}: no comparison, because only {score_of_baseline} was measured."
    parts = []
    for row, cell in others.items():
        score = format_number(cell.mean or 0.0, column)
        parts.append(f"{row} {score} vs {score_of_baseline}: {_describe_evidence(cell, base, column)}")
    return f"{name}, {column.metric}: {'; '.join(parts)}."


def _describe_evidence(cell: Cell, base: Cell, column: Column) -> str:
    """Return the difference with its confidence interval, or with the reason why there is none."""
    change = cell.difference
    assert change is not None  # both have a mean
    value = format_signed(change.value, column)
    if change.low is None or change.high is None:
        return f"{value} (no interval: {_describe_seeds(cell, base)})"
    if change.paired:
        seeds = f"{len(cell.values)} paired seeds"
    else:
        seeds = f"{len(cell.values)} and {len(base.values)} unpaired seeds"
    zero = "" if change.is_clear else ", includes 0"
    low, high = format_signed(change.low, column), format_signed(change.high, column)
    return f"{value} (95 % CI {low} to {high}{zero}; {seeds})"


def _describe_seeds(cell: Cell, base: Cell) -> str:
    """Return why the seeds of two cells give no interval."""
    if len(cell.values) == len(base.values) == 1:
        return "one seed each"
    if cell.std == base.std == 0:
        return "identical scores in every seed"
    return f"{len(cell.values)} and {len(base.values)} seeds"
