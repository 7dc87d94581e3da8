"""One cell of a suite: what it runs, its folder, and its result."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from glob import escape
from pathlib import Path
from typing import Any, TypeVar

from mae_bench.record import CELL_FILE as CELL_FILE
from mae_bench.record import (
    FAILURE_FILE,
    RECORD_FILE,
    Failure,
    RecordError,
    ResultRecord,
    read_failure,
    read_record,
)

LOG_FILE = "log.txt"  # output of the worker
BACKBONE = "backbone"  # the row of cells that make a backbone
FILE_NAMES = {"row": "task", "task": "family"}  # attribute -> its name in cell.json

R = TypeVar("R", ResultRecord, Failure)


@dataclass(frozen=True)
class Cell:
    """A backbone to make or to transfer.

    Attributes:
        backbone: its name in the suite.
        row: the name of its task in the suite, or BACKBONE for a cell that makes a backbone.
        task: the `task` of its record ("pretrain", "imagenet", "coco", ...).
        kind: its job kind, a key of `mae_bench.registry.KINDS`.
        config: the complete, validated config of the job.
        seed: the seed of the job.
        key: the digest of everything that decides the result; `dir` ends with its first 8 digits.
        dir: the folder it writes to.
        upstream: the folder of the cell that makes its backbone; None for a cell that makes one.
    """

    backbone: str
    row: str
    task: str
    kind: str
    config: dict[str, Any]
    seed: int
    key: str
    dir: Path
    upstream: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the cell as written to `cell.json`, where `row` is named "task" and `task` "family"."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        paths = {"dir": str(self.dir), "upstream": str(self.upstream) if self.upstream else None}
        return {FILE_NAMES.get(name, name): value for name, value in (values | paths).items()}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Cell":
        """Read the result of `to_dict`."""
        names = {written: name for name, written in FILE_NAMES.items()}
        values = {names.get(name, name): item for name, item in value.items()}
        values["dir"] = Path(values["dir"])
        values["upstream"] = Path(values["upstream"]) if values["upstream"] else None
        return cls(**values)

    @property
    def name(self) -> str:
        """The name shown to people."""
        return f"{self.backbone} · {self.kind if self.row == BACKBONE else self.row} · seed {self.seed}"

    def find_others(self) -> list[Path]:
        """Return the folders of other cells of this backbone, row and seed, the newest first."""
        pattern = f"{escape(self.row)}-s{self.seed}-*"
        others = [folder for folder in self.dir.parent.glob(pattern) if folder != self.dir]
        return sorted(others, key=lambda folder: folder.stat().st_mtime, reverse=True)

    def result(self) -> ResultRecord | Failure | None:
        """Return the record of a finished cell, the failure of one that was tried, or None.

        A malformed or damaged file counts as missing, as does the record of another backbone than the current
        one: the cell runs again.
        """
        record = _read(read_record, self.dir / RECORD_FILE)
        maker = _read(read_record, self.upstream / RECORD_FILE) if self.upstream else record
        if record and maker and record.backbone_digest == maker.backbone_digest:
            return record
        return _read(read_failure, self.dir / FAILURE_FILE)

    def explain_rerun(self) -> str:
        """Return why the record in the folder does not count; "" if it does or if there is none."""
        path = self.dir / RECORD_FILE
        if not path.is_file():
            return ""
        try:
            record = read_record(path)
        except RecordError as error:
            return error.given
        maker = _read(read_record, self.upstream / RECORD_FILE) if self.upstream else record
        if maker is None:
            return f"{path} counts only if its backbone, which runs again, gets the same weights"
        if record.backbone_digest != maker.backbone_digest:
            return f"{path} is the record of other weights than those of {self.upstream}"
        return ""

    def failure(self, reason: str, fix: str = "", *, not_installed: bool = False) -> Failure:
        """Return the failure to write instead of a record."""
        status: Any = "not installed" if not_installed else "failed"
        protocol = self.config.get("protocol", self.kind)
        fix = self.insert_names(fix)
        return Failure(self.backbone, self.task, protocol, self.seed, status, reason, fix)

    def insert_names(self, fix: str) -> str:
        """Return what to do next with the names of this cell instead of tasks.NAME and backbones.NAME."""
        backbone = f"backbones.{self.backbone}"
        row = backbone if self.row == BACKBONE else f"tasks.{self.row}"
        return fix.replace("tasks.NAME", row).replace("backbones.NAME", backbone)


def _read(read: Callable[[Path], R], path: Path) -> R | None:
    try:
        return read(path)
    except RecordError:
        return None
