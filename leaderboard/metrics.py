"""All metrics of each protocol, next to the main metric that its column shows."""

from statistics import fmean

from leaderboard.curve import build_cells, is_point
from leaderboard.sections import Block, Fold, Header, Paragraph, Results, Section, Table, TableCell
from leaderboard.table import Comparison, Measured
from leaderboard.wording import name_column, name_data
from mae_bench.intervals import sample_std
from mae_bench.record import ResultRecord

TITLE = "All metrics per protocol"
MARGIN = "_margin"  # suffix of the metric that holds the half width of an interval over draws
BEST = "best_"  # prefix of metrics that were selected on the evaluated images themselves
CHOSEN = (
    "best_top1 is the best epoch, selected on the evaluated images themselves; the score is that of the "
    "last epoch."
)
DRAWN = "In brackets: half the width of the 95 % confidence interval over the draws of one record."


def aggregate_metrics(records: list[ResultRecord]) -> dict[str, Measured]:
    """Aggregate each metric of a cell over its seeds, in the order of the records.

    `NAME_margin` becomes the margin of NAME.
    """
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    own = [name for name in names if not (name.endswith(MARGIN) and name.removesuffix(MARGIN) in names)]
    return {name: _aggregate_metric(records, name) for name in own}


def _aggregate_metric(records: list[ResultRecord], name: str) -> Measured:
    found = [record.metrics[name] for record in records if name in record.metrics]
    margins = [record.metrics[name + MARGIN].value for record in records if name + MARGIN in record.metrics]
    values = [float(metric.value) for metric in found]
    margin = fmean(margins) if margins else None
    return Measured(fmean(values), sample_std(values), len(values), found[0].unit, found[0].direction, margin)


def build_section(results: Results) -> Section | None:
    """Return one table per column whose records have more metrics than the score."""
    comparison = results.comparison
    folds: list[Block] = []
    for place, column in enumerate(comparison.columns):
        table = build_table(comparison, place)
        if table:
            summary = f"{name_column(column)}, {name_data(column)}: {len(table.headers) - 1} metrics"
            folds.append(Fold(summary, (table,)))
    reading = Paragraph("Mean and sample standard deviation over the seeds.")
    return Section(TITLE, (reading, *folds)) if folds else None


def build_table(comparison: Comparison, place: int) -> Table | None:
    """Return the metrics of the column at `place`, one row per backbone with a score.

    None where the records have no metric next to the score. Points of a curve have their own table.
    """
    column = comparison.columns[place]
    found = _collect_metrics(comparison, place)
    shown = {name: value for name, value in found.items() if not is_point(name)}
    if len(shown) < 2:
        return None
    cells = {row: cells[place] for row, cells in comparison.cells.items() if cells[place].metrics}
    num_seeds = [len(cell.values) for cell in cells.values()]
    columns = []
    for name in shown:
        columns.append(build_cells([cell.metrics.get(name) for cell in cells.values()], num_seeds))
    rows = tuple((TableCell(row), *own) for row, *own in zip(cells, *columns, strict=True))
    headers = (
        Header("backbone", align="left"),
        *(_build_header(name, value) for name, value in shown.items()),
    )
    name = f"Metrics of {name_column(column)}, {name_data(column)}"
    return Table(name, headers, rows, caption=" ".join(_explain(found)))


def _collect_metrics(comparison: Comparison, place: int) -> dict[str, Measured]:
    """Return every metric of a column, with the value of one of its rows."""
    found: dict[str, Measured] = {}
    for cells in comparison.cells.values():
        found.update(cells[place].metrics)
    return found


def _build_header(name: str, value: Measured) -> Header:
    direction = ", lower is better" if value.direction == "lower" else ""
    return Header(name, (value.unit + direction,))


def _explain(found: dict[str, Measured]) -> list[str]:
    """Return the sentences that the metrics of a table need."""
    sentences = [CHOSEN] if any(name.startswith(BEST) for name in found) else []
    if any(value.margin is not None for value in found.values()):
        sentences.append(DRAWN)
    return sentences
