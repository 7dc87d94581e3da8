"""Read a folder of runs: every record, every failure, and the files that could not be read."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path

from mae_bench.record import (
    CELL_FILE,
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
    "code_digest",
    "finished",
)
MAPPINGS = ("config", "cost", "artefacts", "artefact_digests", "backbone_spec", "versions", "hardware")
FAILURE_TEXTS = ("backbone", "task", "protocol", "status", "reason", "fix")
NUMBERS = ("seed", "num_samples")


@dataclass(frozen=True)
class Run:
    """A finished cell and the path of its record."""

    record: ResultRecord
    path: Path


@dataclass(frozen=True)
class Runs:
    """The content of a folder of runs. `problems` has a sentence for every file that was ignored."""

    root: Path
    records: list[Run] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """Return the path relative to the folder of runs."""
        return path.relative_to(self.root).as_posix()


def load_runs(root: str | Path, only: Collection[Path] | None = None) -> Runs:
    """Read every `record.json` and `failure.json` below `root`, in the order of their paths.

    only: the folders to read, by default all. A suite whose config has changed leaves cells of the old
        config behind.

    A file that cannot be read is named in `problems`. RecordError is raised if there is nothing to show.
    """
    runs = Runs(Path(root))
    for path in _list_files(runs.root, RECORD_FILE, only):
        try:
            record = read_record(path)
            _check_types(record, path)
            if record.protocol_version is None:
                record = replace(record, protocol_version=_read_ordered_version(path.with_name(CELL_FILE)))
            runs.records.append(Run(record, path))
        except RecordError as error:
            runs.problems.append(_describe_ignored(runs, error))
    measured = {run.path.parent for run in runs.records}
    for path in _list_files(runs.root, FAILURE_FILE, only):
        _add_failure(runs, path, has_record=path.parent in measured)
    if not runs.records and not runs.failures:
        raise RecordError(
            "; ".join([f"no result under {root}", *runs.problems]),
            expected=f"a folder of runs: one folder per finished cell, with the {RECORD_FILE} of mae-bench",
            fix="create one with mae-bench demo or mae-bench run SUITE",
        )
    return runs


def _read_ordered_version(path: Path) -> int | None:
    """Return the protocol's version in the order that a record of schema 1 answers; None without an order."""
    try:
        version = json.loads(path.read_text(encoding="utf-8"))["kind"]["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, int) else None


def _list_files(root: Path, name: str, only: Collection[Path] | None) -> list[Path]:
    return sorted(path for path in root.rglob(name) if only is None or path.parent in only)


def _add_failure(runs: Runs, path: Path, has_record: bool) -> None:
    if has_record:
        runs.problems.append(f"{runs.name(path)} is ignored: the same folder holds a record, which is used")
        return
    try:
        failure = read_failure(path)
        fields = asdict(failure)
        if not all(isinstance(fields[name], str) for name in FAILURE_TEXTS) or not isinstance(
            failure.seed, int
        ):
            raise RecordError(f"{path}: a field of the failure has the wrong type")
        _check_writable(fields, path)
        runs.failures.append(failure)
    except RecordError as error:
        runs.problems.append(_describe_ignored(runs, error))


def _check_types(record: ResultRecord, path: Path) -> None:
    """Raise RecordError for a field of the wrong type, which an edited JSON file may hold."""
    types: dict[type, tuple[str, ...]] = {str: TEXTS, dict: MAPPINGS, int: NUMBERS, list: ("notes",)}
    wrong = []
    for kind, names in types.items():
        wrong += [name for name in names if not isinstance(getattr(record, name), kind)]
    if not isinstance(record.protocol_version, int | None):
        wrong.append("protocol_version")
    if "cost" not in wrong:
        wrong += [f"cost.{name}" for name, value in record.cost.items() if not isinstance(value, Real)]
    for name, metric in record.metrics.items():
        if metric.direction not in ("higher", "lower"):
            wrong.append(f"metrics.{name}")
    if wrong:
        raise RecordError(f"{path}: fields of the wrong type: {', '.join(wrong)}")
    _check_writable(record.to_dict(), path)


def _check_writable(value: object, path: Path) -> None:
    """Raise RecordError for NaN and lone surrogates, which Python reads from JSON but no report can hold."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise RecordError(f"{path}: a value that cannot be written to a report: {error}") from error


def _describe_ignored(runs: Runs, error: RecordError) -> str:
    """Return why a file is ignored and what to do, without the folder of runs, which the reader knows."""
    fix = f" (next: {error.fix})" if error.fix else ""
    return f"ignored: {error.given}{fix}".replace(f"{runs.root}/", "")
