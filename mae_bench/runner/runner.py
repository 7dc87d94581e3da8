"""Run each cell in its own worker process once its backbone is ready; stop all workers together."""

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
from mae_bench.files import is_full, write_json
from mae_bench.locks import holder_of, try_lock
from mae_bench.progress import STOP_SIGNALS
from mae_bench.record import FAILURE_FILE, NO_BACKBONE, Failure, ResultRecord, write_failure
from mae_bench.registry import kind
from mae_bench.runner.demo_worker import ask_for_data
from mae_bench.runner.estimate import Estimate
from mae_bench.runner.fitting import Preview, assumptions_of, find_misfits, preview_backbones
from mae_bench.runner.launcher import LaunchGroup, check_gpus
from mae_bench.runner.live import View
from mae_bench.runner.processes import POLL_SECONDS, Process, Worker, start_ranks, stop_all
from mae_bench.runner.worker import INTERRUPTED, LOCK_FILE, Order
from mae_bench.suite.cell import LOG_FILE, Cell
from mae_bench.suite.config import SUITE_FILE, Place, SuiteConfig, check_sources, expand, places

MAX_JOBS = 4  # on a CPU by default: each worker has a framework and its data in memory
LOG_LINES = 5  # of the log of a dead worker, quoted in its failure

Result = ResultRecord | Failure


@dataclass(frozen=True)
class DeviceSlot:
    """A place for one worker process: its device and its CUDA_VISIBLE_DEVICES ("": no GPU)."""

    device: str
    visible: str = ""


@dataclass(frozen=True)
class Capacity:
    """What a run may use: `slots` for at most `cells` cells at a time, `processes` per distributed cell."""

    slots: list[DeviceSlot]
    cells: int
    processes: int = 1

    def processes_of(self, cell: Cell) -> int:
        """Return the number of processes that run the cell."""
        return self.processes if kind(cell.kind).distributed else 1


def capacity_of(suite: SuiteConfig, launched: int = 1) -> Capacity:
    """Return the capacity that the suite requests and this machine has.

    `launched` is the number of processes that a launcher started, all of which must be used. GPUs are
    assigned round-robin; the processes of one cell get one each.
    """
    gpus = [] if suite.device == "cpu" else visible_gpus()
    if suite.device == "cuda" and not gpus:
        raise UserError("device=cuda, but torch sees no GPU here", expected="a GPU", fix="use device=cpu")
    jobs = suite.jobs if isinstance(suite.jobs, int) else len(gpus) or min(MAX_JOBS, num_cores())
    processes = launched if launched > 1 else num_processes(suite, len(gpus))
    if launched > 1 and gpus:
        check_gpus()
    if launched > 1 and suite.processes not in ("auto", launched):
        raise UserError(
            f"processes={suite.processes}, but a launcher started {launched}", fix="leave processes out"
        )
    if gpus and launched == 1 and processes > len(gpus):
        raise UserError(
            f"processes={processes}, but torch sees {len(gpus)} GPUs here",
            expected="one GPU per process",
            fix=f"processes={len(gpus)}, or start it with torchrun on several machines",
        )
    count = jobs if launched > 1 else max(jobs, processes)
    slots = [DeviceSlot("cuda", gpus[i % len(gpus)]) if gpus else DeviceSlot("cpu") for i in range(count)]
    return Capacity(slots, jobs, processes)


def num_processes(suite: SuiteConfig, num_gpus: int) -> int:
    """Return the processes per distributed cell: as given, or all GPUs if the suite is one cell, else 1."""
    if suite.processes != "auto":
        return suite.processes
    return max(1, num_gpus) if len(suite.backbones) == 1 and not suite.tasks else 1


def check_data(suite: SuiteConfig) -> tuple[dict[Place, str], dict[Place, UserError]]:
    """Return the digests of the data sets that the suite reads, and the errors of invalid ones."""
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
    """Generate demo data if the suite has any, check all data, then run every unfinished cell.

    `group` is the launched processes, of which this is rank 0; they run the cells of distributed kinds. Raise
    UserError before any cell runs for invalid data, a missing checkpoint, a folder in use by another runner,
    or a backbone that does not fit a task or its data. Raise Interrupted after a stop signal, once the
    workers have saved their state; the same call resumes.
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
        cells = expand(suite, digests)
        previews = preview_backbones(cells)
        misfits = {str(error): None for error in find_misfits(cells, previews, digests).values()}
        if misfits:
            raise UserError("\n".join(misfits))
        for cell in cells:
            view.say_assumptions(cell.backbone, previews.get(cell.dir, Preview()).assumptions)
        runner = Runner(cells, capacity, suite.threads, command, view, group)
        for cell in cells:
            invalid = "" if cell.dir in runner.results else cell.explain_rerun()
            if invalid:
                view.say(f"{cell.name} is not done: {invalid}")
        runner.run(stop)
    return [(cell, runner.results[cell.dir]) for cell in runner.cells]


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock the folder for one runner; the system releases the lock when the process ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - open while locked
    except OSError as error:
        if is_full(error):
            raise
        raise UserError(
            f"{out} cannot be written: {error}",
            expected="a folder to write to",
            fix="choose another: --out DIR",
        ) from error
    with file:
        if not try_lock(file):
            raise UserError(
                f"{out} is in use: {holder_of(file)} runs a suite there",
                expected="one runner per folder",
                fix="wait for it, stop it, or choose another folder: --out DIR",
            )
        yield


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Yield a list that collects stop signals, which do not end the process; ignored signals stay ignored."""
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
    """Generate the demo data of the suite in a worker process; existing data is kept."""
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
            f"the demo data cannot be generated: {last_lines(folder)}",
            fix=f"see the full log in {folder / LOG_FILE}",
        )


def last_lines(folder: Path, count: int = LOG_LINES) -> str:
    """Return the last lines of the log in a folder, "" if it has none."""
    try:
        lines = (folder / LOG_FILE).read_bytes()[-10_000:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join([line for line in lines if line.strip()][-count:])


class Runner:
    """Run cells whose backbone is ready in free slots until every cell has a result."""

    def __init__(
        self,
        cells: list[Cell],
        capacity: Capacity,
        threads: int,
        command: str,
        view: View,
        group: LaunchGroup | None = None,
    ):
        self.cells, self.capacity, self.threads = cells, capacity, threads
        self.command, self.view = command, view
        finished = {cell.dir: cell.result() for cell in cells}
        records = {folder: result for folder, result in finished.items() if isinstance(result, ResultRecord)}
        self.results: dict[Path, Result] = dict(records)
        self._waiting = [cell for cell in cells if cell.dir not in self.results]
        self._running: dict[Process, tuple[Cell, list[DeviceSlot]]] = {}
        self._free = list(capacity.slots)
        self._group = group

    def run(self, stop: list[int]) -> None:
        """Fill `results`. Raise Interrupted once `stop` contains a signal."""
        estimate = Estimate(self.cells, self.results, self.capacity.cells)
        self.view.begin(len(self.cells), len(self.results), estimate)
        try:
            while self._waiting or self._running:
                if stop or (self._group and self._group.asked_to_stop()):
                    raise Interrupted
                self._start_ready()  # give free slots to cells whose backbone is ready
                self._collect()  # take the results of workers that have ended
                self.view.tick()
                time.sleep(POLL_SECONDS)
        finally:
            if self._running:
                self.view.say(f"stopping: {len(self._running)} workers are saving their state")
            stop_all(self._running, stop)
            for cell, _ in self._running.values():
                # A rank may report the stop of another as a failure.
                (cell.dir / FAILURE_FILE).unlink(missing_ok=True)

    def _start_ready(self) -> None:
        for cell in list(self._waiting):
            maker = self.results.get(cell.upstream) if cell.upstream else None
            if isinstance(maker, Failure):  # no backbone, no transfer
                self._waiting.remove(cell)
                self._settle(cell, inherited(cell, maker))
            elif maker or not cell.upstream:
                slots = self._take_slots(cell)
                if not slots:
                    return  # later cells do not overtake one that needs many slots
                self._waiting.remove(cell)
                self._start(cell, slots)

    def _take_slots(self, cell: Cell) -> list[DeviceSlot]:
        """Take the slots of a cell, each on its own GPU; return none if there are not enough free now."""
        if len(self._running) >= self.capacity.cells:
            return []
        count, free = self.capacity.processes_of(cell), self._free
        if count > 1 and self._group:
            count = len(self.capacity.slots)  # launched processes use the whole machine
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
            code = process.poll()
            if code is None:
                continue
            process.kill()  # loader processes that it left
            del self._running[process]
            self._free.extend(slots)
            self._settle(cell, result_of(cell, code))

    def _settle(self, cell: Cell, result: Result) -> None:
        if isinstance(result, Failure):
            cell.dir.mkdir(parents=True, exist_ok=True)
            write_failure(result, cell.dir / FAILURE_FILE)
        self.results[cell.dir] = result
        if cell.upstream is None and isinstance(result, ResultRecord):  # known only now for weights on a hub
            self.view.say_assumptions(cell.backbone, assumptions_of(result))
        self.view.end(cell.dir, cell.name, result)


def inherited(cell: Cell, maker: Failure) -> Failure:
    """Return the failure of a cell whose backbone was not made."""
    reason = f"{NO_BACKBONE} ({cell.backbone!r}): see the reason given for it"
    return cell.failure(reason, not_installed=maker.status == "not installed")


def result_of(cell: Cell, code: int) -> Result:
    """Return the record or the failure that a worker wrote, or a failure that describes its exit code.

    If a rank died without writing a failure, another rank that lost it has written one.
    """
    result, has_words = cell.result(), code in (0, 1, -signal.SIGABRT)
    return result if isinstance(result, ResultRecord) or (result and has_words) else death_of(cell, code)


def death_of(cell: Cell, code: int) -> Failure:
    """Return the failure of a worker that died without writing one."""
    if code == INTERRUPTED:
        return cell.failure(
            "another process stopped it", "re-run the same command to resume from its saved state"
        )
    if code >= 0:
        return cell.failure(
            f"its worker ended with exit code {code}: {last_lines(cell.dir)}", f"see {cell.dir / LOG_FILE}"
        )
    name = signal.Signals(-code).name
    cause = ", most often because the system ran out of memory" if -code == signal.SIGKILL else ""
    output = f"; its last output: {last_lines(cell.dir)}" if last_lines(cell.dir) else ""
    fix = f"see {cell.dir / LOG_FILE}"
    if cause:
        fix = "use less memory: fewer concurrent cells (jobs), fewer num_workers, a smaller device_batch_size"
    return cell.failure(f"its worker was killed by {name}{cause}{output}", fix)
