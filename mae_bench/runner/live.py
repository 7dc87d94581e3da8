"""The view of a run: a progress bar per worker on a terminal, plain lines elsewhere."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mae_bench.progress import EVENTS_FILE
from mae_bench.record import Failure, ResultRecord

FRAME_SECONDS = 0.25
TRAIN = "train"  # the stage of a training job whose steps are optimizer steps
STYLES = {"failed": "bold red", "not installed": "yellow"}


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

    def poll(self) -> list[str]:
        """Read the new events; return the notes among them."""
        if not self.path.is_file():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]  # an incomplete line is read next time
        self.offset += len(whole)
        notes = [self._update(json.loads(line)) for line in whole.splitlines()]
        return [note for note in notes if note]

    def _update(self, event: dict[str, Any]) -> str:
        """Update the state by an event; return its note, "" if it has none."""
        if event["stage"] != self.stage:
            self.stage, self.values, self.first = event["stage"], {}, (0.0, 0.0)
        if "done" in event:
            self.done, self.total = event["done"], event["total"]
            self.values = event.get("values", self.values)
            if not self.first[0] and self.done:
                self.first = event["time"], self.done
        return str(event.get("note", ""))

    @property
    def pace(self) -> float:
        """Steps per second of this stage so far; 0 before the second event."""
        began, at = self.first
        return (self.done - at) / (time.time() - began) if began and self.done > at else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds left in this stage; None before the second event."""
        return (self.total - self.done) / self.pace if self.pace and self.total else None

    @property
    def shown(self) -> dict[str, Any]:
        """The values of the job, and images per second in a training stage."""
        if self.stage == TRAIN and self.imgs_per_step and self.pace:
            return self.values | {"img/s": round(self.imgs_per_step * self.pace)}
        return self.values


class View:
    """Plain lines for people: one when a cell starts, one when it ends, one per note."""

    def __init__(self, console: Console):
        self.console = console
        self._tails: dict[Path, WorkerStatus] = {}
        self._began, self._total, self._ended, self._failed = time.monotonic(), 0, 0, 0
        self._assumed: set[tuple[str, str]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def begin(self, total: int, finished: int) -> None:
        """Report the start of a run of `total` cells, `finished` of which are done."""
        self._total, self._ended = total, finished
        done = f", {finished} already finished" if finished else ""
        self._print(f"{total} cells{done}, {total - finished} to run")

    def say(self, message: str) -> None:
        """Print a message that concerns the whole run."""
        self._print(escape(message))

    def say_assumptions(self, backbone: str, assumptions: Iterable[str]) -> None:
        """Print what is assumed about a checkpoint, each assumption once."""
        for assumption in assumptions:
            if (backbone, assumption) not in self._assumed:
                self._assumed.add((backbone, assumption))
                self.say(f"{backbone}: {assumption}")

    def start(self, folder: Path, name: str, processes: int = 1, imgs_per_step: int = 0) -> None:
        """Follow the worker, or the ranks, in `folder`; `imgs_per_step` is 0 if unknown."""
        path = folder / EVENTS_FILE
        name += f" · {processes} processes" if processes > 1 else ""
        self._tails[folder] = WorkerStatus(
            name, path, path.stat().st_size if path.is_file() else 0, imgs_per_step=imgs_per_step
        )
        self._print(f"[dim]start[/]  {escape(name)}", passing=True)

    def end(self, folder: Path, name: str = "", result: ResultRecord | Failure | None = None) -> None:
        """Stop following the worker in `folder` and print the result of its cell."""
        self.tick()
        tail = self._tails.pop(folder, None)
        if result:
            self._ended += 1
            self._failed += isinstance(result, Failure) and result.status == "failed"
            took = f"  [dim]{clock(time.time() - tail.began)}[/]" if tail else ""
            self._print(f"{outcome(result)}  {escape(name)}{took}{detail(result)}")

    def tick(self) -> None:
        """Read what the workers have written."""
        for tail in self._tails.values():
            for note in tail.poll():
                self._print(f"[dim]note[/]   {escape(tail.name)}: {escape(note)}")

    def _print(self, markup: str, passing: bool = False) -> None:
        """Print a line; a `passing` one is of no interest later."""
        self.console.print(markup, highlight=False, soft_wrap=True)


class LiveView(View):
    """On a terminal: finished cells scroll by, running ones are below with bars, values and the time left."""

    def __init__(self, console: Console):
        super().__init__(console)
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn = 0.0

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.update(Text(""), refresh=True)
        self._live.__exit__(*error)

    def tick(self) -> None:
        """Read what the workers have written, and redraw."""
        super().tick()
        if time.monotonic() - self._drawn >= FRAME_SECONDS:
            self._drawn = time.monotonic()
            self._live.update(self._frame(), refresh=True)

    def _print(self, markup: str, passing: bool = False) -> None:
        if not passing:
            super()._print(markup)

    def _frame(self) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        for tail in self._tails.values():
            grid.add_row(*row(tail))
        failed = f", [bold red]{self._failed} failed[/]" if self._failed else ""
        counted = f"{self._ended} of {self._total} cells{failed}, " if self._total else ""
        return Group(
            grid, Text.from_markup(f"[dim]{counted}{clock(time.monotonic() - self._began)} so far[/]")
        )


def row(tail: WorkerStatus) -> list[RenderableType]:
    """Render a running worker: name, stage, bar, count, values, elapsed time, time left."""
    bar = ProgressBar(total=tail.total or None, completed=tail.done, width=20, pulse=not tail.total)
    count = f"{tail.done:g}/{tail.total:g}" if tail.total else ""
    values = " ".join(
        f"{name} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in tail.shown.items()
    )
    left = f"{clock(tail.seconds_left)} left" if tail.seconds_left is not None else ""
    texts = (count, values, clock(time.time() - tail.began), left)
    return [
        Text(tail.name, style="bold", no_wrap=True),
        Text(tail.stage),
        bar,
        *(Text(text, style="dim") for text in texts),
    ]


def outcome(result: ResultRecord | Failure) -> str:
    """Return "done", or the status of a failure, as markup."""
    if isinstance(result, Failure):
        return f"[{STYLES[result.status]}]{result.status}[/]"
    return "[green]done[/]  "


def detail(result: ResultRecord | Failure) -> str:
    """Return the score, or the reason of a failure and what to do next, as markup."""
    if isinstance(result, Failure):
        fix = f"\n       Next: {escape(result.fix)}" if result.fix else ""
        return f"\n       {escape(result.reason)}{fix}"
    score = result.score
    return f"  {escape(result.main_metric)} [bold]{score.value:.5g}[/] {escape(score.unit)}"


def clock(seconds: float) -> str:
    """Format a duration as m:ss, or h:mm:ss from one hour."""
    minutes, rest = divmod(int(max(0, seconds)), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextmanager
def counting(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function (name, done, total) that updates bars and prints a line for what is complete."""
    bars = Progress(console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}
    complete: set[str] = set()

    def show(name: str, done: int, total: int) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(escape(name), total=total)
        bars.update(tasks[name], completed=done, total=total)
        if done >= total and name not in complete:
            complete.add(name)
            console.print(f"{escape(name)}: {done}", highlight=False)

    with bars:
        yield show


def view_for(console: Console) -> View:
    """Return a view with bars for a terminal, with plain lines for anything else."""
    return LiveView(console) if console.is_terminal else View(console)
