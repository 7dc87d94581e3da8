"""Write files atomically and compute the SHA-256 digests that identify records and cells."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

MAX_NAME_BYTES = 200  # of a name in UTF-8: disks allow 255, and a cell's folder adds to it
FOLDER_NAME = "a name that is valid for a folder: printable, without / or \\, not beginning with a dot"


def is_folder_name(name: str) -> bool:
    """Whether a name is one folder, visible and valid on any disk."""
    plain = name.isprintable() and name == name.strip() and not name.startswith(".")
    return bool(name) and plain and not {"/", "\\"} & {*name} and len(name.encode()) <= MAX_NAME_BYTES


def is_full(error: OSError) -> bool:
    """Whether the disk, or the user's quota, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Call `write(file)` on a temporary file next to `path`, flush it to disk and rename it to `path`.

    A crash or a full disk leaves the previous file at `path`; after an exception no temporary file remains.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # of a write, which does not know its file
            error.filename = str(path)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8, atomically.

    Bytes of a file's name that are not UTF-8, which Python reads as lone surrogates, are escaped; in JSON the
    escapes stand for the same bytes.
    """
    write_atomic(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON value, indented, atomically. Raise ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form: sorted keys, no spaces.

    Raise ValueError for NaN and infinities.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
