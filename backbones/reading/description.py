"""Read the JSON files that describe weights in the same folder."""

import json
from pathlib import Path
from typing import Any

from mae_bench.errors import UserError
from mae_bench.seal import SEAL, check_json_seal

MAX_JSON = 1 << 20  # bytes


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Return the JSON object in a file of at most `limit` bytes; raise UserError for anything else."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise ValueError(f"{size} bytes, more than the limit of {limit}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}", expected="a JSON file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}", expected="a JSON object")
    return value


def check_description(value: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return our own description of an export without its seal; raise UserError if it was changed."""
    fix = f"export the backbone again; if you changed the file on purpose, remove its key {SEAL!r}"
    return check_json_seal(value, path, fix=fix, required=False)


def get_conversion(provenance: Any) -> dict[str, Any]:
    """Return the report of the conversion that wrote a file of ours, from its provenance; {} without one."""
    report = provenance.get("converted") if isinstance(provenance, dict) else None
    return report if isinstance(report, dict) else {}
