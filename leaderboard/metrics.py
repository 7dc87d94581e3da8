"""All metrics of a column's records side by side: what a protocol measures beside its score."""

from statistics import fmean

from leaderboard.curve import is_point
from leaderboard.table import Comparison, Measured
from leaderboard.wording import measured
from mae_bench.intervals import sample_std
from mae_bench.record import ResultRecord

HEADING = "All metrics of each protocol"
MARGIN = "_margin"  # ends the name of a metric's half width over draws
BEST = "best_"  # opens the names of what was chosen on the evaluated images themselves
CHOSEN = "best_top1 is the best of the epochs, chosen on the evaluated images themselves; the score is the last epoch's."
DRAWN = "In brackets: half the width of the 95 % interval over one record's draws."


def metrics_of(records: list[ResultRecord]) -> dict[str, Measured]:
    """Every metric of a cell's records over its seeds, in the records' order; `NAME_margin` belongs to NAME."""
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    own = [name for name in names if not (name.endswith(MARGIN) and name.removesuffix(MARGIN) in names)]
    return {name: _measured(records, name) for name in own}


def _measured(records: list[ResultRecord], name: str) -> Measured:
    found = [record.metrics[name] for record in records if name in record.metrics]
    margins = [record.metrics[name + MARGIN].value for record in records if name + MARGIN in record.metrics]
    values = [float(metric.value) for metric in found]
    margin = fmean(margins) if margins else None
    return Measured(fmean(values), sample_std(values), len(values), found[0].unit, found[0].direction, margin)


def headers(comparison: Comparison, place: int) -> list[tuple[str, ...]]:
    """Of the table that `lines` fills: each header in parts; none where there is nothing beside the score.

    place: the column's. A curve's points are left out: they have their own table.
    """
    found = {
        name: value for cells in comparison.cells.values() for name, value in cells[place].metrics.items()
    }
    kept = [(name, value) for name, value in found.items() if not is_point(name)]
    named = [
        (name, value.unit + (", lower is better" if value.direction == "lower" else ""))
        for name, value in kept
    ]
    return [("backbone",), *named] if len(named) > 1 else []


def lines(comparison: Comparison, place: int) -> list[list[str]]:
    """A line a row that has a score: mean and sample deviation over the seeds, in brackets the margin over draws."""
    own = {row: cells[place] for row, cells in comparison.cells.items() if cells[place].metrics}
    seeds = [len(cell.values) for cell in own.values()]
    names = [name for name, *_ in headers(comparison, place)[1:]]
    columns = [measured([cell.metrics.get(name) for cell in own.values()], seeds) for name in names]
    return [[row, *texts] for row, *texts in zip(own, *columns, strict=True)]


def sentences(comparison: Comparison, place: int) -> list[str]:
    """How the table is to be read."""
    found = {
        name: value for cells in comparison.cells.values() for name, value in cells[place].metrics.items()
    }
    chosen = [CHOSEN] if any(name.startswith(BEST) for name in found) else []
    return chosen + ([DRAWN] if any(value.margin is not None for value in found.values()) else [])
