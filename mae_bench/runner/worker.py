"""The worker process: runs one cell, writes its record last, or the failure that stands in the record's place."""

import fcntl
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from mae_bench.config import build, expand_variables, identity
from mae_bench.environment.provenance import git_hash, hardware, now, versions
from mae_bench.errors import Interrupted, NotInstalled, UserError
from mae_bench.files import is_full, json_digest, write_json
from mae_bench.job import EXPORT, STATES, Job, Outcome
from mae_bench.progress import EVENTS_FILE, Progress
from mae_bench.record import (
    FAILURE_FILE,
    RECORD_FILE,
    Failure,
    ResultRecord,
    write_failure,
    write_record,
)
from mae_bench.registry import Kind, load_object
from mae_bench.suite.cell import CELL_FILE, LOG_FILE, Cell

LOCK_FILE = ".lock"
LOCK_SECONDS = 0.1  # between two looks at a folder that another worker holds
RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE",
         "MASTER_ADDR", "MASTER_PORT")  # fmt: skip
INTERRUPTED = 75  # exit code of a worker that was asked to stop (EX_TEMPFAIL)


@dataclass(frozen=True)
class Order:
    """What the runner asks of a worker; it travels as `cell.json` in the cell's folder."""

    cell: Cell
    kind: Kind
    device: str
    threads: int
    command: str
    processes: int = 1

    def write(self) -> None:
        """Writes the order into the cell's folder, atomically."""
        write_json(self.cell.dir / CELL_FILE, asdict(self) | {"cell": self.cell.to_dict()})

    @classmethod
    def read(cls, folder: Path) -> "Order":
        """Reads what `write` wrote."""
        value = json.loads((folder / CELL_FILE).read_text(encoding="utf-8"))
        cell = Cell.from_dict(value["cell"] | {"dir": folder})
        return cls(**value | {"cell": cell, "kind": Kind(**value["kind"])})


def main() -> int:
    """`python -m mae_bench.runner.worker CELL_DIR`; exit code 0 done, 1 failed (failure.json says why), 75 asked to stop.

    With torchrun's variables it is one rank of several: all run the job, rank 0 alone writes progress and record.
    """
    order = Order.read(Path(sys.argv[1]))
    progress = Progress(order.cell.dir / EVENTS_FILE if is_main() else None)
    progress.stop_on_signals()
    if "WORLD_SIZE" not in os.environ:
        return run_and_report(order, lambda: work(order, progress))
    return run_and_report(order, lambda: work_together(order, progress))


def is_main() -> bool:
    """Whether this process alone writes what all ranks share; true of a worker without others."""
    return os.environ.get("RANK", "0") == "0"


def work_together(order: Order, progress: Progress) -> None:
    """The work of one rank, in the group of all."""
    from mae_bench.engine.distributed import process_group

    with process_group(order.device):
        if code := run_and_report(order, lambda: work(order, progress)):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(
                code
            )  # the others may wait for this one inside a step, and leaving the group would wait for them


def run_and_report(order: Order, act: Callable[[], None]) -> int:
    """The exit code of `act`; how it fails is written in the cell's folder."""
    try:
        act()
    except Interrupted:
        return INTERRUPTED
    except Exception as error:
        if mistake := _mistake(error, order.cell.dir):
            print(mistake, file=sys.stderr)
            _fail(order.cell, failure_of(order.cell, mistake))
        else:
            traceback.print_exc()
            _fail(
                order.cell,
                order.cell.failure(_described(error), f"its traceback is in {order.cell.dir / LOG_FILE}"),
            )
        return 1
    return 0


def _mistake(error: Exception, folder: Path) -> UserError | None:
    """What the user can mend, a full disk or device among it, wherever it was met; None for all else."""
    if isinstance(error, OSError) and is_full(error):
        return UserError(
            f"the disk is full: {error}",
            expected=f"room in {folder}",
            fix="free some and run the same command again: it goes on from the last state",
        )
    if (
        type(error).__name__ == "OutOfMemoryError"
    ):  # torch's, known by name: a failure must not wait for torch
        return UserError(
            f"the device's memory is full: {str(error).partition('. ')[0]}",
            expected="room for the model and a batch",
            fix="fewer cells at a time (jobs), a smaller device_batch_size or eval_batch_size, or end what else runs there",
        )
    return error if isinstance(error, UserError) else None


def _described(error: Exception) -> str:
    where = (
        f" (rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']})" if "WORLD_SIZE" in os.environ else ""
    )
    return f"{type(error).__name__}: {error}{where}"


def _fail(cell: Cell, failure: Failure) -> None:
    """Of several ranks the first to fail tells why: the others fail because it did."""
    if "WORLD_SIZE" not in os.environ or not (cell.dir / FAILURE_FILE).exists():
        with suppress(OSError):  # where the disk is full, what was printed has to do
            write_failure(failure, cell.dir / FAILURE_FILE)


def work(order: Order, progress: Progress) -> None:
    """Runs the order, unless it is done, and leaves its record in the cell's folder; training states go after that alone."""
    with cell_lock(order.cell.dir, progress):
        (finished,) = any_rank(is_main() and isinstance(order.cell.result(), ResultRecord))
        if finished:
            return
        record = run_order(order, progress)
        if is_main():
            write_record(record, order.cell.dir / RECORD_FILE)
            shutil.rmtree(order.cell.dir / STATES, ignore_errors=True)


@contextmanager
def cell_lock(folder: Path, progress: Progress) -> Iterator[None]:
    """The cell's folder for this worker and its ranks: one whose runner was killed may still be saving there."""
    with open(folder / LOCK_FILE, "w") as lock:
        while True:
            locked, stop = any_rank(is_main() and _try_lock(lock), progress.should_stop)
            if stop:
                raise Interrupted
            if locked:
                break
            time.sleep(LOCK_SECONDS)
        yield


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def any_rank(*facts: bool) -> list[bool]:
    """For each fact, whether it is true on any rank; without others, the facts."""
    if "WORLD_SIZE" not in os.environ:
        return list(facts)
    from mae_bench.engine.distributed import sum_over_ranks

    return [count > 0 for count in sum_over_ranks([float(fact) for fact in facts])]


def failure_of(cell: Cell, error: UserError) -> Failure:
    """The failure that a user's mistake amounts to."""
    reason = f"{error.given} (expected: {error.expected})" if error.expected else error.given
    return cell.failure(reason, error.fix, not_installed=isinstance(error, NotInstalled))


def run_order(order: Order, progress: Progress) -> ResultRecord:
    """Runs the job and puts its outcome together with what is known of cell, code and machine."""
    cell, started, code = order.cell, now(), git_hash()
    progress.stage("load")
    here = {"data": expand_variables(cell.config["data"])} if order.kind.layout else {}
    config = build(load_object(order.kind.config), cell.config | here, cell.name)
    run = load_object(order.kind.run)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(order.threads)
    source = str(cell.upstream / EXPORT) if cell.upstream else ""
    job = Job(cell.name, cell.kind, cell.config, cell.dir, cell.seed, source, order.device)
    outcome: Outcome = run(config, job, progress)
    measured: dict[str, Any] = {field.name: getattr(outcome, field.name) for field in fields(Outcome)}
    if cell.upstream and outcome.conversion_report:
        measured["conversion_report"] = outcome.conversion_report | {
            "source": f"run:{cell.backbone}"
        }  # no path of this machine
    return ResultRecord(
        **measured,
        backbone=cell.backbone,
        protocol=cell.config.get("protocol", cell.kind),
        seed=cell.seed,
        config=cell.config,
        config_digest=json_digest(identity(type(config), cell.config)),
        versions=versions(),
        git_hash=code,
        hardware=hardware()
        | {"threads": order.threads}
        | ({"processes": order.processes} if order.processes > 1 else {}),
        command=order.command,
        started=started,
        finished=now(),
    )


def environment(threads: int, visible: str | None) -> dict[str, str]:
    """The environment of a worker: threads, the GPUs that it sees ("": none, None: as here), no launcher's ranks."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in RANKS and not name.startswith("TORCHELASTIC_")
    }
    gpus = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return kept | dict.fromkeys(names, str(threads)) | gpus | {"PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    sys.exit(main())
