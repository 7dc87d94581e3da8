"""Whether a format is written, and may be written to a place: asked before torch is imported and anything is read."""

from pathlib import Path

from backbones.translating.detect import FORMATS, WRITABLE
from mae_bench.errors import UserError, did_you_mean


def check_target(out: Path, to: str) -> None:
    """UserError for a format that is not written, for an `out` that exists, and for a file of another suffix."""
    if to not in WRITABLE:
        known = f"the format {to!r} is only read" if to in FORMATS else f"unknown format {to!r}"
        raise UserError(
            known, expected=f"one that is written: {', '.join(WRITABLE)}", fix=did_you_mean(to, WRITABLE)
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already", fix="remove it or name another")
    if (suffixes := WRITABLE[to]) and out.suffix not in suffixes:
        raise UserError(
            f"the format {to} is one file, and {out} has not its suffix",
            expected=f"a name that ends in {' or '.join(suffixes)}",
        )
