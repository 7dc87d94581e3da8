"""Estimate the time left in a run from what was measured: finished cells, and the pace of running ones."""

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from mae_bench.record import Failure, ResultRecord
from mae_bench.runner.status import WorkerStatus
from mae_bench.suite.cell import Cell

Result = ResultRecord | Failure


class Estimate:
    """The time left until every cell has a result, `parallel` cells at a time.

    A cell that is left takes as long as the finished cells of its task and backbone did on average, or else
    as those of its task with any backbone.
    """

    def __init__(self, cells: Sequence[Cell], results: Mapping[Path, Result], parallel: int):
        self._left = {cell.dir: cell for cell in cells}
        self._parallel = parallel
        self._measured: dict[tuple[str, ...], tuple[float, int]] = {}  # sum of the seconds, number of cells
        for folder, result in results.items():
            self.finish(folder, result)

    def finish(self, folder: Path, result: Result) -> None:
        """Note the result of a cell; the duration of a finished one is a measurement."""
        cell = self._left.pop(folder, None)
        if cell is None or not isinstance(result, ResultRecord):
            return
        seconds = measure_seconds(result)
        if seconds is not None:
            for key in _likeness(cell):
                total, count = self._measured.get(key, (0.0, 0))
                self._measured[key] = total + seconds, count + 1

    def seconds_left(self, running: Mapping[Path, WorkerStatus]) -> float | None:
        """Return the estimate; None while any cell is like none that was measured."""
        own: dict[Path, float] = {}
        until_done: dict[Path, float] = {}
        for folder, cell in self._left.items():  # a backbone comes before its transfers
            seconds = self._seconds_of(cell, running.get(folder))
            if seconds is None:
                return None
            own[folder] = seconds
            until_done[folder] = seconds + (until_done.get(cell.upstream, 0.0) if cell.upstream else 0.0)
        if not own:
            return 0.0
        return max(max(until_done.values()), sum(own.values()) / min(self._parallel, len(own)))

    def _seconds_of(self, cell: Cell, status: WorkerStatus | None) -> float | None:
        """Return the time that a cell still takes: by its own pace once it trains, else by its like."""
        if status and status.has_trained and status.seconds_left is not None:
            return status.seconds_left
        like = [self._measured[key] for key in _likeness(cell) if key in self._measured]
        if not like:
            return None
        total, count = like[0]
        return max(0.0, total / count - (time.time() - status.began if status else 0.0))


def _likeness(cell: Cell) -> list[tuple[str, ...]]:
    """Return what cells are alike in, from the closest on."""
    task = (cell.row, cell.kind, str(cell.config.get("protocol", "")))
    return [(*task, cell.backbone), task]


def measure_seconds(record: ResultRecord) -> float | None:
    """Return how long a cell took, None if its record does not say."""
    try:
        return (
            datetime.fromisoformat(record.finished) - datetime.fromisoformat(record.started)
        ).total_seconds()
    except (ValueError, TypeError):
        return None
