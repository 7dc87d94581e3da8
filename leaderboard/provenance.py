"""How each score was measured: protocol, data, seed, digests, versions, hardware, command and date."""

import json
from typing import Any

from leaderboard.columns import group_by, task_sort_key
from leaderboard.index import Run, Runs
from leaderboard.sections import Code, Facts, Fold, Results, Section
from leaderboard.wording import format_duration
from mae_bench.record import ResultRecord

TITLE = "Provenance"
TIMES = ("seconds_train", "seconds_features", "seconds_eval")


def build_section(results: Results) -> Section | None:
    """Return one fold per protocol and dataset, with one fold per record inside it."""
    folds = []
    for key, members in group_by(results.runs.records, lambda run: _sort_key(run.record)):
        (_, task), *rest = key
        records = tuple(_build_record(results.runs, run) for run in members)
        folds.append(Fold(" ".join((task, *rest)), records))
    return Section(TITLE, tuple(folds), medium="page") if folds else None


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
        "protocol": f"{record.task} {record.protocol}",
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
        "code": record.git_hash,
        "command": record.command,
        "date": " to ".join(str(time) for time in (record.started, record.finished) if time),
        "notes": "\n".join(map(str, record.notes)),
        "file": runs.name(run.path),
    }


def _join_pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
