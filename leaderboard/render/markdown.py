"""The comparison as Markdown."""

import re

from leaderboard import ablation, curve, metrics
from leaderboard.curve import Curve, curves, published_curves
from leaderboard.published import HEADING, PublishedRow
from leaderboard.table import Cell, Column, Comparison, Cost
from leaderboard.wording import column_metric, column_name, count, difference, duration, failure, score


def render_markdown(comparison: Comparison, published: list[PublishedRow], title: str) -> str:
    """Tables and lists; text from records is escaped, so that it stays text."""
    parts = [
        f"# {_escape(title)}",
        f"Scores with the sample deviation over n seeds, and below each the difference to {_escape(comparison.baseline)} "
        "with its 95 % interval. Bold: best of the column. A missing score is `-`, never 0.",
        _main(comparison),
        _ablation(comparison),
        _curves(comparison),
        _list("What it shows", comparison.verdicts),
        _list("Without a score", [failure(lost) for lost in comparison.failures]),
        _list("Problems", comparison.problems),
        _list("How to read it", comparison.notes),
        _metrics(comparison),
        _costs(comparison),
        _published(published),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _main(comparison: Comparison) -> str:
    headers = [
        f"{_escape(column_name(column))}<br>{_escape(f'{column.dataset} {column.split}')}<br>{_escape(column_metric(column))}"
        for column in comparison.columns
    ]
    rows = [
        [
            _escape(row),
            *(
                _cell(cell, column)
                for cell, column in zip(comparison.cells[row], comparison.columns, strict=True)
            ),
        ]
        for row in comparison.rows
    ]
    return _table(["backbone", *headers], rows)


def _ablation(comparison: Comparison) -> str:
    if not comparison.beside:
        return ""
    headers = ["<br>".join(map(_escape, parts)) for parts in ablation.headers(comparison)]
    rows = [list(map(_escape, line)) for line in ablation.lines(comparison)]
    return f"{_list(ablation.HEADING, ablation.sentences(comparison))}\n\n{_table(headers, rows)}"


def _curves(comparison: Comparison) -> str:
    found = curves(comparison)
    tables = [_curve(each) for each in [*found, *published_curves()]] if found else []
    return "\n\n".join([f"## {curve.HEADING}", curve.READING, *tables]) if tables else ""


def _curve(each: Curve) -> str:
    note = f" {_escape(each.note)}" if each.note else ""
    table = _table(curve.headers(each), [list(map(_escape, line)) for line in curve.lines(each)])
    return f"{_escape(f'{each.name}: {each.place}.')}{note}\n\n{table}"


def _metrics(comparison: Comparison) -> str:
    """A table a column that measured more than its score."""
    parts = [f"## {metrics.HEADING}", "Mean and sample deviation over the seeds."]
    for place, column in enumerate(comparison.columns):
        if headers := metrics.headers(comparison, place):
            name = f"{column_name(column)}, {column.dataset} {column.split}."
            parts.append(_escape(" ".join([name, *metrics.sentences(comparison, place)])))
            rows = [list(map(_escape, line)) for line in metrics.lines(comparison, place)]
            parts.append(_table(["<br>".join(map(_escape, header)) for header in headers], rows))
    return "\n\n".join(parts) if len(parts) > 2 else ""


def _cell(cell: Cell, column: Column) -> str:
    text = f"**{score(cell, column)}**" if cell.is_best else score(cell, column)
    return text + (f"<br>{difference(cell.difference, column)}" if cell.difference else "")


def _costs(comparison: Comparison) -> str:
    totals = [
        [_escape(total.backbone), duration(total.seconds_pretrain), duration(total.seconds_transfer)]
        for total in comparison.totals
    ]
    headers = [
        "backbone",
        "job",
        "runs",
        "training",
        "features",
        "evaluation",
        "img/s",
        "parameters",
        "GMACs",
        "peak MiB",
    ]
    return "\n\n".join(
        [
            "## Cost",
            "All seeds together; `-` where a record does not say.",
            _table(["backbone", "pretraining", "transfer"], totals),
            "Mean of a run:",
            _table(headers, [_cost(cost) for cost in comparison.costs]),
        ]
    )


def _cost(cost: Cost) -> list[str]:
    numbers = (cost.images_per_second, cost.params, cost.gmacs, cost.peak_memory_mib)
    times = (duration(cost.seconds_train), duration(cost.seconds_features), duration(cost.seconds_eval))
    return [
        _escape(cost.backbone),
        _escape(f"{cost.task} {cost.protocol}"),
        str(cost.num_runs),
        *times,
        *(count(value) for value in numbers),
    ]


def _published(rows: list[PublishedRow]) -> str:
    if not rows:
        return ""
    headers = ["method", "backbone", "protocol", "data", "metric", "value", "source"]
    lines = [
        [
            row.method,
            row.backbone,
            row.protocol,
            f"{row.dataset} {row.split}",
            f"{row.metric} ({row.unit})",
            f"{row.value}",
            f"[{row.source}, {row.place}]({row.url})",
        ]
        for row in rows
    ]
    return f"## {HEADING}\n\n{_table(headers, lines)}"


def _list(heading: str, lines: list[str]) -> str:
    return f"## {heading}\n\n" + "\n".join(f"- {_escape(line)}" for line in lines) if lines else ""


def _table(headers: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *(["---:"] * (len(headers) - 1))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, rule, *rows))


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
