"""How numbers, columns and verdicts are spelled, the same in every rendering."""

from collections.abc import Sequence

from leaderboard.table import Cell, Column, Difference, Measured
from mae_bench.record import Failure

MISSING = "-"


def decimals_of(largest: float, unit: str) -> int:
    """Per cent as papers print them, finer where the scores are small; anything else to about three digits."""
    if unit == "%":
        return 1 if largest >= 10 else 2
    return 3 if largest < 10 else 1 if largest < 1000 else 0


def number(value: float, column: Column) -> str:
    return f"{value:.{column.decimals}f}"


def signed(value: float, column: Column) -> str:
    text = f"{value:+.{column.decimals}f}"
    return text.replace("-", "+") if float(text) == 0 else text


def score(cell: Cell, column: Column) -> str:
    """`61.2 ± 0.4 (n=3)`, `61.2 (n=1)`, `failed`, `not installed` or `-`; failed seeds beside measured ones are named."""
    if cell.mean is None:
        return MISSING if cell.status == "absent" else cell.status
    spread = f" ± {number(cell.std, column)}" if cell.std is not None else ""
    lost = f", {len(cell.failures)} {cell.failures[0].status}" if cell.failures else ""
    return f"{number(cell.mean, column)}{spread} (n={len(cell.values)}{lost})"


def measured(values: Sequence[Measured | None], seeds: Sequence[int]) -> list[str]:
    """One metric of several cells: `61.2 ± 0.4 (1.1)`, the margin over draws in brackets; `n=2` where only so many of the cell's
    seeds have it."""
    found = [value for value in values if value is not None]
    decimals = decimals_of(max(abs(value.mean) for value in found), found[0].unit) if found else 0
    return [_measured(value, decimals, n) for value, n in zip(values, seeds, strict=True)]


def _measured(value: Measured | None, decimals: int, seeds: int) -> str:
    if value is None:
        return MISSING
    parts = [f"{value.mean:.{decimals}f}"]
    parts += [f"± {value.std:.{decimals}f}"] if value.std is not None else []
    parts += [f"({value.margin:.{decimals}f})"] if value.margin is not None else []
    return " ".join([*parts, f"n={value.n}"] if value.n != seeds else parts)


def difference(change: Difference, column: Column) -> str:
    """`-1.8 [-2.4, -1.2]`, or `-1.8 (no interval)`."""
    if change.low is None or change.high is None:
        return f"{signed(change.value, column)} (no interval)"
    return f"{signed(change.value, column)} [{signed(change.low, column)}, {signed(change.high, column)}]"


def judgement(change: Difference) -> str:
    """One or two words: what the difference shows."""
    if change.low is not None and not change.is_clear:
        return "unclear"
    return {True: "better", False: "worse", None: "equal"}[change.better]


def column_name(column: Column) -> str:
    """`imagenet finetune-100ep`, with the variant's letter."""
    return f"{column.task} {column.protocol}" + (f" ({column.variant})" if column.variant else "")


def column_metric(column: Column) -> str:
    """`top1 (%), higher is better`; of a column without any score that there is none."""
    return f"{column.metric} ({column.unit}), {column.direction} is better" if column.metric else "no score"


def failure(lost: Failure) -> str:
    """One line: what, which seed, why, and what to do."""
    place = f"{lost.backbone}, {lost.task} {lost.protocol}, seed {lost.seed}"
    return f"{place}: {lost.status}: {lost.reason}" + (f" (next: {lost.fix})" if lost.fix else "")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count(value: float | None) -> str:
    """`86.6 M`, `5.50 k` or the number itself."""
    if value is None:
        return MISSING
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def verdict(baseline: str, column: Column, cells: dict[str, Cell]) -> str:
    """What a column shows, in one sentence, without claiming more than its seeds allow."""
    base = cells.get(baseline, Cell())
    others = {row: cell for row, cell in cells.items() if row != baseline and cell.mean is not None}
    name = column_name(column)
    if not column.metric:
        return f"{name}: no row has a score."
    if base.mean is None:
        return f"{name}: {baseline} has no score here, so there is nothing to compare with."
    score_of_baseline = f"{baseline} {number(base.mean, column)}"
    if not others:
        return f"{name}: only {score_of_baseline}."
    parts = [
        f"{row} {number(cell.mean or 0.0, column)} vs {score_of_baseline}: {_evidence(cell, base, column)}"
        for row, cell in others.items()
    ]
    return f"{name}, {column.metric}: " + "; ".join(parts) + "."


def _evidence(cell: Cell, base: Cell, column: Column) -> str:
    change = cell.difference
    assert change is not None  # both have a mean
    if change.low is None or change.high is None:
        alone, same = len(cell.values) == len(base.values) == 1, cell.std == base.std == 0
        several = f"{len(cell.values)} against {len(base.values)} seeds"
        seeds = "1 seed" if alone else "the same in every seed" if same else several
        return f"{signed(change.value, column)} ({seeds}: no interval)"
    pairs = (
        f"{len(cell.values)} paired seeds"
        if change.paired
        else f"{len(cell.values)} and {len(base.values)} unpaired seeds"
    )
    zero = "" if change.is_clear else ", which includes 0"
    low, high = signed(change.low, column), signed(change.high, column)
    return f"{signed(change.value, column)} (95 % interval {low} to {high}{zero}; {pairs})"
