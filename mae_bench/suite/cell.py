"""One cell of a suite: what it runs, the folder that it owns, and what has become of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mae_bench.record import (
    FAILURE_FILE,
    RECORD_FILE,
    Failure,
    RecordError,
    ResultRecord,
    read_failure,
    read_record,
)

CELL_FILE = "cell.json"  # what the runner asks of the worker
LOG_FILE = "log.txt"  # what the worker printed
BACKBONE = "backbone"  # stands for the task's name in cells that make a backbone

R = TypeVar("R", ResultRecord, Failure)


@dataclass(frozen=True)
class Cell:
    """A backbone to make (task "backbone", upstream None) or to transfer.

    family: what its record says under `task`. config: complete and validated. key: the digest of all that decides the result;
    `dir` ends with its first digits. upstream: the folder of the cell that makes the backbone.
    """

    backbone: str
    task: str
    family: str
    kind: str
    config: dict[str, Any]
    seed: int
    key: str
    dir: Path
    upstream: Path | None = None

    @property
    def name(self) -> str:
        """As a person reads it."""
        return f"{self.backbone} · {self.kind if self.task == BACKBONE else self.task} · seed {self.seed}"

    def result(self) -> ResultRecord | Failure | None:
        """The record of a finished cell, the failure of one that was tried, None for one that is left to do.

        A broken file counts as none, and so does the record of another backbone than is upstream now: the cell is run again.
        """
        record = _read(read_record, self.dir / RECORD_FILE)
        maker = _read(read_record, self.upstream / RECORD_FILE) if self.upstream else record
        if record and maker and record.backbone_digest == maker.backbone_digest:
            return record
        return _read(read_failure, self.dir / FAILURE_FILE)

    def failure(self, reason: str, fix: str = "", *, not_installed: bool = False) -> Failure:
        """What stands in the place of the record if the cell ends without a score."""
        status: Any = "not installed" if not_installed else "failed"
        protocol = self.config.get("protocol", self.kind)
        return Failure(self.backbone, self.family, protocol, self.seed, status, reason, fix)


def _read(read: Callable[[Path], R], path: Path) -> R | None:
    try:
        return read(path)
    except RecordError:
        return None
