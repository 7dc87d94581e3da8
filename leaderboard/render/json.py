"""Render a comparison as JSON, for programs."""

import json
from dataclasses import asdict
from typing import Any

from leaderboard.published import TITLE, select_published
from leaderboard.table import Comparison

SCHEMA_VERSION = 2  # 2: `beside` is `published_comparisons`; docs/records.md describes it


def build_json(comparison: Comparison, title: str) -> dict[str, Any]:
    """Return the fields of the comparison, with the published results of its protocols under `published`."""
    rows = select_published(comparison.columns)
    published = {"note": TITLE, "rows": [asdict(row) for row in rows]}
    return {
        "schema_version": SCHEMA_VERSION,
        "title": title,
        **comparison.to_dict(),
        "published": published,
    }


def render_json(comparison: Comparison, title: str) -> str:
    """Return the comparison as indented JSON text."""
    value = build_json(comparison, title)
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
