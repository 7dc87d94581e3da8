"""Find the licence of weights in the files that describe them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = "README.md"  # of a hub's repository; its metadata stands between two lines of dashes
MAX_CARD = 64 << 10  # bytes that are looked at
MAX_LICENCE = 100  # characters that are kept
FIELD = re.compile(r"^license(_name)?:[ \t]*[\"']?([\w.+ -]+)", re.MULTILINE)


def find_licence(conversion: Mapping[str, Any], folder: Path | None) -> str:
    """Return the licence of weights: from the report of their conversion, or from a card; "" if unknown.

    The licence of a checkpoint travels with its conversions, so that transfers state it too.

    folder: whose card describes the weights.
    """
    if conversion:
        return str(conversion.get("licence") or "")[:MAX_LICENCE]
    if folder is None or not (folder / CARD).is_file():
        return ""
    return parse_card((folder / CARD).read_bytes()[:MAX_CARD].decode(errors="replace"))


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
