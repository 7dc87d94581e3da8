"""The view of a run: a progress bar per worker on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mae_bench.environment.provenance import now
from mae_bench.progress import EVENTS_FILE
from mae_bench.record import Failure, ResultRecord
from mae_bench.runner.estimate import Estimate
from mae_bench.runner.status import WorkerStatus, clock
from mae_bench.suite.cell import LOG_FILE

FRAME_SECONDS = 0.25
LINE_SECONDS = 30.0  # between two lines on the progress of a cell, in its log and where there is no terminal
STYLES = {"failed": "bold red", "not installed": "yellow"}


class View:
    """Plain lines: one when a cell starts, one when it ends, one per note, and one every LINE_SECONDS.

    lines: where the regular lines go, `console` by default.
    """

    def __init__(self, console: Console, lines: Console | None = None):
        self.console, self._lines = console, lines or console
        self._tails: dict[Path, WorkerStatus] = {}
        self._began, self._total, self._ended, self._failed = time.monotonic(), 0, 0, 0
        self._told = self._began
        self._estimate: Estimate | None = None
        self._assumed: set[tuple[str, str]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def begin(self, total: int, finished: int, estimate: Estimate | None = None) -> None:
        """Report the start of a run of `total` cells, `finished` of which are done."""
        self._total, self._ended, self._estimate = total, finished, estimate
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
            if self._estimate:
                self._estimate.finish(folder, result)
            self._ended += 1
            self._failed += isinstance(result, Failure) and result.status == "failed"
            took = f"  [dim]{clock(time.time() - tail.began)}[/]" if tail else ""
            self._print(f"{outcome(result)}  {escape(name)}{took}{detail(result)}")

    def tick(self) -> None:
        """Read what the workers have written; from time to time tell how far they are."""
        for tail in self._tails.values():
            for note in tail.poll():
                self._print(f"[dim]note[/]   {escape(tail.name)}: {escape(note)}")
        if time.monotonic() - self._told >= LINE_SECONDS:
            self._told = time.monotonic()
            self._tell_progress()

    def _tell_progress(self) -> None:
        """Write a line per worker to its log and, without a terminal, for the user."""
        for folder, tail in self._tails.items():
            line = tail.describe()
            with suppress(OSError), open(folder / LOG_FILE, "a", encoding="utf-8") as log:
                log.write(f"{now()} {line}\n")
            self._tell(f"{tail.name}: {line}")
        if self._total > 1:
            self._tell(self._summary())

    def _tell(self, text: str) -> None:
        self._lines.print(text, markup=False, highlight=False, soft_wrap=True)

    def _summary(self) -> str:
        """Return the state of the whole run in one line."""
        counted = f"{self._ended} of {self._total} cells, " if self._total else ""
        counted += f"{self._failed} failed, " if self._failed else ""
        return f"{counted}{clock(time.monotonic() - self._began)} so far{self._time_left()}"

    def _time_left(self) -> str:
        if not self._estimate:
            return ""
        seconds = self._estimate.seconds_left(self._tails)
        return ", ETA unknown" if seconds is None else f", ETA {clock(seconds)}"

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
        summary = Text(self._summary(), style="dim")
        summary.highlight_words([f"{self._failed} failed"], STYLES["failed"])
        return Group(grid, summary)

    def _tell(self, text: str) -> None:
        pass  # the bars say so


def row(tail: WorkerStatus) -> list[RenderableType]:
    """Render a running worker: name, stage, bar, count, values, elapsed time, time left."""
    bar = ProgressBar(total=tail.total or None, completed=tail.done, width=20, pulse=not tail.total)
    values = " ".join(f"{name} {value}" for name, value in tail.shown.items())
    left = f"{clock(tail.seconds_left)} left" if tail.seconds_left is not None else ""
    texts = (tail.count, values, clock(time.time() - tail.began), left)
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


@contextmanager
def counting(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function (name, done, total) that updates bars and prints a line for what is complete.

    Without a terminal it prints a line every LINE_SECONDS instead of bars.
    """
    bars = Progress(console=console, transient=True, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}
    complete: set[str] = set()
    told = time.monotonic()

    def show(name: str, done: int, total: int) -> None:
        nonlocal told
        if name not in tasks:
            tasks[name] = bars.add_task(escape(name), total=total)
        bars.update(tasks[name], completed=done, total=total)
        if bars.disable and time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            console.print(f"{escape(name)}: {done} of {total}", highlight=False)
        if done >= total and name not in complete:
            complete.add(name)
            console.print(f"{escape(name)}: {done}", highlight=False)

    with bars:
        yield show


def view_for(console: Console, lines: Console | None = None) -> View:
    """Return a view with bars for a terminal, with plain lines for anything else."""
    return LiveView(console) if console.is_terminal else View(console, lines)
