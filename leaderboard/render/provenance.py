"""How each score was measured, as folded HTML: protocol, data, seed, digests, versions, hardware, command, date."""

import json
from html import escape
from typing import Any

from leaderboard.columns import grouped, task_order
from leaderboard.index import Run, Runs
from leaderboard.wording import duration
from mae_bench.record import ResultRecord


def provenance(runs: Runs) -> str:
    """One fold a protocol and data set, one inside it a record."""
    groups = grouped(runs.records, lambda run: _place(run.record))
    return "".join(
        _fold(" ".join((key[0][1], *key[1:])), "".join(_record(runs, run) for run in members))
        for key, members in groups
    )


def _place(record: ResultRecord) -> tuple[Any, ...]:
    return task_order(record.task), record.protocol, record.dataset, record.split


def _record(runs: Runs, run: Run) -> str:
    record = run.record
    metrics = "\n".join(f"{name} {metric.value:.6g} {metric.unit}" for name, metric in record.metrics.items())
    facts = {
        "protocol": f"{record.task} {record.protocol}",
        "data": f"{record.dataset} {record.split}, {record.num_samples} images",
        "data digest": record.data_digest,
        "seed": record.seed,
        "metrics": metrics,
        "backbone digest": record.backbone_digest,
        "config digest": record.config_digest,
        "training, features, evaluation": _times(record),
        "hardware": _pairs(record.hardware),
        "versions": _pairs(record.versions),
        "code": record.git_hash,
        "command": record.command,
        "date": " to ".join(str(time) for time in (record.started, record.finished) if time),
        "notes": "\n".join(map(str, record.notes)),
        "file": runs.name(run.path),
    }
    shown = "".join(
        f"<dt>{escape(name)}</dt><dd>{_lines(str(value))}</dd>"
        for name, value in facts.items()
        if value != ""
    )
    config = escape(json.dumps(record.config, indent=2, ensure_ascii=False, default=str))
    summary = f"{record.backbone}, seed {record.seed}: {record.main_metric} {record.score.value:.6g} {record.score.unit}"
    return _fold(
        summary, f"<dl>{shown}</dl>" + _fold("resolved config", f"<pre>{config}</pre>", escaped=True)
    )


def _lines(text: str) -> str:
    return "<br>".join(map(escape, text.splitlines()))


def _times(record: ResultRecord) -> str:
    return ", ".join(
        duration(record.cost.get(name)) for name in ("seconds_train", "seconds_features", "seconds_eval")
    )


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _fold(summary: str, content: str, escaped: bool = False) -> str:
    return f"<details><summary>{summary if escaped else escape(summary)}</summary>{content}</details>"
