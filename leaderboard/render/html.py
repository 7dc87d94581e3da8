"""The comparison as one HTML file that needs nothing else: styles, script and pictures are inside."""

from html import escape
from pathlib import Path

from leaderboard import ablation, curve, metrics
from leaderboard.columns import grouped, task_order
from leaderboard.curve import Curve, curves, published_curves
from leaderboard.index import Runs
from leaderboard.published import HEADING, PublishedRow
from leaderboard.render.chart import chart
from leaderboard.render.gallery import gallery
from leaderboard.render.line_chart import line_chart
from leaderboard.render.provenance import provenance
from leaderboard.table import Cell, Column, Comparison, Cost, Difference, Total
from leaderboard.wording import (
    MISSING,
    column_metric,
    column_name,
    count,
    difference,
    duration,
    failure,
    judgement,
    number,
    score,
)

HERE = Path(__file__).parent
LEAD = (
    "Pretrained backbones, transferred to image classification, detection and segmentation by the same protocols, "
    "and compared with {baseline} pretraining."
)


def render_html(comparison: Comparison, runs: Runs, published: list[PublishedRow], title: str) -> str:
    """A whole page. Everything that comes from records is escaped."""
    problems = list(comparison.problems)
    figures = gallery(runs, problems)
    sections = [
        f"<h1>{escape(title)}</h1><p class='lead'>{escape(LEAD.format(baseline=comparison.baseline))} {_extent(runs)}</p>",
        _list("Problems", problems, "problems"),
        _main(comparison),
        _ablation(comparison),
        _curves(comparison),
        _list("Without a score", [failure(lost) for lost in comparison.failures]),
        _list("What it shows", comparison.verdicts),
        _list("How to read it", comparison.notes),
        _charts(comparison),
        _metrics(comparison),
        _section("Reconstructions", f'<div class="gallery">{"".join(figures)}</div>' if figures else ""),
        _costs(comparison),
        _section("How each score was measured", provenance(runs)),
        _published(published),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{(HERE / 'page.css').read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(part for part in sections if part)}\n</main>\n"
        f"<script>\n{(HERE / 'page.js').read_text(encoding='utf-8')}</script>\n</body>\n</html>\n"
    )


def _extent(runs: Runs) -> str:
    dates = sorted(run.record.finished[:10] for run in runs.records if run.record.finished)
    span = (
        f", measured {escape(dates[0])}" + (f" to {escape(dates[-1])}" if dates[0] != dates[-1] else "")
        if dates
        else ""
    )
    return f"{len(runs.records)} records{span}."


def _section(heading: str, content: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{escape(heading)}</h2>{content}</section>' if content else ""


def _list(heading: str, lines: list[str], kind: str = "") -> str:
    return _section(
        heading, f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else "", kind
    )


def _table(name: str, caption: str, head: str, body: str, kind: str) -> str:
    """A table that scrolls on a narrow screen, by keyboard too."""
    return (
        f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0"><table class="sortable {kind}">'
        f"<caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _main(comparison: Comparison) -> str:
    caption = (
        f"Mean and sample deviation over n seeds; below, the difference to {escape(comparison.baseline)} with its 95 % interval. "
        "Bold: best of the column. Coloured: the interval leaves 0 out. A missing score is -."
    )
    head = '<th scope="col">backbone</th>' + "".join(map(_header, comparison.columns))
    body = "".join(_row(comparison, row) for row in comparison.rows)
    return _section("Comparison", _table("Comparison", caption, head, body, "main"))


def _header(column: Column) -> str:
    parts = (
        column_name(column).split(" ", 1)[1],
        f"{column.dataset} {column.split}".strip(),
        column_metric(column),
    )
    small = "".join(f"<small>{escape(part)}</small>" for part in parts if part)
    return f'<th scope="col">{escape(column.task)}{small}</th>'


def _row(comparison: Comparison, row: str) -> str:
    kind = ' class="baseline"' if row == comparison.baseline else ""
    cells = zip(comparison.cells[row], comparison.columns, strict=True)
    return f'<tr{kind}><th scope="row">{escape(row)}</th>{"".join(_cell(cell, column) for cell, column in cells)}</tr>'


def _cell(cell: Cell, column: Column) -> str:
    if cell.mean is None:
        return f'<td data-value="">{_missing(cell, column)}</td>'
    best = '<span class="hidden"> best</span>' if cell.is_best else ""
    mean = number(cell.mean, column)
    rest = _minus(score(cell, column).removeprefix(mean))
    change = _change(cell.difference, column) if cell.difference else ""
    return (
        f'<td data-value="{cell.mean!r}"{" class=best" if cell.is_best else ""}>'
        f'<span class="score">{_minus(mean)}</span><span class="soft">{escape(rest)}</span>{best}{change}</td>'
    )


def _missing(cell: Cell, column: Column) -> str:
    if cell.status == "absent":
        return '<span class="soft">-</span>'
    reason = "; ".join(lost.reason for lost in cell.failures)
    return f'<span class="lost" title="{escape(reason)}">{escape(score(cell, column))}</span>'


def _change(change: Difference, column: Column) -> str:
    word = judgement(change)
    return f'<div class="change{f" {word}" if change.is_clear else ""}">{escape(_minus(difference(change, column)))} {word}</div>'


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _ablation(comparison: Comparison) -> str:
    if not comparison.beside:
        return ""
    head, body = _heads(ablation.headers(comparison)), _lines(ablation.lines(comparison))
    caption = "Published numbers are quoted. " + ablation.sentences(comparison)[0]
    reading = "".join(f"<li>{escape(line)}</li>" for line in ablation.sentences(comparison)[1:])
    table = _table("Ablation", escape(caption), head, body, "ablation")
    return _section(ablation.HEADING, f"{table}<ul>{reading}</ul>")


def _heads(headers: list[tuple[str, ...]]) -> str:
    """Header cells, the first part of each large."""
    return "".join(
        f'<th scope="col">{escape(first)}{"".join(f"<small>{escape(part)}</small>" for part in rest)}</th>'
        for first, *rest in headers
    )


def _lines(lines: list[list[str]]) -> str:
    """Rows of texts; what is missing stays last when the table is sorted."""
    return "".join(
        f'<tr><th scope="row">{escape(row)}</th>{"".join(map(_text, texts))}</tr>' for row, *texts in lines
    )


def _text(text: str) -> str:
    return '<td data-value="">-</td>' if text == MISSING else f"<td>{escape(_minus(text))}</td>"


def _curves(comparison: Comparison) -> str:
    found = curves(comparison)
    if not found:
        return ""
    quoted = published_curves()
    figures = "".join(line_chart(each, comparison.baseline) for each in [*found, *quoted])
    notes = "".join(f'<p class="soft">{escape(f"{each.name}: {each.note}")}</p>' for each in quoted)
    tables = "".join(map(_curve_table, [*found, *quoted]))
    reading = f'<p class="soft">{escape(curve.READING)} Whiskers are one deviation.</p>'
    return _section(curve.HEADING, f'{reading}<div class="curves">{figures}</div>{notes}{tables}')


def _curve_table(each: Curve) -> str:
    caption = escape(f"{each.name}: {each.place}")
    heads = _heads([(name,) for name in curve.headers(each)])
    return _table(f"Points of {each.name}", caption, heads, _lines(curve.lines(each)), "costs")


def _metrics(comparison: Comparison) -> str:
    """A fold a column that measured more than its score."""
    folds = []
    for place, column in enumerate(comparison.columns):
        if headers := metrics.headers(comparison, place):
            name = f"{column_name(column)}, {column.dataset} {column.split}"
            caption = " ".join(
                ["Mean and sample deviation over the seeds.", *metrics.sentences(comparison, place)]
            )
            table = _table(
                name, escape(caption), _heads(headers), _lines(metrics.lines(comparison, place)), "costs"
            )
            folds.append(
                f"<details><summary>{escape(name)}: {len(headers) - 1} metrics</summary>{table}</details>"
            )
    return _section(metrics.HEADING, "".join(folds))


def _charts(comparison: Comparison) -> str:
    figures = [
        chart(column, {row: comparison.cells[row][i] for row in comparison.rows}, comparison.baseline)
        for i, column in enumerate(comparison.columns)
        if column.metric
    ]
    legend = f'<p class="soft">Bars are means, dots are seeds, the dashed line is {escape(comparison.baseline)}.</p>'
    return _section("By task", legend + f'<div class="charts">{"".join(figures)}</div>' if figures else "")


def _costs(comparison: Comparison) -> str:
    totals = "".join(map(_total, comparison.totals))
    head = "".join(f'<th scope="col">{name}</th>' for name in ("backbone", "pretraining", "transfer"))
    names = (
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
    )
    heads = "".join(f'<th scope="col"{" class=text" if name == "job" else ""}>{name}</th>' for name in names)
    return _section(
        "Cost",
        _table("Total cost", "All seeds together. - where a record does not say.", head, totals, "costs")
        + _table("Cost of a run", "Mean of a run.", heads, "".join(map(_cost, comparison.costs)), "costs"),
    )


def _total(total: Total) -> str:
    cells = "".join(
        _number(value, duration(value)) for value in (total.seconds_pretrain, total.seconds_transfer)
    )
    return f'<tr><th scope="row">{escape(total.backbone)}</th>{cells}</tr>'


def _cost(cost: Cost) -> str:
    times = "".join(
        _number(value, duration(value))
        for value in (cost.seconds_train, cost.seconds_features, cost.seconds_eval)
    )
    numbers = (cost.images_per_second, cost.params, cost.gmacs, cost.peak_memory_mib)
    return (
        f'<tr><th scope="row">{escape(cost.backbone)}</th><td class="text">{escape(f"{cost.task} {cost.protocol}")}</td>'
        f"{_number(cost.num_runs, str(cost.num_runs))}{times}{''.join(_number(value, count(value)) for value in numbers)}</tr>"
    )


def _number(value: float | None, text: str) -> str:
    return f'<td data-value="{"" if value is None else repr(value)}">{text}</td>'


def _published(rows: list[PublishedRow]) -> str:
    folds = "".join(
        _quoted_task(task, members) for (_, task), members in grouped(rows, lambda row: task_order(row.task))
    )
    titles = sorted({(row.source, row.title, row.url) for row in rows})
    items = (
        f'<li>{escape(name)}: <a href="{escape(url)}">{escape(title)}</a></li>' for name, title, url in titles
    )
    return _section(HEADING, f"{folds}<h3>Sources</h3><ul>{''.join(items)}</ul>" if rows else "")


def _quoted_task(task: str, rows: list[PublishedRow]) -> str:
    names = ("method", "backbone", "protocol", "data", "metric", "value", "source")
    head = "".join(f'<th scope="col"{"" if name == "value" else " class=text"}>{name}</th>' for name in names)
    caption = "Quoted as printed: full-size models on the full data sets."
    table = _table(f"Published, {task}", caption, head, "".join(map(_quoted, rows)), "quoted")
    return f"<details><summary>{escape(task)}: {len(rows)} published numbers</summary>{table}</details>"


def _quoted(row: PublishedRow) -> str:
    texts = (row.backbone, row.protocol, f"{row.dataset} {row.split}", f"{row.metric} ({row.unit})")
    note = f"<small>{escape(row.note)}</small>" if row.note else ""
    return (
        f'<tr><th scope="row">{escape(row.method)}</th>{"".join(f"<td class=text>{escape(text)}</td>" for text in texts)}'
        f'{_number(row.value, f"{row.value}")}<td class="long">{escape(row.source)}, {escape(row.place)}{note}</td></tr>'
    )
