"""ConversionReport: the account of what was done with every key of a checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ConversionReport:
    """Account of a conversion.

    Every source key is renamed, reshaped or dropped with a reason; every target key is filled, or declared
    new with a reason.

    Attributes:
        source: The source as it was given.
        format: Format in which the checkpoint was read.
        digest: SHA-256 of the weight file.
        renamed: Source key -> target key.
        reshaped: Target key -> what was done to the tensor.
        dropped: Source key -> reason.
        new: Target key -> reason.
        files: File name -> SHA-256, for every file that was read.
        notes: What the user should know about these weights.
        assumptions: Spec fields that are assumed, or taken from what the family publishes, with their values
            and the source of the assumption. A file that was converted has those of the checkpoint that
            it was converted from.
        licence: Licence of the weights as their publisher states it; "" if unknown.
    """

    source: str
    format: str
    digest: str
    renamed: dict[str, str] = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)
    licence: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self)


def read_assumptions(conversion: Mapping[str, Any]) -> list[str]:
    """Return the assumptions about a checkpoint from the report of its conversion, as a file holds it."""
    found = conversion.get("assumptions")
    return [str(assumption) for assumption in found] if isinstance(found, list) else []
