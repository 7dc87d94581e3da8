"""Find the licence of weights in the files that describe them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_bench.export import SPEC_FILE

CARD = "README.md"  # of a hub's repository; its metadata stands between two lines of dashes
MAX_CARD = 64 << 10  # bytes that are looked at
MAX_LICENCE = 100  # characters that are kept
FIELD = re.compile(r"^license(_name)?:[ \t]*[\"']?([\w.+ -]+)", re.MULTILINE)


def find_licence(folder: Path, beside: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the licence of a folder's weights: from our own export, or from the card; "" if unknown.

    The licence of a checkpoint travels with its export, so that transfers state it too.
    """
    provenance = beside.get(SPEC_FILE, {}).get("provenance")
    converted = provenance.get("converted") if isinstance(provenance, dict) else None
    if isinstance(converted, dict):
        return str(converted.get("licence") or "")[:MAX_LICENCE]
    card = folder / CARD
    return parse_card(card.read_bytes()[:MAX_CARD].decode(errors="replace")) if card.is_file() else ""


def parse_card(text: str) -> str:
    """Return the licence that a card's metadata state: an identifier, or the name of another licence."""
    parts = text.removeprefix("\ufeff").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return ""
    stated: dict[str, str] = {
        suffix: value.strip()[:MAX_LICENCE] for suffix, value in FIELD.findall(parts[1])
    }
    other = stated.get("_name", "")
    return other if stated.get("", "other") == "other" and other else stated.get("", "")
