"""Progress of a job as a line of JSON an event, which a live view, a log or another machine can follow."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from mae_bench.errors import Interrupted

EVENTS_FILE = "events.jsonl"
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
)  # the last is what Slurm sends before a time limit
MIN_SECONDS = 0.2  # between two events of one stage: a live view needs no more


class Progress:
    """Writes events to `path` (None: nowhere) and tells the job when it has to stop.

    A job calls `stage` when a part of its work begins and `step` after each unit of it; `step` raises Interrupted after a signal
    to stop (see `stop_on_signals`) or once the parent process is gone. Jobs with state to save test `should_stop` themselves,
    save, and then call `check`.
    """

    def __init__(self, path: str | Path | None = None):
        self._file = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115 - kept open for the job's life
        self._stage, self._total, self._last = "", 0.0, 0.0
        self._parent = os.getppid()
        self._stop = self._deferred = False

    def stop_on_signals(self) -> None:
        """SIGTERM, SIGINT, SIGHUP and SIGUSR1 ask for a stop at the next step instead of ending the process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    @property
    def should_stop(self) -> bool:
        return self._stop or os.getppid() != self._parent

    def check(self) -> None:
        """Raises Interrupted if the job has to stop."""
        if self.should_stop and not self._deferred:
            self.interrupt()

    def interrupt(self) -> NoReturn:
        """Raises Interrupted, whoever asked for it."""
        raise Interrupted("asked to stop; run the same command again to go on")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, nothing here raises Interrupted: who works with other processes agrees with them on the step to stop after."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def stage(self, name: str, total: float = 0) -> None:
        """A part of the work begins: its name ("train", "evaluate", ...) and how many steps it has (0: unknown)."""
        self.check()
        self._stage, self._total, self._last = name, total, 0.0
        self._write({"done": 0})

    def step(self, done: float, **values: float | str) -> None:
        """`done` of the stage's steps are finished; values (loss, lr, ...) are shown beside the bar."""
        self.check()
        now = time.monotonic()
        if now - self._last >= MIN_SECONDS or done >= self._total > 0:
            self._last = now
            self._write({"done": done, **({"values": values} if values else {})})

    def note(self, message: str) -> None:
        """Something that a person should read, now and in the log."""
        self._write({"note": message})

    def _write(self, event: dict[str, Any]) -> None:
        if self._file:
            self._file.write(
                json.dumps({"time": time.time(), "stage": self._stage, "total": self._total, **event}) + "\n"
            )
            self._file.flush()
