"""ResultRecord, everything known about one finished cell, in one JSON file (standard library only)."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mae_bench.errors import UserError
from mae_bench.files import json_digest, write_json

SCHEMA_VERSION = 2  # 2: protocol_version, code_digest, artefact_digests and digest
SCHEMA_VERSIONS = (1, SCHEMA_VERSION)  # that are read
CELL_FILE = "cell.json"  # the order of the runner to the worker; the other two are its answer
RECORD_FILE = "record.json"
FAILURE_FILE = "failure.json"
NO_BACKBONE = "its backbone could not be made"  # the reason of a transfer whose backbone failed

# Names of the config fields marked NotIdentity (see `mae_bench.config`): they may differ between comparable
# records. Listed here as well because records of any version are compared without their config classes; a
# test holds the two together.
NOT_IDENTITY = frozenset(
    {
        "data",
        "num_workers",
        "nearest_to",
        "max_bad_images",
        "overlap",
        "checkpoint_seconds",
        "checkpoint_period",
        "keep_checkpoints",
        "keep_weights",
        "num_reconstructions",
        "reconstruct_epochs",
        "device_batch_size",
        "parallel",
        "compile",
        "deterministic",
        "activation_checkpointing",
        "crop_on",
        "trackers",
    }
)


ROUNDING = 1e-6  # by which a mean of percentages may miss 0 and 100


class RecordError(UserError):
    """A record that cannot be read or is inconsistent."""


@dataclass(frozen=True)
class Metric:
    """One measured number.

    Attributes:
        unit: "%" for accuracies, AP and IoU, "nats" for losses, "s", "img/s", ...
        direction: which way is better. A percentage of which more is better is at most 100.
    """

    value: float
    unit: str = "%"
    direction: Literal["higher", "lower"] = "higher"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a job measured. Every field is also a field of the ResultRecord.

    A score that was not measured is missing from `metrics`, never 0 or NaN.

    Attributes:
        task: "pretrain", "imagenet", "coco" or "ade20k".
        dataset, split, num_samples: what was measured on.
        metrics: each metric by name.
        main_metric: the name of the metric that the protocol is judged by.
        data_digest: SHA-256 of the data set.
        backbone_spec: `BackboneSpec.to_dict()`.
        backbone_digest: SHA-256 of the weights of the backbone.
        conversion_report: what was done to the keys of a checkpoint.
        cost: seconds_train, seconds_eval, images_per_second, gmacs, params, peak_memory_mib, ...
        notes: remarks for the reader of the score.
        artefacts: name -> path of a file, relative to the folder of the record.
    """

    task: str
    dataset: str
    split: str
    num_samples: int
    metrics: dict[str, Metric]
    main_metric: str
    data_digest: str
    backbone_spec: dict[str, Any]
    backbone_digest: str
    conversion_report: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    artefacts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ResultRecord(Outcome):
    """One cell: the Outcome of a backbone under one protocol, and how it was computed.

    Times are ISO 8601 in UTC, durations are in seconds, digests are SHA-256.

    Attributes:
        backbone: the name of the backbone in its suite.
        protocol: "finetune-100ep", "maskrcnn-li2021-100ep", ...; only records of the same protocol are
            compared.
        protocol_version: the version of the protocol's code, `Kind.version`; None in records of schema 1.
            Only records of the same version are compared.
        seed: the seed of the job.
        config, config_digest: the complete config, and the digest of the part that identifies the result.
        code_digest: the digest of the source (see `mae_bench.environment.code`); "" in records of schema 1.
        artefact_digests: SHA-256 and number of bytes of each file of `artefacts`, by its name; a file of a
            folder by NAME/PATH.
        versions, git_hash, hardware, command: what the result was computed with.
        started, finished: when.
        schema_version: the version of this layout. The file also has `digest`, that of all other fields.
    """

    backbone: str
    protocol: str
    seed: int
    config: dict[str, Any]
    config_digest: str
    protocol_version: int | None = None
    code_digest: str = ""
    artefact_digests: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git_hash: str = ""
    hardware: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    started: str = ""
    finished: str = ""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.main_metric not in self.metrics:
            raise RecordError(
                f"main metric {self.main_metric!r} is not among the record's metrics {sorted(self.metrics)}",
                expected="a value for the metric that the protocol is judged by",
            )
        if bad := sorted(name for name, metric in self.metrics.items() if not math.isfinite(metric.value)):
            raise RecordError(
                f"metrics that are not finite: {bad}", expected="no metric where nothing was measured"
            )
        if bad := sorted(name for name, metric in self.metrics.items() if not _is_possible(metric)):
            raise RecordError(
                f"impossible percentages: {', '.join(f'{name} {self.metrics[name].value}' for name in bad)}",
                expected="0 to 100; at least 0 where less is better",
            )
        if self.num_samples < 1:
            raise RecordError(
                f"num_samples is {self.num_samples}", expected="at least one sample behind a score"
            )

    @property
    def score(self) -> Metric:
        """The main metric."""
        return self.metrics[self.main_metric]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "ResultRecord":
        """Read the result of `to_dict`.

        Raise RecordError for an unknown schema version and for unknown, missing or malformed fields.
        """
        if (version := value.get("schema_version")) not in SCHEMA_VERSIONS:
            raise RecordError(
                f"record of schema version {version!r}",
                expected=f"version {' or '.join(map(str, SCHEMA_VERSIONS))}",
                fix="read it with the mae_bench version that wrote it",
            )
        if unknown := sorted(set(value) - {f.name for f in fields(cls)}):
            raise RecordError(f"unknown fields in a record: {unknown}")
        try:
            metrics = {name: Metric(**metric) for name, metric in value["metrics"].items()}
            return cls(**{**value, "metrics": metrics})
        except (KeyError, TypeError, AttributeError) as error:
            raise RecordError(
                f"a malformed record: {error}", expected="the fields of mae_bench.record.ResultRecord"
            ) from error


def _is_possible(metric: Metric) -> bool:
    """Whether a percentage is one, but for rounding; the mCE and margins may exceed 100."""
    largest = 100 if metric.direction == "higher" else math.inf
    return metric.unit != "%" or -ROUNDING <= metric.value <= largest + ROUNDING


@dataclass(frozen=True)
class Failure:
    """A cell without a score: written instead of its record, with the reason."""

    backbone: str
    task: str
    protocol: str
    seed: int
    status: Literal["failed", "not installed"]
    reason: str
    fix: str = ""
    schema_version: int = SCHEMA_VERSION


def write_failure(failure: Failure, path: str | Path) -> None:
    """Write a failure atomically, with its digest."""
    _write(path, asdict(failure))


def read_failure(path: str | Path) -> Failure:
    """Read a failure. Raise RecordError with the path and the problem if it is malformed or was changed."""
    value = _read(path)
    try:
        return Failure(**value)
    except TypeError as error:
        raise RecordError(f"{path} cannot be read as a failure: {error}") from error


def write_record(record: ResultRecord, path: str | Path) -> None:
    """Write a record atomically, with its digest: a record file that exists is complete."""
    _write(path, record.to_dict())


def read_record(path: str | Path) -> ResultRecord:
    """Read a record. Raise RecordError with the path and the problem if it is malformed or was changed."""
    value = _read(path)
    try:
        return ResultRecord.from_dict(value)
    except RecordError as error:
        raise RecordError(f"{path}: {error.given}", expected=error.expected, fix=error.fix) from error


def _write(path: str | Path, value: dict[str, Any]) -> None:
    value = json.loads(json.dumps(value | {"schema_version": SCHEMA_VERSION}))
    write_json(path, value | {"digest": json_digest(value)})


def _read(path: str | Path) -> dict[str, Any]:
    """Return the fields of a file that `_write` wrote, or of one of schema 1, which has no digest."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(
            f"{path} cannot be read: {error}", expected="a JSON file that mae-bench wrote"
        ) from error
    if not isinstance(value, dict):
        raise RecordError(f"{path} holds a {type(value).__name__}", expected="a JSON object")
    digest = value.pop("digest", None)
    has_digest = digest is not None or value.get("schema_version") == SCHEMA_VERSION
    if has_digest and digest != _compute_digest(value):
        raise RecordError(
            f"{path} was edited or damaged after it was written",
            expected="a file whose digest is that of its content",
            fix="re-run the cell or restore the file",
        )
    return value


def _compute_digest(value: dict[str, Any]) -> str:
    """Return the digest of the fields; "" for values that `_write` cannot have written, such as NaN."""
    try:
        return json_digest(value)
    except ValueError:
        return ""
