"""Reads a folder of runs: every record, every failure, and what could not be read."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path

from mae_bench.record import (
    FAILURE_FILE,
    RECORD_FILE,
    Failure,
    RecordError,
    ResultRecord,
    read_failure,
    read_record,
)

TEXTS = (
    "backbone",
    "task",
    "protocol",
    "dataset",
    "split",
    "main_metric",
    "data_digest",
    "backbone_digest",
    "finished",
)
MAPPINGS = ("config", "cost", "artefacts", "backbone_spec", "versions", "hardware")


@dataclass(frozen=True)
class Run:
    """One finished cell and the record file that says so."""

    record: ResultRecord
    path: Path


@dataclass(frozen=True)
class Runs:
    """All that a folder holds. `problems` are sentences for the reader: nothing is left out without one."""

    root: Path
    records: list[Run] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """The path as the reader of a report sees it: relative to the folder of runs."""
        return path.relative_to(self.root).as_posix()


def load_runs(root: str | Path, only: Collection[Path] | None = None) -> Runs:
    """Reads `record.json` and `failure.json` at any depth below `root`, in the order of their paths.

    only: the folders that count (a suite whose config was changed leaves cells of the old one behind); by default all.
    A file that is broken goes to `problems`; RecordError only when there is nothing at all to show.
    """
    runs = Runs(Path(root))
    for path in _files(runs.root, RECORD_FILE, only):
        try:
            record = read_record(path)
            _check_types(record, path)
            runs.records.append(Run(record, path))
        except RecordError as error:
            runs.problems.append(f"left out: {_relative(runs, error.given)}")
    for path in _files(runs.root, FAILURE_FILE, only):
        _add_failure(runs, path)
    if not runs.records and not runs.failures:
        raise RecordError(
            "; ".join([f"no result under {root}", *runs.problems]),
            expected=f"a folder of runs: one folder a cell, each with the {RECORD_FILE} that mae-bench wrote when it finished",
            fix="mae-bench demo makes one, and so does mae-bench run SUITE",
        )
    return runs


def _files(root: Path, name: str, only: Collection[Path] | None) -> list[Path]:
    return sorted(path for path in root.rglob(name) if only is None or path.parent in only)


def _add_failure(runs: Runs, path: Path) -> None:
    if (path.parent / RECORD_FILE).exists():
        runs.problems.append(
            f"{runs.name(path)} stands beside a record: the record counts, the failure is left out"
        )
        return
    try:
        failure = read_failure(path)
        texts = (
            failure.backbone,
            failure.task,
            failure.protocol,
            failure.status,
            failure.reason,
            failure.fix,
        )
        if not all(isinstance(text, str) for text in texts) or not isinstance(failure.seed, int):
            raise RecordError(f"{path}: a field of the failure has the wrong type")
        _check_writable(asdict(failure), path)
        runs.failures.append(failure)
    except RecordError as error:
        runs.problems.append(f"left out: {_relative(runs, error.given)}")


def _check_types(record: ResultRecord, path: Path) -> None:
    """JSON holds any type in any field; a comparison must not stumble over one that a hand has edited."""
    wrong = [name for name in TEXTS if not isinstance(getattr(record, name), str)]
    wrong += [name for name in MAPPINGS if not isinstance(getattr(record, name), dict)]
    wrong += [name for name in ("seed", "num_samples") if not isinstance(getattr(record, name), int)]
    wrong += ["notes"] if not isinstance(record.notes, list) else []
    wrong += [
        f"cost.{name}"
        for name, value in (record.cost if "cost" not in wrong else {}).items()
        if not isinstance(value, Real)
    ]
    wrong += [
        f"metrics.{name}"
        for name, metric in record.metrics.items()
        if metric.direction not in ("higher", "lower")
    ]
    if wrong:
        raise RecordError(f"{path}: fields of the wrong type: {', '.join(wrong)}")
    _check_writable(record.to_dict(), path)


def _check_writable(value: object, path: Path) -> None:
    """Python reads NaN and lone surrogates from JSON, and no report can hold them."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise RecordError(f"{path}: a value that no report can hold: {error}") from error


def _relative(runs: Runs, message: str) -> str:
    """The message without the folder, which the reader knows."""
    return message.replace(f"{runs.root}/", "")
