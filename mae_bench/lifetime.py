"""End a process together with the one that started it, however that one ends."""

import ctypes
import os
import signal
import sys
import threading
from functools import cache
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel send `number` to this process when the thread that started it ends (Linux only).

    parent: the pid of the process that started this one. If it is gone already, this process ends now.
    """
    prctl = _find_prctl()
    if prctl:
        prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


@cache
def bind_forks() -> None:
    """Let every process that the main thread forks from now on end with this one: loaders, pools.

    Another thread may end before the process does, so what it forks is left alone.
    """
    forking: list[int] = []  # the pid of this process while its main thread forks
    _find_prctl()

    def note_parent() -> None:
        forking[:] = [os.getpid()] if threading.get_native_id() == os.getpid() else []

    def bind() -> None:
        if forking:
            end_with_parent(forking[0])

    os.register_at_fork(before=note_parent, after_in_child=bind)


@cache
def _find_prctl() -> Any:
    return ctypes.CDLL(None).prctl if sys.platform == "linux" else None
