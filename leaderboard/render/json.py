"""The comparison as JSON, for programs."""

import json
from dataclasses import asdict
from typing import Any

from leaderboard.published import HEADING, PublishedRow
from leaderboard.table import Comparison

SCHEMA_VERSION = 1


def json_value(comparison: Comparison, published: list[PublishedRow], title: str) -> dict[str, Any]:
    """`Comparison` field by field, the published numbers apart from it."""
    quoted = {"note": HEADING, "rows": [asdict(row) for row in published]}
    return {"schema_version": SCHEMA_VERSION, "title": title, **comparison.to_dict(), "published": quoted}


def render_json(comparison: Comparison, published: list[PublishedRow], title: str) -> str:
    return (
        json.dumps(json_value(comparison, published, title), indent=2, ensure_ascii=False, allow_nan=False)
        + "\n"
    )
