"""How each score was measured: protocol, data, seed, digests, versions, hardware, command and date."""

import json
from typing import Any

from leaderboard.columns import group_by, task_sort_key
from leaderboard.index import Run, Runs
from leaderboard.sections import Code, Facts, Fold, Header, Paragraph, Results, Section, Table, TableCell
from leaderboard.wording import MISSING, format_duration, name_code, name_column, name_data
from mae_bench.record import ResultRecord

TITLE = "Provenance"
CODE_TITLE = "Protocol versions and code"
CODE_READING = (
    "A column has scores of one version of its protocol only. The code is named by the first digits of the "
    "digest of its source, or by its commit where the records have no digest."
)
TIMES = ("seconds_train", "seconds_features", "seconds_eval")


def build_section(results: Results) -> Section | None:
    """Return one fold per protocol and dataset, with one fold per record inside it."""
    folds = []
    for key, members in group_by(results.runs.records, lambda run: _sort_key(run.record)):
        (_, task), *rest = key
        records = tuple(_build_record(results.runs, run) for run in members)
        folds.append(Fold(" ".join((task, *rest)), records))
    return Section(TITLE, tuple(folds), medium="page") if folds else None


def build_code_section(results: Results) -> Section | None:
    """Return the protocol's version and the code of each column that has scores."""
    comparison, rows = results.comparison, []
    for i, column in enumerate(comparison.columns):
        code = sorted({name for cells in comparison.cells.values() for name in cells[i].code})
        if code:
            texts = (name_column(column), name_data(column), str(column.protocol_version or MISSING))
            rows.append(tuple(map(TableCell, (*texts, ", ".join(code)))))
    headers = tuple(Header(name, align="left") for name in ("protocol", "data", "version", "code"))
    blocks = (Paragraph(CODE_READING), Table(CODE_TITLE, headers, tuple(rows)))
    return Section(CODE_TITLE, blocks) if rows else None


def _sort_key(record: ResultRecord) -> tuple[Any, ...]:
    return task_sort_key(record.task), record.protocol, record.dataset, record.split


def _build_record(runs: Runs, run: Run) -> Fold:
    record = run.record
    score = f"{record.main_metric} {record.score.value:.6g} {record.score.unit}"
    config = json.dumps(record.config, indent=2, ensure_ascii=False, default=str)
    return Fold(
        f"{record.backbone}, seed {record.seed}: {score}",
        (Facts(_collect_facts(runs, run)), Fold("resolved config", (Code(config),))),
    )


def _collect_facts(runs: Runs, run: Run) -> dict[str, str]:
    record = run.record
    metrics = [f"{name} {metric.value:.6g} {metric.unit}" for name, metric in record.metrics.items()]
    return {
        "protocol": f"{record.task} {record.protocol}, version {record.protocol_version or 'unknown'}",
        "data": f"{record.dataset} {record.split}, {record.num_samples} images",
        "data digest": record.data_digest,
        "seed": str(record.seed),
        "metrics": "\n".join(metrics),
        "backbone digest": record.backbone_digest,
        "licence of the weights": str(record.conversion_report.get("licence") or "unknown"),
        "config digest": record.config_digest,
        "training, features, evaluation": ", ".join(format_duration(record.cost.get(name)) for name in TIMES),
        "hardware": _join_pairs(record.hardware),
        "versions": _join_pairs(record.versions),
        "code": name_code(record),
        "commit": record.git_hash,
        "command": record.command,
        "date": " to ".join(str(time) for time in (record.started, record.finished) if time),
        "notes": "\n".join(map(str, record.notes)),
        "file": runs.name(run.path),
    }


def _join_pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
