"""Download weights that their authors publish, by name; official.yaml lists addresses and checksums."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mae_bench.data.sets.fetch import fetch
from mae_bench.errors import UserError, did_you_mean

TORCH_FILES = (b"PK\x03\x04", b"\x80")  # a zip archive; a pickle, from before


@dataclass(frozen=True)
class Official:
    """One published weight file.

    format: a name in `backbones.translating.detect.FORMATS`. source: where the address is published. weights:
    which set of weights in the file. checksum: "md5:" or "sha256:" and at least the first digits; "" if none
    is published. licence: of the weights, "" if unknown. score: published for this file. head: what a file
    without a backbone is, "" for any other. gated: the page on which the authors grant access to a file that
    is not public, "" for a public one.
    """

    url: str
    format: str
    source: str
    weights: str | None = None
    checksum: str = ""
    licence: str = ""
    score: str = ""
    head: str = ""
    gated: str = ""


@cache
def load_table() -> dict[str, Official]:
    """Return every published weight file by name."""
    text = files("backbones.reading").joinpath("official.yaml").read_text("utf-8")
    groups: Any = OmegaConf.to_container(OmegaConf.create(text))
    table = {}
    for group in groups:
        for name, entry in group["files"].items():
            table[name] = Official(
                url=f"{group['base']}/{entry['path']}",
                format=group["format"],
                source=group["source"],
                weights=group.get("weights"),
                checksum=entry.get("checksum", ""),
                licence=group.get("licence", ""),
                score=entry.get("score", ""),
                head=entry.get("head", ""),
                gated=group.get("gated", ""),
            )
    return table


def find_name(url: str) -> str | None:
    """Return the name of the weights published at an address, None if there is none."""
    return next((name for name, entry in load_table().items() if entry.url == url), None)


def fetch_official(name: str) -> tuple[Path, Official]:
    """Return the cached file of official:NAME, downloaded once.

    Raises UserError for an unknown name, a head, a gated file, a failed download, and a file without the
    published checksum.
    """
    table = load_table()
    if name not in table:
        raise UserError(
            f"no official weights {name!r}",
            expected=f"one of {', '.join(name for name in table if not table[name].head)}",
            fix=did_you_mean(name, table) or "weights on a hub are hf:REPO@REVISION or timm:NAME",
        )
    entry = table[name]
    if entry.head:
        raise UserError(
            f"official:{name} is {entry.head.partition(' for ')[0]}, without a backbone",
            expected="weights of a vision transformer",
            fix=f"give {entry.head.partition(' for ')[2]}, the backbone it was trained on",
        )
    if entry.gated:
        raise UserError(
            f"official:{name} is gated: its authors send the address on request",
            expected=f"{entry.url.rpartition('/')[2]}, downloaded by hand",
            fix=f"ask for it on {entry.gated} and give the path of the file with --format {entry.format}",
        )
    path = _fetch(entry)
    try:
        _check_content(path, entry)
    except UserError:
        path.unlink(missing_ok=True)  # the next call downloads it again
        raise
    return path, entry


def _fetch(entry: Official) -> Path:
    try:
        return fetch(entry.url, lambda path: _check_content(path, entry))
    except UserError as error:
        options = f"--format {entry.format}" + (f" --weights {entry.weights}" if entry.weights else "")
        elsewhere = f"download it on another machine and give its path with {options}"
        fix = f"{error.fix}; or {elsewhere}" if error.fix else elsewhere
        raise UserError(error.given, expected=error.expected, fix=fix) from error


def _check_content(path: Path, entry: Official) -> None:
    """Raise UserError for a file that torch.save did not write, or without the published checksum."""
    kind, _, published = entry.checksum.partition(":")
    with path.open("rb") as file:
        start = file.read(16)
        file.seek(0)
        found = hashlib.file_digest(file, kind).hexdigest() if published else ""
    if not start.startswith(TORCH_FILES):
        raise UserError(f"{path} begins with {start!r}", expected="a file that torch.save wrote")
    if not found.startswith(published):
        raise UserError(
            f"{path} has {kind} {found}",
            expected=f"{published}, as published in {entry.source}",
            fix="re-run the same command to download it again",
        )
