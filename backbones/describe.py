"""Describe the checkpoint of a suite's row before the suite runs: its spec, and what is assumed about it.

Imports no framework for an export of ours, nor for a checkpoint that was described before.
"""

from pathlib import Path
from typing import Any

from backbones.config import CheckpointConfig
from backbones.reading.description import check_description, get_conversion, read_json
from backbones.translating.report import read_assumptions
from mae_bench.data.sets.cache import load_or_compute
from mae_bench.errors import UserError
from mae_bench.files import json_digest
from mae_bench.job import EXPORT, SPEC_FILE
from mae_bench.spec import BackboneSpec
from mae_bench.suite.config import source_path

CACHE = "specs"  # subfolder of the cache
PACKAGE = Path(__file__).parent

Description = tuple[BackboneSpec | None, list[str]]


def describe(config: CheckpointConfig) -> Description:
    """Return the spec of a checkpoint on this machine's disk and the assumptions about it.

    The spec of weights on a hub is None. Raise UserError where `load_backbone` does. The description is
    cached by the names, sizes and times of the checkpoint's files, and of this package's.
    """
    path = source_path(config.source)
    if path is None or not path.exists():
        return None, []
    if (path / EXPORT).is_dir():
        path = path / EXPORT
    if (path / SPEC_FILE).is_file() and not (config.format or config.weights or config.sha256 or config.spec):
        return _parse(check_description(read_json(path / SPEC_FILE), path / SPEC_FILE))
    options = [config.format, config.weights, config.sha256, config.spec]
    key = json_digest([str(path.resolve()), _identify(_list_files(path)), options, _identify(_list_code())])
    return load_or_compute(CACHE, key, lambda: _read(config), _parse_entry)


def _parse_entry(value: dict[str, Any]) -> Description:
    return BackboneSpec.from_dict(value["spec"]), value["assumptions"]


def _parse(export: dict[str, Any]) -> Description:
    try:
        assumptions = read_assumptions(get_conversion(export.get("provenance")))
        return BackboneSpec.from_dict(export["spec"]), assumptions
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"a malformed {SPEC_FILE}: {error!r}", expected="an export of mae-bench") from error


def _read(config: CheckpointConfig) -> dict[str, Any]:
    from backbones.load import read_backbone

    _, _, spec, report = read_backbone(
        config.source,
        format=config.format,
        weights=config.weights,
        sha256=config.sha256,
        overrides=config.spec,
    )
    return {"spec": spec.to_dict(), "assumptions": report.assumptions}


def _list_files(path: Path) -> list[Path]:
    """Return the files that a checkpoint may be read from: a folder's, or a file and its neighbours."""
    return list(path.iterdir()) if path.is_dir() else [path, *path.parent.glob("*.json")]


def _list_code() -> list[Path]:
    spec = PACKAGE.parent / "mae_bench" / "spec.py"
    return [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.yaml"), spec]


def _identify(files: list[Path]) -> list[list[str | int]]:
    """Return name, size and time of each file; an entry that is no file counts by its name."""
    identity: list[list[str | int]] = []
    for file in sorted(files):
        status = file.stat() if file.is_file() else None
        identity.append([str(file), *((status.st_size, status.st_mtime_ns) if status else ())])
    return identity
