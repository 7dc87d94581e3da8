"""Seal what is read back: a digest of a JSON file or of every file of a folder, checked before it is used."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mae_bench.errors import UserError
from mae_bench.files import json_digest, write_json

MANIFEST_FILE = "manifest.json"
SEAL = "seal"  # key of a sealed JSON object
VERSION = 1
FIX = "restore it from a copy, or remove it to have it written again"


class BrokenSeal(UserError):
    """A file or folder that differs from what was written: damaged, changed by hand or incomplete."""


def seal_json(value: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the digest of its content under the key `seal`."""
    return {**value, SEAL: json_digest(value)}


def check_json_seal(value: Any, path: Path, *, fix: str = FIX, required: bool = True) -> dict[str, Any]:
    """Return a JSON object read from `path` without its seal. Raise BrokenSeal if the seal is not its own.

    required: False accepts an object without a seal, as an earlier version or somebody else wrote it.
    """
    if not required and isinstance(value, dict) and SEAL not in value:
        return value
    if not isinstance(value, dict) or SEAL not in value:
        raise BrokenSeal(f"{path} has no seal", expected=f"the key {SEAL!r}, as written", fix=fix)
    content = {key: item for key, item in value.items() if key != SEAL}
    try:
        found = json_digest(content)
    except ValueError as error:  # a changed digit can make a number infinite
        raise BrokenSeal(f"{path} is damaged: {error}", expected="finite numbers", fix=fix) from error
    if value[SEAL] != found:
        raise BrokenSeal(
            f"the content of {path} has digest {found}", expected=f"{value[SEAL]}, as in its seal", fix=fix
        )
    return content


def read_sealed_json(path: str | Path, *, fix: str = FIX, required: bool = True) -> dict[str, Any]:
    """Read a JSON file that holds the result of `seal_json`, without its seal; see `check_json_seal`.

    Raise BrokenSeal if it differs from what was written, and FileNotFoundError if it is missing.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise BrokenSeal(f"{path} cannot be read: {error}", expected="a sealed JSON file", fix=fix) from error
    return check_json_seal(value, path, fix=fix, required=required)


def seal(folder: str | Path) -> None:
    """Write `manifest.json`: size and SHA-256 of every file below `folder`. Flush all of it to disk."""
    folder = Path(folder)
    paths = _list_files(folder)
    with ThreadPoolExecutor() as pool:
        files = dict(zip(paths, pool.map(_describe_and_sync, paths.values()), strict=True))
    write_json(folder / MANIFEST_FILE, seal_json({"version": VERSION, "files": files}))
    for path in (*folder.rglob("*"), folder):
        if path.is_dir():
            sync_folder(path)


def check_seal(folder: str | Path, *, fix: str = FIX) -> None:
    """Raise BrokenSeal if a file of a sealed folder is missing, additional or changed.

    The error names the file. Sizes are compared first, then every file is read.
    """
    folder = Path(folder)
    try:
        manifest = read_sealed_json(folder / MANIFEST_FILE, fix=fix)
    except FileNotFoundError as error:
        raise BrokenSeal(
            f"{folder} has no {MANIFEST_FILE}: it is incomplete, or an earlier version wrote it",
            expected="a sealed folder",
            fix=fix,
        ) from error
    if manifest.get("version") != VERSION:
        raise BrokenSeal(
            f"{folder / MANIFEST_FILE} has version {manifest.get('version')}",
            expected=f"version {VERSION}",
            fix=fix,
        )
    found, sealed = _list_files(folder), manifest["files"]
    for name in sorted(found.keys() | sealed.keys()):
        _check_presence(folder / name, found.get(name), sealed.get(name), fix)
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(
            lambda name: _check_digest(found[name], sealed[name]["sha256"], fix), sorted(sealed)
        ):
            pass  # the first error is raised here


def _describe_and_sync(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, and flush it to disk."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def _check_presence(path: Path, found: Path | None, entry: dict[str, Any] | None, fix: str) -> None:
    if found is None:
        raise BrokenSeal(f"{path} is missing", expected=f"the files of {MANIFEST_FILE}", fix=fix)
    if entry is None:
        raise BrokenSeal(
            f"{path} is not among the sealed files", expected=f"the files of {MANIFEST_FILE}", fix=fix
        )
    size = found.stat().st_size
    if size != entry["bytes"]:
        raise BrokenSeal(f"{path} has {size} bytes", expected=f"{entry['bytes']} bytes, as written", fix=fix)


def _check_digest(path: Path, expected: str, fix: str) -> None:
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # a bad sector
        raise BrokenSeal(
            f"{path} cannot be read: {error}", expected="the file as written", fix=fix
        ) from error
    if found != expected:
        raise BrokenSeal(f"{path} has SHA-256 {found}", expected=f"{expected}, as written", fix=fix)


def publish(part: Path, folder: Path) -> None:
    """Seal the folder `part` and rename it to `folder`, in place of an earlier one."""
    seal(part)
    if folder.exists():
        shutil.rmtree(folder)
    os.rename(part, folder)
    sync_folder(folder.parent)


@contextmanager
def write_sealed(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder next to `folder` to write to; then seal it and rename it to `folder`.

    After an exception nothing of it remains, and an earlier `folder` is untouched.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        publish(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


class States:
    """The last `keep` training states of a job: sealed folders `folder/step-XXXXXXXX`.

    note: called with a message when a damaged state is skipped.
    """

    def __init__(self, folder: Path, keep: int, note: Callable[[str], None]):
        self.folder, self.keep, self.note = folder, keep, note
        self._skipped: dict[Path, str] = {}

    def path(self, step: int) -> Path:
        """Return the folder of the state after `step` steps."""
        return self.folder / f"step-{step:08d}"

    @contextmanager
    def write(self, step: int) -> Iterator[Path]:
        """Yield an empty folder for the state after `step` steps; then seal it and remove old states.

        After an exception nothing of it remains, and earlier states are untouched.
        """
        with write_sealed(self.path(step)) as part:
            yield part
        self.prune(step)

    def prune(self, step: int) -> None:
        """Keep the state of `step` and the newest intact ones before it, `keep` in all; remove the others."""
        before = [path for path in self._list() if path not in self._skipped and path < self.path(step)]
        kept = [*before, self.path(step)][-self.keep :]
        for path in self.folder.iterdir():
            if path.is_dir() and path not in kept:
                shutil.rmtree(path)
        self._skipped.clear()

    def find_intact(self) -> Iterator[Path]:
        """Yield the intact states, the newest first, and note each damaged one that is skipped.

        The caller stops at the first that it can use. Raise BrokenSeal if there are states but none is left.
        """
        for path in reversed(self._list()):
            try:
                check_seal(path)
            except BrokenSeal as error:
                self.skip(path, error.given)
            else:
                yield path
        if self._skipped:
            raise BrokenSeal(
                f"no training state in {self.folder} can be read: {list(self._skipped.values())[-1]}",
                expected="the training states of this job",
                fix=f"restore one from a copy, or remove {self.folder} to start this job from the beginning",
            )

    def skip(self, state: Path, reason: str) -> None:
        """Note that a state cannot be used; the next state that is written replaces it."""
        self._skipped[state] = reason
        self.note(f"{state} cannot be read ({reason}); trying the previous state")

    def _list(self) -> list[Path]:
        """Return the states, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())


def sync_folder(folder: Path) -> None:
    """Flush a folder, without which a new name in it may be lost."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _list_files(folder: Path) -> dict[str, Path]:
    """Return the files below a folder, but for its manifest, by their path relative to it."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {name: path for name, path in paths.items() if name != MANIFEST_FILE and path.is_file()}
