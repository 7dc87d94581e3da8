"""Weights that their authors publish themselves, by name: the addresses and checksums stand in official.yaml."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mae_bench.data.sets.fetch import fetch
from mae_bench.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Official:
    """format: of `backbones.translating.detect`. weights: which set of the file. checksum: "md5:" or "sha256:" and at least its beginning;
    "" where none is published. source: who says so."""

    url: str
    format: str
    source: str
    weights: str | None = None
    checksum: str = ""


@cache
def load_table() -> dict[str, Official]:
    """Name -> what is published."""
    groups: Any = OmegaConf.to_container(
        OmegaConf.create(files("backbones.reading").joinpath("official.yaml").read_text("utf-8"))
    )
    return {
        name: Official(
            f"{group['base']}/{entry['path']}",
            group["format"],
            group["source"],
            group.get("weights"),
            entry.get("checksum", ""),
        )
        for group in groups
        for name, entry in group["files"].items()
    }


def find_name(url: str) -> str | None:
    """The name of the weights that are published at that address; None where none are known."""
    return next((name for name, entry in load_table().items() if entry.url == url), None)


def _fetched(entry: Official) -> Path:
    try:
        return fetch(entry.url)
    except UserError as error:
        options = f"--format {entry.format}" + (f" --weights {entry.weights}" if entry.weights else "")
        elsewhere = f"fetch it on another machine and give its path with {options}"
        raise UserError(
            error.given, expected=error.expected, fix="; or ".join(filter(None, [error.fix, elsewhere]))
        ) from error


def fetch_official(name: str) -> tuple[Path, Official]:
    """The file behind official:NAME, brought into the cache once. UserError for an unknown name, a file that cannot be brought,
    and one that does not have the published checksum."""
    if name not in load_table():
        raise UserError(
            f"no official weights {name!r}",
            expected=f"one of {', '.join(load_table())}",
            fix=did_you_mean(name, load_table()) or "weights on a hub are hf:REPO@REVISION or timm:NAME",
        )
    entry = load_table()[name]
    path = _fetched(entry)
    kind, _, published = entry.checksum.partition(":")
    if published:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, kind).hexdigest()
        if not found.startswith(published):
            raise UserError(
                f"{path} from {entry.url} has {kind} {found}",
                expected=f"{published}, as its authors publish ({entry.source})",
                fix="remove the file to fetch it again",
            )
    return path, entry
