"""The runner: one worker process a cell, each started when its backbone is there, none started twice, all stopped together."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mae_bench.cell import LOG_FILE, Cell
from mae_bench.config import expand_variables
from mae_bench.data.layouts import check_layout
from mae_bench.demo_worker import ask_for_data
from mae_bench.errors import Interrupted, UserError
from mae_bench.files import write_json
from mae_bench.live import View
from mae_bench.provenance import num_cores, visible_gpus
from mae_bench.record import FAILURE_FILE, Failure, ResultRecord, write_failure
from mae_bench.registry import kind
from mae_bench.suite import Place, SuiteConfig, check_sources, expand, places
from mae_bench.worker import INTERRUPTED, LOCK_FILE, Order, environment

POLL_SECONDS = 0.1
GRACE_SECONDS = 30.0  # that a worker has to save its state when it is asked to stop
MOST_JOBS = 4  # on a CPU, unless asked for more: each worker holds a framework and its data in memory
LOG_LINES = 5  # of a dead worker's log in its failure
SUITE_FILE = "suite.json"

Result = ResultRecord | Failure


@dataclass(frozen=True)
class Slot:
    """Room for one worker: its device and what CUDA_VISIBLE_DEVICES shows it ("": no GPU)."""

    device: str
    visible: str = ""


def slots_of(suite: SuiteConfig) -> list[Slot]:
    """As many slots as workers may run at a time; GPUs are dealt out in turn."""
    gpus = [] if suite.device == "cpu" else visible_gpus()
    if suite.device == "cuda" and not gpus:
        raise UserError("device=cuda, but torch sees no GPU here", expected="a GPU", fix="use device=cpu")
    jobs = suite.jobs if isinstance(suite.jobs, int) else len(gpus) or min(MOST_JOBS, num_cores())
    return [Slot("cuda", gpus[i % len(gpus)]) if gpus else Slot("cpu") for i in range(jobs)]


def check_data(suite: SuiteConfig) -> tuple[dict[Place, str], dict[Place, UserError]]:
    """The digests of the data that the suite reads, and what is wrong with the rest of it."""
    digests: dict[Place, str] = {}
    errors: dict[Place, UserError] = {}
    for layout, root in places(suite):
        try:
            digests[layout, root] = check_layout(layout, expand_variables(root)).digest
        except UserError as error:
            errors[layout, root] = error
    return digests, errors


def run_suite(suite: SuiteConfig, view: View, command: str) -> list[tuple[Cell, Result]]:
    """Makes the data if it is the suite's own, checks all data, then runs every cell that is not finished.

    UserError before any cell runs: bad data, a missing checkpoint, or a folder in which another runner is at work.
    Interrupted after SIGTERM, SIGINT or SIGHUP: the workers have saved their state, and the same call goes on.
    """
    out, slots = Path(suite.out), slots_of(suite)
    check_sources(suite)
    with locked(out), stop_requests() as stop:
        write_json(out / SUITE_FILE, suite.model_dump(mode="json"))
        if suite.demo_data:
            make_data(suite, view, stop)
        digests, errors = check_data(suite)
        if errors:
            raise UserError("\n".join(str(error) for error in errors.values()))
        runner = Runner(expand(suite, digests), slots, suite.threads, command, view)
        runner.run(stop)
    return [(cell, runner.results[cell.dir]) for cell in runner.cells]


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the folder for one runner; the system lets go of it when the process ends, however it ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - open for as long as the lock is held
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error}", expected="a folder to write to", fix="give another: --out DIR"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UserError(
                f"{out} is in use: process {file.read().strip() or 'unknown'} runs a suite there",
                expected="one runner a folder", fix="wait for it, stop it, or name another folder: --out DIR",
            ) from error  # fmt: skip
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that SIGTERM, SIGINT and SIGHUP are noted in instead of ending the process; one that is ignored stays ignored."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Worker:
    """A worker process in a process group of its own; all that it prints goes to log.txt in its folder."""

    def __init__(self, module: str, folder: Path, threads: int, visible: str):
        with open(folder / LOG_FILE, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(folder)],  # -P: a folder `tasks` where the user stands is not ours
                env=environment(threads, visible), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
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


def stop_workers(workers: Iterable[Worker], stop: list[int]) -> None:
    """Asks all to stop and kills those that have not after the grace, or at once when asked a second time."""
    workers, asked = list(workers), len(stop)
    for worker in workers:
        worker.ask_to_stop()
    deadline = time.monotonic() + GRACE_SECONDS
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline and len(stop) == asked:
        time.sleep(POLL_SECONDS)
    for worker in workers:
        worker.kill()


def make_data(suite: SuiteConfig, view: View, stop: list[int]) -> None:
    """Runs the process that makes the suite's own data, which has nothing to do when all is there."""
    folder = ask_for_data(suite)
    worker = Worker("mae_bench.demo_worker", folder, suite.threads, "")
    view.start(folder, "demo data")
    try:
        while worker.poll() is None and not stop:
            view.tick()
            time.sleep(POLL_SECONDS)
    finally:
        stop_workers([worker], stop)
    view.end(folder)
    if stop or worker.poll() == INTERRUPTED:
        raise Interrupted
    if worker.poll() != 0:
        raise UserError(f"the demo's data cannot be made: {last_lines(folder)}", fix=f"{folder / LOG_FILE} has the whole log")


def last_lines(folder: Path, count: int = LOG_LINES) -> str:
    """The end of the folder's log, "" where there is none."""
    try:
        lines = (folder / LOG_FILE).read_bytes()[-10_000:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join([line for line in lines if line.strip()][-count:])


class Runner:
    """Keeps every slot busy with a cell whose backbone is there until each cell has a result."""

    def __init__(self, cells: list[Cell], slots: list[Slot], threads: int, command: str, view: View):
        self.cells, self.threads, self.command, self.view = cells, threads, command, view
        finished = {cell.dir: cell.result() for cell in cells}
        self.results: dict[Path, Result] = {folder: r for folder, r in finished.items() if isinstance(r, ResultRecord)}
        self._waiting = [cell for cell in cells if cell.dir not in self.results]
        self._running: dict[Worker, tuple[Cell, Slot]] = {}
        self._free = list(slots)

    def run(self, stop: list[int]) -> None:
        """Returns when `results` is complete; raises Interrupted when something stands in `stop`."""
        self.view.begin(len(self.cells), len(self.results))
        try:
            while self._waiting or self._running:
                if stop:
                    raise Interrupted
                self._start_ready()
                self._collect()
                self.view.tick()
                time.sleep(POLL_SECONDS)
        finally:
            if self._running:
                self.view.say(f"stopping: {len(self._running)} workers save their state")
            stop_workers(self._running, stop)

    def _start_ready(self) -> None:
        for cell in list(self._waiting):
            maker = self.results.get(cell.upstream) if cell.upstream else None
            if isinstance(maker, Failure):
                self._waiting.remove(cell)
                self._settle(cell, inherited(cell, maker))
            elif self._free and (maker or not cell.upstream):
                self._waiting.remove(cell)
                self._start(cell, self._free.pop(0))

    def _start(self, cell: Cell, slot: Slot) -> None:
        cell.dir.mkdir(parents=True, exist_ok=True)
        (cell.dir / FAILURE_FILE).unlink(missing_ok=True)
        Order(cell, kind(cell.kind), slot.device, self.threads, self.command).write()
        self.view.start(cell.dir, cell.name)
        self._running[Worker("mae_bench.worker", cell.dir, self.threads, slot.visible)] = cell, slot

    def _collect(self) -> None:
        for worker, (cell, slot) in list(self._running.items()):
            if (code := worker.poll()) is not None:
                worker.kill()  # its loader processes, if it left any
                del self._running[worker]
                self._free.append(slot)
                self._settle(cell, cell.result() or death_of(cell, code))

    def _settle(self, cell: Cell, result: Result) -> None:
        if isinstance(result, Failure):
            cell.dir.mkdir(parents=True, exist_ok=True)
            write_failure(result, cell.dir / FAILURE_FILE)
        self.results[cell.dir] = result
        self.view.end(cell.dir, cell.name, result)


def inherited(cell: Cell, maker: Failure) -> Failure:
    """The failure of a cell whose backbone was not made."""
    reason = f"its backbone {cell.backbone!r} could not be made: {maker.reason}"
    return cell.failure(reason, maker.fix, not_installed=maker.status == "not installed")


def death_of(cell: Cell, code: int) -> Failure:
    """The failure of a worker that ended without a word."""
    if code == INTERRUPTED:
        return cell.failure("another process asked it to stop", "run the same command again: it goes on from its saved state")
    if code >= 0:
        return cell.failure(f"its worker ended with exit code {code}: {last_lines(cell.dir)}", f"see {cell.dir / LOG_FILE}")
    name = signal.Signals(-code).name
    cause = ", most often because the system ran out of memory" if -code == signal.SIGKILL else ""
    said = f"; its last words: {last_lines(cell.dir)}" if last_lines(cell.dir) else ""
    fix = "run with --jobs 1, or with a smaller batch" if cause else f"see {cell.dir / LOG_FILE}"
    return cell.failure(f"its worker was killed by {name}{cause}{said}", fix)
