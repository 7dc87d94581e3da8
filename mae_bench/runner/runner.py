"""The runner: one worker process a cell, each started when its backbone is there, none started twice, all stopped together."""

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mae_bench.config import expand_variables
from mae_bench.data.checks.layouts import check_layout
from mae_bench.environment.provenance import num_cores, visible_gpus
from mae_bench.errors import Interrupted, UserError
from mae_bench.files import write_json
from mae_bench.progress import STOP_SIGNALS
from mae_bench.record import FAILURE_FILE, Failure, ResultRecord, write_failure
from mae_bench.registry import kind
from mae_bench.runner.demo_worker import ask_for_data
from mae_bench.runner.launcher import LaunchGroup, check_gpus
from mae_bench.runner.live import View
from mae_bench.runner.processes import POLL_SECONDS, Process, Worker, start_ranks, stop_all
from mae_bench.runner.worker import INTERRUPTED, LOCK_FILE, Order
from mae_bench.suite.cell import LOG_FILE, Cell
from mae_bench.suite.config import SUITE_FILE, Place, SuiteConfig, check_sources, expand, places

MOST_JOBS = 4  # on a CPU, unless asked for more: each worker holds a framework and its data in memory
LOG_LINES = 5  # of a dead worker's log in its failure

Result = ResultRecord | Failure


@dataclass(frozen=True)
class DeviceSlot:
    """Capacity for one worker process: its device and what CUDA_VISIBLE_DEVICES shows it ("": no GPU)."""

    device: str
    visible: str = ""


@dataclass(frozen=True)
class Capacity:
    """What a run may use: `slots`, for at most `cells` cells at a time; a cell of a distributed kind takes `processes` slots."""

    slots: list[DeviceSlot]
    cells: int
    processes: int = 1

    def processes_of(self, cell: Cell) -> int:
        """How many processes run the cell."""
        return self.processes if kind(cell.kind).distributed else 1


def capacity_of(suite: SuiteConfig, launched: int = 1) -> Capacity:
    """As much as the suite asks for and this machine has; `launched`: the processes that a launcher started, which it must use.

    GPUs are dealt out in turn; the processes of one cell get one each.
    """
    gpus = [] if suite.device == "cpu" else visible_gpus()
    if suite.device == "cuda" and not gpus:
        raise UserError("device=cuda, but torch sees no GPU here", expected="a GPU", fix="use device=cpu")
    jobs = suite.jobs if isinstance(suite.jobs, int) else len(gpus) or min(MOST_JOBS, num_cores())
    processes = launched if launched > 1 else num_processes(suite, len(gpus))
    if launched > 1 and gpus:
        check_gpus()
    if launched > 1 and suite.processes not in ("auto", launched):
        raise UserError(
            f"processes={suite.processes}, but a launcher started {launched}", fix="leave processes away"
        )
    if gpus and launched == 1 and processes > len(gpus):
        raise UserError(f"processes={processes}, but torch sees {len(gpus)} GPUs here", expected="one GPU a process",
                        fix=f"processes={len(gpus)}, or start it by torchrun on several machines")  # fmt: skip
    count = jobs if launched > 1 else max(jobs, processes)
    slots = [DeviceSlot("cuda", gpus[i % len(gpus)]) if gpus else DeviceSlot("cpu") for i in range(count)]
    return Capacity(slots, jobs, processes)


def num_processes(suite: SuiteConfig, num_gpus: int) -> int:
    """Of each cell of a distributed kind: as given, or all GPUs for a run of one cell, else 1."""
    if suite.processes != "auto":
        return suite.processes
    return max(1, num_gpus) if len(suite.backbones) == 1 and not suite.tasks else 1


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


def run_suite(
    suite: SuiteConfig, view: View, command: str, group: LaunchGroup | None = None
) -> list[tuple[Cell, Result]]:
    """Makes the data if it is the suite's own, checks all data, then runs every cell that is not finished.

    group: the processes that a launcher started, of which this is rank 0; they run the cells of distributed kinds.
    UserError before any cell runs: bad data, a missing checkpoint, or a folder in which another runner is at work.
    Interrupted after SIGTERM, SIGINT, SIGHUP or SIGUSR1: the workers have saved their state, and the same call goes on.
    """
    out, capacity = Path(suite.out), capacity_of(suite, group.size if group else 1)
    check_sources(suite)
    with locked(out), stop_requests() as stop:
        write_json(out / SUITE_FILE, suite.model_dump(mode="json"))
        if suite.demo_data:
            make_data(suite, view, stop)
        digests, errors = check_data(suite)
        if errors:
            raise UserError("\n".join(str(error) for error in errors.values()))
        runner = Runner(expand(suite, digests), capacity, suite.threads, command, view, group)
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
            f"{out} cannot be written: {error}",
            expected="a folder to write to",
            fix="give another: --out DIR",
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
    """A list that the signals to stop are noted in instead of ending the process; one that is ignored stays ignored."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    numbers = [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_data(suite: SuiteConfig, view: View, stop: list[int]) -> None:
    """Runs the process that makes the suite's own data, which has nothing to do when all is there."""
    folder = ask_for_data(suite)
    worker = Worker("mae_bench.runner.demo_worker", folder, suite.threads, "")
    view.start(folder, "demo data")
    try:
        while worker.poll() is None and not stop:
            view.tick()
            time.sleep(POLL_SECONDS)
    finally:
        stop_all([worker], stop)
    view.end(folder)
    if stop or worker.poll() == INTERRUPTED:
        raise Interrupted
    if worker.poll() != 0:
        raise UserError(
            f"the demo's data cannot be made: {last_lines(folder)}",
            fix=f"{folder / LOG_FILE} has the whole log",
        )


def last_lines(folder: Path, count: int = LOG_LINES) -> str:
    """The end of the folder's log, "" where there is none."""
    try:
        lines = (folder / LOG_FILE).read_bytes()[-10_000:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join([line for line in lines if line.strip()][-count:])


class Runner:
    """Keeps every slot busy with a cell whose backbone is there until each cell has a result."""

    def __init__(
        self, cells: list[Cell], capacity: Capacity, threads: int, command: str, view: View, group: LaunchGroup | None = None
    ):  # fmt: skip
        self.cells, self.capacity, self.threads, self.command, self.view = (
            cells,
            capacity,
            threads,
            command,
            view,
        )
        finished = {cell.dir: cell.result() for cell in cells}
        self.results: dict[Path, Result] = {
            folder: r for folder, r in finished.items() if isinstance(r, ResultRecord)
        }
        self._waiting = [cell for cell in cells if cell.dir not in self.results]
        self._running: dict[Process, tuple[Cell, list[DeviceSlot]]] = {}
        self._free = list(capacity.slots)
        self._group = group

    def run(self, stop: list[int]) -> None:
        """Returns when `results` is complete; raises Interrupted when something stands in `stop`."""
        self.view.begin(len(self.cells), len(self.results))
        try:
            while self._waiting or self._running:
                if stop or (self._group and self._group.asked_to_stop()):
                    raise Interrupted
                self._start_ready()
                self._collect()
                self.view.tick()
                time.sleep(POLL_SECONDS)
        finally:
            if self._running:
                self.view.say(f"stopping: {len(self._running)} workers save their state")
            stop_all(self._running, stop)
            for cell, _ in self._running.values():
                (cell.dir / FAILURE_FILE).unlink(
                    missing_ok=True
                )  # of a rank that the stop of another surprised

    def _start_ready(self) -> None:
        for cell in list(self._waiting):
            maker = self.results.get(cell.upstream) if cell.upstream else None
            if isinstance(maker, Failure):
                self._waiting.remove(cell)
                self._settle(cell, inherited(cell, maker))
            elif maker or not cell.upstream:
                if not (slots := self._take_slots(cell)):
                    return  # the cells behind it do not overtake one that needs many
                self._waiting.remove(cell)
                self._start(cell, slots)

    def _take_slots(self, cell: Cell) -> list[DeviceSlot]:
        """The slots of the cell's processes, on a GPU each; none if there is no room now."""
        if len(self._running) >= self.capacity.cells:
            return []
        count, free = self.capacity.processes_of(cell), self._free
        if count > 1 and self._group:
            count = len(self.capacity.slots)  # the launcher's processes use all of the machine
        elif count > 1 and self.capacity.slots[0].device == "cuda":
            free = list({slot.visible: slot for slot in free}.values())
        taken = free[:count] if len(free) >= count else []
        for slot in taken:
            self._free.remove(slot)
        return taken

    def _start(self, cell: Cell, slots: list[DeviceSlot]) -> None:
        cell.dir.mkdir(parents=True, exist_ok=True)
        (cell.dir / FAILURE_FILE).unlink(missing_ok=True)
        count, device = self.capacity.processes_of(cell), slots[0].device
        Order(cell, kind(cell.kind), device, self.threads, self.command, count).write()
        self.view.start(cell.dir, cell.name, count, cell.config.get("global_batch_size", 0))
        self._running[self._process(cell, slots, count)] = cell, slots

    def _process(self, cell: Cell, slots: list[DeviceSlot], count: int) -> Process:
        module, visible = "mae_bench.runner.worker", [slot.visible for slot in slots]
        if count == 1:
            return Worker(module, cell.dir, self.threads, visible[0])
        if self._group:
            return self._group.start(module, cell.dir, slots[0].device, self.threads)
        return start_ranks(module, cell.dir, self.threads, visible, count)

    def _collect(self) -> None:
        for process, (cell, slots) in list(self._running.items()):
            if (code := process.poll()) is not None:
                process.kill()  # its loader processes, if it left any
                del self._running[process]
                self._free.extend(slots)
                self._settle(cell, result_of(cell, code))

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


def result_of(cell: Cell, code: int) -> Result:
    """What a worker that ended with `code` leaves: a record; its own words; or what its code says.

    Where a rank died without a word, the words are those of another that lost it.
    """
    result, has_words = cell.result(), code in (0, 1, -signal.SIGABRT)
    return result if isinstance(result, ResultRecord) or (result and has_words) else death_of(cell, code)


def death_of(cell: Cell, code: int) -> Failure:
    """The failure of a worker that ended without a word."""
    if code == INTERRUPTED:
        return cell.failure(
            "another process asked it to stop", "run the same command again: it goes on from its saved state"
        )
    if code >= 0:
        return cell.failure(
            f"its worker ended with exit code {code}: {last_lines(cell.dir)}", f"see {cell.dir / LOG_FILE}"
        )
    name = signal.Signals(-code).name
    cause = ", most often because the system ran out of memory" if -code == signal.SIGKILL else ""
    said = f"; its last words: {last_lines(cell.dir)}" if last_lines(cell.dir) else ""
    fix = (
        "use less memory: fewer cells at a time (jobs), fewer num_workers, a smaller device_batch_size"
        if cause
        else f"see {cell.dir / LOG_FILE}"
    )
    return cell.failure(f"its worker was killed by {name}{cause}{said}", fix)
