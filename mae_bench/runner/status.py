"""Follow the events of a running cell: its stage, values, pace and the time left in the stage."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, ValidationError

TRAIN = "train"  # the stage of a training job whose steps are optimizer steps


class Event(BaseModel):
    """A line of `events.jsonl`, as `mae_bench.progress` writes it."""

    time: FiniteFloat
    stage: str
    total: FiniteFloat = 0
    done: FiniteFloat | None = None
    values: dict[str, int | float | str] = {}
    note: str = ""


def read_event(line: bytes) -> Event | None:
    """Read an event; None for a line that a crash or a damaged disk has left."""
    try:
        return Event.model_validate_json(line)
    except ValidationError:
        return None


@dataclass
class WorkerStatus:
    """The state of a worker, from the events in its `events.jsonl` since the view began to follow it."""

    name: str
    path: Path
    offset: int = 0
    imgs_per_step: int = 0
    began: float = field(default_factory=time.time)
    stage: str = "start"
    done: float = 0.0
    total: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)
    # Time and finished steps at the first event of the stage: a resumed stage does not begin at 0.
    first: tuple[float, float] = (0.0, 0.0)
    has_trained: bool = False

    def poll(self) -> list[str]:
        """Read the new events; return the notes among them."""
        if not self.path.is_file():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]  # an incomplete line is read next time
        self.offset += len(whole)
        events = [event for line in whole.splitlines() if (event := read_event(line)) is not None]
        for event in events:
            self._update(event)
        return [event.note for event in events if event.note]

    def _update(self, event: Event) -> None:
        if event.stage != self.stage:
            self.stage, self.values, self.first = event.stage, {}, (0.0, 0.0)
        self.has_trained = self.has_trained or self.stage == TRAIN
        if event.done is None:
            return
        self.done, self.total = event.done, event.total
        self.values = event.values or self.values
        if not self.first[0] and self.done:
            self.first = event.time, self.done

    @property
    def pace(self) -> float:
        """Steps per second of this stage so far; 0 before the second event."""
        began, at = self.first
        passed = time.time() - began
        return (self.done - at) / passed if began and self.done > at and passed > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds left in this stage; None before the second event."""
        return (self.total - self.done) / self.pace if self.pace and self.total else None

    @property
    def shown(self) -> dict[str, str]:
        """The values of the job, and images per second in a training stage, as text."""
        values = dict(self.values)
        if self.stage == TRAIN and self.imgs_per_step and self.pace:
            values["img/s"] = round(self.imgs_per_step * self.pace)
        return {
            name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()
        }

    @property
    def count(self) -> str:
        """The finished steps of the stage and their number; "" if that is unknown."""
        return f"{self.done:.10g}/{self.total:.10g}" if self.total else ""

    def describe(self) -> str:
        """Return stage, steps, values and the time left in the stage, in one line."""
        left = "unknown" if self.seconds_left is None else clock(self.seconds_left)
        values = [f"{name} {value}" for name, value in self.shown.items()]
        return ", ".join([f"{self.stage} {self.count}".rstrip(), *values, f"ETA {left}"])


def clock(seconds: float) -> str:
    """Format a duration as m:ss, or h:mm:ss from one hour."""
    minutes, rest = divmod(int(max(0, seconds)), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
