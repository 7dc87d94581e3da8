"""The comparison as rich tables for a terminal of 100 columns."""

from collections.abc import Iterator

from rich.box import HORIZONTALS
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from leaderboard import ablation
from leaderboard.table import Cell, Column, Comparison
from leaderboard.wording import column_metric, column_name, difference, duration, failure, judgement, score

PER_TABLE = 4  # columns that fit side by side
STYLES = {"better": "green", "worse": "red"}


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints tables, verdicts, costs, failures and problems."""
    console.print(render_terminal(comparison))


def render_terminal(comparison: Comparison) -> RenderableType:
    """One table for every four columns, then sentences."""
    parts: list[RenderableType] = []
    for start in range(0, len(comparison.columns), PER_TABLE):
        parts += [_table(comparison, start), Text()]
    return Group(*parts, *_ablation(comparison), _costs(comparison), *_sentences(comparison))


def _table(comparison: Comparison, start: int) -> Table:
    shown = comparison.columns[start : start + PER_TABLE]
    table = Table(box=HORIZONTALS, header_style="bold", show_lines=True)
    table.add_column("backbone", overflow="fold")
    for column in shown:
        table.add_column(_header(column), justify="right", overflow="fold")
    for row in comparison.rows:
        cells = comparison.cells[row][start : start + PER_TABLE]
        table.add_row(Text(row), *(_cell(cell, column) for cell, column in zip(cells, shown, strict=True)))
    return table


def _header(column: Column) -> Text:
    place = f"{column.dataset} {column.split}".strip()
    metric = column_metric(column).replace(", ", "\n")
    return Text(
        "\n".join(line for line in (column.task, column_name(column).split(" ", 1)[1], place, metric) if line)
    )


def _cell(cell: Cell, column: Column) -> Text:
    text = Text(score(cell, column), style="bold" if cell.is_best else "")
    if cell.difference:
        style = STYLES[judgement(cell.difference)] if cell.difference.is_clear else "dim"
        text.append(
            "\n" + difference(cell.difference, column).replace(" ", "\n", 1), style=f"not bold {style}"
        )
    return text


def _ablation(comparison: Comparison) -> Iterator[RenderableType]:
    """The published numbers beside the measured ones, two columns of each to a table."""
    if not comparison.beside:
        return
    headers, lines = ablation.headers(comparison), ablation.lines(comparison)
    table = Table(title=ablation.HEADING, title_justify="left", box=HORIZONTALS, header_style="bold")
    for i, parts in enumerate(headers):
        widest = min(28, max(len(line[0]) for line in lines)) if i == 0 else None
        table.add_column(
            Text("\n".join(parts)), justify="right" if i else "left", overflow="fold", min_width=widest
        )
    for line in lines:
        table.add_row(*map(Text, line))
    yield from (table, Text())


def _costs(comparison: Comparison) -> Table:
    table = Table(
        title="Cost (all seeds together)", title_justify="left", box=HORIZONTALS, header_style="bold"
    )
    table.add_column("backbone", overflow="fold")
    for name in ("pretraining", "transfer"):
        table.add_column(name, justify="right")
    for total in comparison.totals:
        table.add_row(
            Text(total.backbone), duration(total.seconds_pretrain), duration(total.seconds_transfer)
        )
    return table


def _sentences(comparison: Comparison) -> Iterator[Text]:
    lists = {
        "What it shows": comparison.verdicts,
        ablation.HEADING: ablation.sentences(comparison),
        "Without a score": [failure(lost) for lost in comparison.failures],
        "Problems": comparison.problems,
        "How to read it": [
            f"Below a score: the difference to {comparison.baseline} and its 95 % interval; bold: best of the column.",
            *comparison.notes,
        ],
    }
    for heading, lines in lists.items():
        if lines:
            yield Text(f"\n{heading}", style="bold")
            yield from (Text(f"- {line}") for line in lines)
