"""Turn checkpoints into backbones of a suite: a source, the matches of a pattern, or a YAML list."""

from collections.abc import Iterator, Mapping
from glob import glob, has_magic
from itertools import chain, count
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mae_bench.aliases import check_aliases
from mae_bench.errors import UserError
from mae_bench.files import FOLDER_NAME, is_folder_name

# Names of files and folders that do not identify a checkpoint.
GENERAL = (
    "",
    "export",
    "cells",
    "backbone.safetensors",
    "mae.safetensors",
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "checkpoint.pth",
)
LISTS = (".yaml", ".yml")
PATHS = ("file", "run")  # schemes followed by a path
ROW = "source and, where needed, name, format, weights, sha256, spec"


def rows_of(checkpoints: list[str], options: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Return name -> config of a `checkpoint` job, for sources, patterns and YAML lists in the given order.

    `options` (format, weights) apply to all but the rows of lists. A row without a name is named after
    its file, or after the nearest folder whose name identifies it. Raise UserError for a pattern without a
    match, a malformed list and two rows of one name.
    """
    given = [row for checkpoint in checkpoints for row in _rows(checkpoint, dict(options or {}))]
    named = [row["name"] for row in given if "name" in row]
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise UserError(f"two checkpoints are called {', '.join(twice)}", expected="a name for each")
    rows: dict[str, dict[str, Any]] = {}
    for row in given:
        own = row.pop("name", "")
        rows[own or _free_name(row["source"], {*rows, *named}, len(rows) + 1)] = {"kind": "checkpoint"} | row
    return rows


def _rows(checkpoint: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if not checkpoint.endswith(LISTS):
        yield from ({"source": source} | options for source in _sources(checkpoint))
        return
    for place, row in enumerate(_list_in(Path(checkpoint)), 1):
        described = {"source": row} if isinstance(row, str) else row
        if not isinstance(described, dict) or not isinstance(described.get("source"), str):
            raise UserError(
                f"{checkpoint}: row {place} is {row!r}", expected=f"a source, or a mapping of {ROW}"
            )
        name = described.get("name", "checkpoint")
        if not (isinstance(name, str) and is_folder_name(name)):
            raise UserError(
                f"{checkpoint}: row {place} is called {name!r}",
                expected=FOLDER_NAME,
            )
        sources = _sources(described["source"])
        if len(sources) > 1:
            described.pop("name", None)  # each match of a pattern has its own name
        yield from (described | {"source": source} for source in sources)


def _list_in(path: Path) -> list[Any]:
    try:
        check_aliases(path.read_text(encoding="utf-8"))
        rows = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing", expected=f"a YAML list of checkpoints: {ROW}") from error
    except Exception as error:  # the YAML reader has many error types, all of them errors in the file
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(
            f"{path} holds a {type(rows).__name__} of {len(rows or [])}",
            expected=f"a list of checkpoints: {ROW}",
        )
    return rows


def _sources(given: str) -> list[str]:
    """Return the sorted matches of a pattern; anything else unchanged."""
    scheme, colon, rest = given.partition(":")
    prefix, pattern = (f"{scheme}:", rest) if colon and scheme in PATHS else ("", given)
    if not has_magic(pattern) or Path(pattern).exists():
        return [given]
    if not (found := sorted(glob(pattern, recursive=True))):
        raise UserError(f"--checkpoint {given} matches nothing", expected="at least one file or folder")
    return [prefix + path for path in found]


def _free_name(source: str, taken: set[str], number: int) -> str:
    scheme, colon, rest = source.rpartition(":")
    path = Path(rest)
    parts = [
        part.stem
        for part in (path, *path.parents)
        if part.name not in GENERAL and not part.name.startswith("backbone-s")
    ]
    own = next(iter(parts), "checkpoint")
    if colon and scheme not in PATHS:  # REPO@REVISION, or a name with tags
        own = path.name.partition("@")[0].replace(".", "_")
    numbered = (f"{own}-{n}" for n in count(number))
    return next(name for name in chain([own], numbered) if name not in taken)
