"""Reads the JSON files that describe weights and lie beside them."""

import json
from pathlib import Path
from typing import Any

from mae_bench.errors import UserError

MAX_JSON = 1 << 20  # bytes


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """The object in a file of at most `limit` bytes; UserError for anything else."""
    try:
        if path.stat().st_size > limit:
            raise ValueError(f"{path.stat().st_size} bytes are too many for a description")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}", expected="a JSON file") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}", expected="a JSON object")
    return value
