"""Report the progress of a job as one line of JSON per event, for a live view, a log or another machine."""

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
# Slurm can send SIGUSR1 before a time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
ORPHAN_SECONDS = 30  # for a job to save its state when its parent is gone
MIN_SECONDS = 0.2  # between two events of a stage; a live view needs no more


class Progress:
    """Write events to `path` (None: discard them) and signal when the job has to stop.

    A job calls `stage` when a part of its work begins and `step` after each unit of work. `step` raises
    Interrupted after a stop signal (see `stop_on_signals`) or when the parent process is gone. A job with
    state to save tests `should_stop` itself, saves, and then calls `check`.

    A worker receives SIGTERM when its runner ends (`mae_bench.runner.child`): before its first step it then
    ends at once, later it has ORPHAN_SECONDS to save.
    """

    def __init__(self, path: str | Path | None = None):
        self._file = open(path, "a", encoding="utf-8") if path else None  # noqa: SIM115 - open until the job ends
        self._stage, self._total, self._last = "", 0.0, 0.0
        self._parent = os.getppid()
        self._stop = self._deferred = self._stepped = False

    def stop_on_signals(self) -> None:
        """Let SIGTERM, SIGINT, SIGHUP and SIGUSR1 request a stop at the next step, not end the process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = True
        if os.getppid() != self._parent:
            if not self._stepped:
                os._exit(1)  # nothing to save yet
            signal.alarm(ORPHAN_SECONDS)  # nobody else would end a job that does not stop

    @property
    def should_stop(self) -> bool:
        """Whether a stop was requested or the parent process is gone."""
        return self._stop or os.getppid() != self._parent

    def check(self) -> None:
        """Raise Interrupted if the job has to stop."""
        if self.should_stop and not self._deferred:
            self.interrupt()

    def interrupt(self) -> NoReturn:
        """Raise Interrupted."""
        raise Interrupted("asked to stop; re-run the same command to resume")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Raise no Interrupted in the `with` block: ranks first agree on the step after which they stop."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def stage(self, name: str, total: float = 0) -> None:
        """Begin a stage ("train", "evaluate", ...) of `total` steps (0: unknown)."""
        self.check()
        self._stage, self._total, self._last = name, total, 0.0
        self._write({"done": 0})

    def step(self, done: float, **values: float | str) -> None:
        """Report `done` finished steps of the stage, with values (loss, lr, ...) to show next to the bar."""
        self.check()
        self._stepped = True
        now = time.monotonic()
        if now - self._last >= MIN_SECONDS or done >= self._total > 0:
            self._last = now
            event: dict[str, Any] = {"done": done}
            if values:
                event["values"] = values
            self._write(event)

    def note(self, message: str) -> None:
        """Report a message to the user, shown now and kept in the log."""
        self._write({"note": message})

    def _write(self, event: dict[str, Any]) -> None:
        if self._file:
            line = {"time": time.time(), "stage": self._stage, "total": self._total, **event}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
