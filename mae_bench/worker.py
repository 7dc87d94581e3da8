"""The worker process: runs one cell, writes its record last, or the failure that stands in the record's place."""

import fcntl
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mae_bench.cell import CELL_FILE, LOG_FILE, Cell
from mae_bench.config import build, expand_variables
from mae_bench.digest import json_digest
from mae_bench.errors import Interrupted, NotInstalled, UserError
from mae_bench.files import write_json
from mae_bench.job import EXPORT, Job, Outcome
from mae_bench.progress import EVENTS_FILE, Progress
from mae_bench.provenance import git_hash, hardware, now, versions
from mae_bench.record import FAILURE_FILE, NOT_THE_METHOD, RECORD_FILE, Failure, ResultRecord, write_failure, write_record
from mae_bench.registry import Kind, load_object

LOCK_FILE = ".lock"
INTERRUPTED = 75  # exit code of a worker that was asked to stop (EX_TEMPFAIL)


@dataclass(frozen=True)
class Order:
    """What the runner asks of a worker; it travels as `cell.json` in the cell's folder."""

    cell: Cell
    kind: Kind
    device: str
    threads: int
    command: str

    def write(self) -> None:
        """Writes the order into the cell's folder, atomically."""
        write_json(self.cell.dir / CELL_FILE, json.loads(json.dumps(asdict(self), default=str)))

    @classmethod
    def read(cls, folder: Path) -> "Order":
        """Reads what `write` wrote."""
        value = json.loads((folder / CELL_FILE).read_text(encoding="utf-8"))
        cell = value["cell"]
        upstream = Path(cell["upstream"]) if cell["upstream"] else None
        return cls(
            **value | {"cell": Cell(**cell | {"dir": folder, "upstream": upstream}), "kind": Kind(**value["kind"])}
        )  # fmt: skip


def main() -> int:
    """`python -m mae_bench.worker CELL_DIR`; exit code 0 done, 1 failed (failure.json says why), 75 asked to stop."""
    order = Order.read(Path(sys.argv[1]))
    progress = Progress(order.cell.dir / EVENTS_FILE)
    progress.stop_on_signals()
    with open(order.cell.dir / LOCK_FILE, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a worker whose runner was killed may still be saving here, or have finished
        return 0 if isinstance(order.cell.result(), ResultRecord) else work(order, progress)


def work(order: Order, progress: Progress) -> int:
    """Runs the order and leaves record or failure in the cell's folder; returns the exit code."""
    try:
        write_record(run_order(order, progress), order.cell.dir / RECORD_FILE)
    except Interrupted:
        return INTERRUPTED
    except UserError as error:
        print(error, file=sys.stderr)
        return _fail(order, failure_of(order.cell, error))
    except Exception as error:
        _fail(order, order.cell.failure(f"{type(error).__name__}: {error}", f"its traceback is in {order.cell.dir / LOG_FILE}"))
        raise
    return 0


def _fail(order: Order, failure: Failure) -> int:
    write_failure(failure, order.cell.dir / FAILURE_FILE)
    return 1


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
    parts: dict[str, Any] = {name: getattr(outcome, name) for name in Outcome.__dataclass_fields__}
    if cell.upstream and outcome.conversion_report:
        parts["conversion_report"] = outcome.conversion_report | {"source": f"run:{cell.backbone}"}  # no path of this machine
    return ResultRecord(
        **parts,
        backbone=cell.backbone,
        protocol=cell.config.get("protocol", cell.kind),
        seed=cell.seed,
        config=cell.config,
        config_digest=json_digest({key: value for key, value in cell.config.items() if key not in NOT_THE_METHOD}),
        versions=versions(),
        git_hash=code,
        hardware=hardware() | {"threads": order.threads},
        command=order.command,
        started=started,
        finished=now(),
    )


def environment(threads: int, visible_device: str) -> dict[str, str]:
    """The environment of a worker: its number of threads and, the one GPU that it sees ("": none)."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    return os.environ | dict.fromkeys(names, str(threads)) | {"CUDA_VISIBLE_DEVICES": visible_device, "PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    sys.exit(main())
