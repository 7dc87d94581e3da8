"""Check the target of a conversion before torch is imported and any file is read."""

from pathlib import Path

from backbones.translating.detect import FORMATS, WRITABLE
from mae_bench.errors import UserError, did_you_mean


def check_target(out: Path, to: str) -> None:
    """Raise UserError if the format cannot be written, or `out` exists or has another suffix."""
    if to not in WRITABLE:
        given = f"the format {to!r} can only be read" if to in FORMATS else f"unknown format {to!r}"
        raise UserError(
            given,
            expected=f"a format that can be written: {', '.join(WRITABLE)}",
            fix=did_you_mean(to, WRITABLE),
        )
    is_empty_folder = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_empty_folder:
        raise UserError(f"{out} already exists", fix="remove it or choose another name")
    suffixes = WRITABLE[to]
    if suffixes and out.suffix not in suffixes:
        raise UserError(
            f"{out} does not have the suffix of the format {to}, which is one file",
            expected=f"a name that ends in {' or '.join(suffixes)}",
        )
