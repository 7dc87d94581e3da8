"""Worker processes: one for a cell, or the ranks that train one model and therefore end together."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from mae_bench.runner.worker import INTERRUPTED, environment
from mae_bench.suite.cell import LOG_FILE

CHILD = "mae_bench.runner.child"
POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0  # for a worker to save its state when asked to stop
FALL_SECONDS = 3.0  # for the other ranks to report when one has failed; they cannot save state without it


class Process(Protocol):
    """The interface of whatever runs a cell."""

    def poll(self) -> int | None:
        """Return the exit code, None while it runs; a negative one is the number of a signal."""

    def ask_to_stop(self) -> None:
        """Ask it to save its state and end."""

    def kill(self) -> None:
        """End whatever is left of it."""


class Worker:
    """A worker process in its own process group; its output goes to log.txt in its folder.

    It receives SIGTERM when the thread that started it ends, so the main thread must start it.
    """

    def __init__(
        self, module: str, folder: Path, threads: int, visible: str | None, rank: dict[str, str] | None = None
    ):
        with open(folder / LOG_FILE, "ab") as log:
            self._process = subprocess.Popen(
                # -P: import nothing from the working folder
                [sys.executable, "-P", "-m", CHILD, str(os.getpid()), module, str(folder)],
                env=environment(threads, visible) | (rank or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Return the exit code, None while it runs; a negative one is the number of a signal."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """Send SIGTERM to the worker only: its loader processes must live until it has saved."""
        self._process.terminate()

    def kill(self) -> None:
        """Kill whatever is left of its process group."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Ranks:
    """The ranks that run one cell together. None continues without the others: if one fails, all end.

    The exit code is that of the rank that failed first; the others' are consequences of it.
    """

    def __init__(self, members: Sequence[Process]):
        self._members = members
        self._code = 0
        self._deadline: float | None = None

    def poll(self) -> int | None:
        """Return the exit code; None while a rank runs that may still do so."""
        codes = [member.poll() for member in self._members]
        if self._deadline is None:
            self._update_deadline(codes)
        if None in codes and (self._deadline is None or time.monotonic() < self._deadline):
            return None
        self.kill()
        return self._code

    def _update_deadline(self, codes: list[int | None]) -> None:
        bad = [code for code in codes if code]
        if bad:
            self._code = min(bad, key=_rank_of_cause)
            if self._code == INTERRUPTED:
                self.ask_to_stop()  # the signal may have reached only this rank
            self._deadline = time.monotonic() + (GRACE_SECONDS if self._code == INTERRUPTED else FALL_SECONDS)
        elif codes[0] == 0:
            self._deadline = (
                time.monotonic() + GRACE_SECONDS
            )  # the record is written; the others only have to exit

    def ask_to_stop(self) -> None:
        """Ask all ranks to stop; they agree on the step after which they save."""
        for member in self._members:
            member.ask_to_stop()

    def kill(self) -> None:
        """End whatever is left of any of them."""
        for member in self._members:
            member.kill()


def _rank_of_cause(code: int) -> int:
    """Rank an exit code as the cause of the others, likeliest first; a rank that loses a peer aborts."""
    if code < 0 and code != -signal.SIGABRT:
        return 0
    return {INTERRUPTED: 2, 1: 3, -signal.SIGABRT: 4}.get(code, 1)


def start_ranks(module: str, folder: Path, threads: int, visible: Sequence[str], size: int) -> Ranks:
    """Start `size` processes on this machine that see the GPUs `visible`; each uses that of its local rank.

    They are children of this process and not of torchrun: a stop reaches them and not their loader processes,
    they notice when this process is gone, and their exit codes are known here.
    """
    address, port = "127.0.0.1", free_port()
    ranks = [rank_variables(rank, size, rank, address, port) for rank in range(size)]
    return Ranks([Worker(module, folder, threads, ",".join(visible), rank) for rank in ranks])


def rank_variables(rank: int, size: int, local_rank: int, address: str, port: int) -> dict[str, str]:
    """Return the variables of torchrun that `mae_bench.engine.distributed.process_group` reads."""
    values = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in values.items()}


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as server:
        server.bind(("", 0))
        port: int = server.getsockname()[1]
        return port


def stop_all(processes: Iterable[Process], stop: list[int]) -> None:
    """Ask all processes to stop; kill those left after GRACE_SECONDS, or at once on a second stop signal."""
    processes, asked = list(processes), len(stop)
    for process in processes:
        process.ask_to_stop()
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and len(stop) == asked:
        codes = [process.poll() for process in processes]  # poll every one: Ranks act on it
        if None not in codes:
            break
        time.sleep(POLL_SECONDS)
    for process in processes:
        process.kill()
