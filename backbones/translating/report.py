"""ConversionReport: what became of every key of a checkpoint, strictly."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ConversionReport:
    """Every source key is renamed, reshaped or dropped with a reason; every target key is filled or declared new with one."""

    source: str
    format: str
    digest: str  # SHA-256 of the weight file
    renamed: dict[str, str] = field(default_factory=dict)  # source key -> target key
    reshaped: dict[str, str] = field(default_factory=dict)  # target key -> what was done to it
    dropped: dict[str, str] = field(default_factory=dict)  # source key -> reason
    new: dict[str, str] = field(default_factory=dict)  # target key -> reason
    files: dict[str, str] = field(default_factory=dict)  # SHA-256 of every file that was read, by name
    notes: list[str] = field(
        default_factory=list
    )  # what was assumed, and what a reader should know of these weights

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
