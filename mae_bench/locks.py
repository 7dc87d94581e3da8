"""Lock a folder between processes by a file in it that says who holds it."""

import fcntl
import os
import socket
from contextlib import suppress
from typing import TextIO

from mae_bench.environment.provenance import now
from mae_bench.errors import UserError


def try_lock(file: TextIO) -> bool:
    """Lock an open file (mode "a+") and write this process's name to it; return False if another holds it.

    The system releases the lock when the file is closed or the process ends. Raise UserError if the file
    system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be locked: {error}",
            expected="a file system with file locks (flock)",
            fix="choose a folder on another disk: --out DIR",
        ) from error
    with suppress(OSError):  # on a full disk the lock holds nevertheless
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now()}")
        file.flush()
    return True


def holder_of(file: TextIO) -> str:
    """Return who holds the lock, for example "process 7 on node1 since 2026-11-28T21:00:00+00:00"."""
    file.seek(0)
    return file.read().strip() or "another process"
