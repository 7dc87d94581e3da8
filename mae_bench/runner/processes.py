"""Worker processes: one for a cell, or the ranks that train one model together and so end together."""

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

POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0  # that a worker has to save its state when it is asked to stop
FALL_SECONDS = 3.0  # that the other ranks have to say what they know when one has failed: they can save nothing without it


class Process(Protocol):
    """What the runner asks of whatever runs a cell."""

    def poll(self) -> int | None:
        """The exit code, None while it runs; a negative one is a signal's number."""

    def ask_to_stop(self) -> None:
        """Asks it to save its state and end."""

    def kill(self) -> None:
        """Ends whatever is left of it."""


class Worker:
    """A worker process in a process group of its own; all that it prints goes to log.txt in its folder."""

    def __init__(
        self, module: str, folder: Path, threads: int, visible: str | None, rank: dict[str, str] | None = None
    ):
        with open(folder / LOG_FILE, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(folder)],  # -P: a folder `tasks` where the user stands is not ours
                env=environment(threads, visible) | (rank or {}),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def poll(self) -> int | None:
        """The exit code, None while it runs; a negative one is a signal's number."""
        return self._process.poll()

    def ask_to_stop(self) -> None:
        """To the worker alone: its loader processes must live until it has saved."""
        self._process.terminate()

    def kill(self) -> None:
        """Ends whatever is left of its process group."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Ranks:
    """The processes that run one cell together. None goes on without the others: once one ends badly, so do all.

    Its exit code is that of the rank that ended badly first; the others' follow from it.
    """

    def __init__(self, members: Sequence[Process]):
        self._members = members
        self._code = 0
        self._deadline: float | None = None

    def poll(self) -> int | None:
        """As of one process; while a rank runs that has still a right to, None."""
        codes = [member.poll() for member in self._members]
        if self._deadline is None:
            self._look_for_the_end(codes)
        if None in codes and (self._deadline is None or time.monotonic() < self._deadline):
            return None
        self.kill()
        return self._code

    def _look_for_the_end(self, codes: list[int | None]) -> None:
        if bad := [code for code in codes if code]:
            self._code = min(bad, key=_rank_of_cause)
            if self._code == INTERRUPTED:
                self.ask_to_stop()  # the signal may have reached this one alone
            self._deadline = time.monotonic() + (GRACE_SECONDS if self._code == INTERRUPTED else FALL_SECONDS)
        elif codes[0] == 0:
            self._deadline = (
                time.monotonic() + GRACE_SECONDS
            )  # the record is written: nothing is left to do for the others

    def ask_to_stop(self) -> None:
        """All of them: they agree on the step after which they save."""
        for member in self._members:
            member.ask_to_stop()

    def kill(self) -> None:
        """Ends whatever is left of any of them."""
        for member in self._members:
            member.kill()


def _rank_of_cause(code: int) -> int:
    """The smaller, the likelier that the other ranks' ends follow from this one; abort() is how they react to a lost peer."""
    if code < 0 and code != -signal.SIGABRT:
        return 0
    return {INTERRUPTED: 2, 1: 3, -signal.SIGABRT: 4}.get(code, 1)


def start_ranks(module: str, folder: Path, threads: int, visible: Sequence[str], size: int) -> Ranks:
    """`size` processes on this machine that see the GPUs `visible`; each takes the one of its local rank.

    They are children of this process and not of a torchrun: so a stop reaches them and not their loaders, they notice when this
    process is gone, and their exit codes arrive.
    """
    address, port = "127.0.0.1", free_port()
    ranks = [rank_variables(rank, size, rank, address, port) for rank in range(size)]
    return Ranks([Worker(module, folder, threads, ",".join(visible), rank) for rank in ranks])


def rank_variables(rank: int, size: int, local_rank: int, address: str, port: int) -> dict[str, str]:
    """The variables of torchrun that `mae_bench.engine.distributed.process_group` reads."""
    values = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in values.items()}


def free_port() -> int:
    """A TCP port that nobody listens at now."""
    with socket.socket() as server:
        server.bind(("", 0))
        port: int = server.getsockname()[1]
        return port


def stop_all(processes: Iterable[Process], stop: list[int]) -> None:
    """Asks all to stop and kills those that have not after the grace, or at once when asked a second time."""
    processes, asked = list(processes), len(stop)
    for process in processes:
        process.ask_to_stop()
    deadline = time.monotonic() + GRACE_SECONDS
    while (
        sum(process.poll() is None for process in processes)
        and time.monotonic() < deadline
        and len(stop) == asked
    ):
        time.sleep(POLL_SECONDS)
    for process in processes:
        process.kill()
