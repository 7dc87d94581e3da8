"""Lock a folder or a file between processes, by a lock file that says who holds it."""

import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from mae_bench.environment.provenance import now
from mae_bench.errors import UserError

log = logging.getLogger(__name__)


@contextmanager
def file_lock(path: Path, say: Callable[[str], object] = log.warning) -> Iterator[None]:
    """Hold an exclusive lock next to `path`; the system releases it when the process ends.

    say: called once with who holds it, if that is another.
    """
    with open(path.with_name(f"{path.name}.lock"), "a+", encoding="utf-8") as file:
        if not _lock_at_once(file):
            say(f"waiting for {holder_of(file)}, which holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
            _sign(file)
        yield


def try_lock(file: TextIO) -> bool:
    """Lock an open lock file (mode "a+"); return False if another process holds it.

    The lock ends when the file is closed or the process ends. Raise UserError if the disk has no locks.
    """
    try:
        return _lock_at_once(file)
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be locked: {error}",
            expected="a file system with file locks (flock)",
            fix="choose a folder on another disk: --out DIR",
        ) from error


def holder_of(file: TextIO) -> str:
    """Return who holds the lock, for example "process 7 on node1 since 2026-11-28T21:00:00+00:00"."""
    file.seek(0)
    return file.read().strip() or "another process"


def _lock_at_once(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    _sign(file)
    return True


def _sign(file: TextIO) -> None:
    """Write this process's name to the lock file."""
    with suppress(OSError):  # on a full disk the lock holds nevertheless
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()} since {now()}".encode())
