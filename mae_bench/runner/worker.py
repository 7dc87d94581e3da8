"""The worker process: run one cell, then write its record, or its failure instead."""

import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mae_bench.config import build, expand_variables, identity
from mae_bench.environment.code import digest_kind
from mae_bench.environment.provenance import git_hash, hardware, now, versions
from mae_bench.errors import Interrupted, NotInstalled, UserError
from mae_bench.files import file_digest, is_full, json_digest, write_json
from mae_bench.job import EXPORT, STATES, Job, Outcome
from mae_bench.locks import holder_of, try_lock
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
from mae_bench.runner.fitting import fit_to_backbone, read_exported_spec
from mae_bench.seal import read_sealed_json, seal_json, sync_folder
from mae_bench.suite.cell import CELL_FILE, LOG_FILE, Cell

LOCK_FILE = ".lock"
LOCK_SECONDS = 0.1  # between two attempts to lock a folder
LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
INTERRUPTED = 75  # exit code of a worker that was asked to stop (EX_TEMPFAIL)


@dataclass(frozen=True)
class Order:
    """The order of the runner to a worker, written as `cell.json` to the folder of the cell."""

    cell: Cell
    kind: Kind
    device: str
    threads: int
    command: str
    processes: int = 1

    def write(self) -> None:
        """Write the order to the folder of the cell, atomically."""
        write_json(self.cell.dir / CELL_FILE, seal_json(asdict(self) | {"cell": self.cell.to_dict()}))

    @classmethod
    def read(cls, folder: Path) -> "Order":
        """Read an order from the folder of its cell."""
        value = read_sealed_json(folder / CELL_FILE, fix="re-run mae-bench run, which writes it again")
        cell = Cell.from_dict(value["cell"] | {"dir": folder})
        return cls(**value | {"cell": cell, "kind": Kind(**value["kind"])})


def main() -> int:
    """Run the cell in the folder given. Exit code: 0 done, 1 failed (see failure.json), 75 stopped.

    With the environment variables of torchrun it is one of several ranks: all run the job, and only rank 0
    writes progress and record.
    """
    order = Order.read(Path(sys.argv[1]))
    progress = Progress(order.cell.dir / EVENTS_FILE if is_main() else None)
    progress.stop_on_signals()
    if "WORLD_SIZE" not in os.environ:
        return run_and_report(order, lambda: work(order, progress))
    return run_and_report(order, lambda: work_together(order, progress))


def is_main() -> bool:
    """Whether this process writes the files that all ranks share: rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def work_together(order: Order, progress: Progress) -> None:
    """Run the order as one rank of a process group."""
    from mae_bench.engine.distributed import process_group

    with process_group(order.device):
        code = run_and_report(order, lambda: work(order, progress))
        if code:
            sys.stdout.flush()
            sys.stderr.flush()
            # Other ranks may wait for this one in a collective, and leaving the group would wait for them.
            os._exit(code)


def run_and_report(order: Order, act: Callable[[], None]) -> int:
    """Call `act` and return its exit code; write how it fails to the folder of the cell."""
    try:
        act()
    except Interrupted:
        return INTERRUPTED
    except Exception as error:
        user_error = _as_user_error(error, order.cell.dir)
        if user_error:
            print(user_error, file=sys.stderr)
            failure = failure_of(order.cell, user_error)
        else:
            traceback.print_exc()
            failure = order.cell.failure(_describe(error), f"its traceback is in {order.cell.dir / LOG_FILE}")
        _write_failure(order.cell, failure)
        return 1
    return 0


def _as_user_error(error: Exception, folder: Path) -> UserError | None:
    """Return an error the user can fix, which includes a full disk or device; None for any other."""
    if isinstance(error, OSError) and is_full(error):
        return UserError(
            f"the disk is full: {error}",
            expected=f"free space for {folder}",
            fix="free some space and re-run the same command to resume from the last state",
        )
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name, because torch may not be imported
        return UserError(
            f"the device's memory is full: {str(error).partition('. ')[0]}",
            expected="memory for the model and a batch",
            fix="run fewer cells at a time (jobs), reduce device_batch_size or eval_batch_size",
        )
    return error if isinstance(error, UserError) else None


def _describe(error: Exception) -> str:
    rank = ""
    if "WORLD_SIZE" in os.environ:
        rank = f" (rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']})"
    return f"{type(error).__name__}: {error}{rank}"


def _write_failure(cell: Cell, failure: Failure) -> None:
    """Write the failure. Only the first rank to fail writes: the others fail as a consequence."""
    if "WORLD_SIZE" not in os.environ or not (cell.dir / FAILURE_FILE).exists():
        with suppress(OSError):  # on a full disk the log has to suffice
            write_failure(failure, cell.dir / FAILURE_FILE)


def work(order: Order, progress: Progress) -> None:
    """Run the order unless it is done, write its record, then remove its training states."""
    with cell_lock(order.cell.dir, progress):
        (finished,) = any_rank(is_main() and isinstance(order.cell.result(), ResultRecord))
        if finished:
            return
        record = run_order(order, progress)
        if is_main():
            digests = digest_artefacts(order.cell.dir, record.artefacts)
            write_record(replace(record, artefact_digests=digests), order.cell.dir / RECORD_FILE)
            sync_folder(order.cell.dir)  # the record must not be lost after the states are gone
            shutil.rmtree(order.cell.dir / STATES, ignore_errors=True)


@contextmanager
def cell_lock(folder: Path, progress: Progress) -> Iterator[None]:
    """Lock the folder of a cell: a worker whose runner was killed may still be saving its state there."""
    with open(folder / LOCK_FILE, "a+", encoding="utf-8") as lock:
        told = False
        while True:
            locked, stop = any_rank(is_main() and try_lock(lock), progress.should_stop)
            if stop:
                raise Interrupted
            if locked:
                break
            if not told:
                progress.note(f"waiting for {holder_of(lock)}, which holds {folder}")
                told = True
            time.sleep(LOCK_SECONDS)
        yield


def any_rank(*facts: bool) -> list[bool]:
    """Return for each fact whether it is true on any rank."""
    if "WORLD_SIZE" not in os.environ:
        return list(facts)
    from mae_bench.engine.distributed import sum_over_ranks

    return [count > 0 for count in sum_over_ranks([float(fact) for fact in facts])]


def failure_of(cell: Cell, error: UserError) -> Failure:
    """Return the failure for an error the user can fix."""
    fix = error.fix
    if cell.upstream and str(cell.upstream / EXPORT) in error.given:  # it is damaged or was removed
        fix = f"restore it from a copy, or remove {cell.upstream} to make the backbone again"
    return cell.failure(error.reason, fix, not_installed=isinstance(error, NotInstalled))


def run_order(order: Order, progress: Progress) -> ResultRecord:
    """Run the job and return its record: the outcome, and what is known about cell, code and machine."""
    cell, started, code = order.cell, now(), git_hash()
    progress.stage("load")
    here = {"data": expand_variables(cell.config["data"])} if order.kind.layout else {}
    config = build(load_object(order.kind.config), cell.config | here, cell.name)
    code_digest = digest_kind(order.kind)
    fitted = _fit(order, config)
    used, notes = cell.config | _changes(config, fitted), _describe_fit(config, fitted)
    run = load_object(order.kind.run)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(order.threads)
    source = str(cell.upstream / EXPORT) if cell.upstream else ""
    others = tuple(cell.find_others())
    job = Job(cell.name, cell.kind, used, cell.dir, cell.seed, source, order.device, others)
    outcome: Outcome = run(fitted, job, progress)
    measured: dict[str, Any] = {field.name: getattr(outcome, field.name) for field in fields(Outcome)}
    measured["notes"] = [*notes, *outcome.notes]
    if cell.upstream and outcome.conversion_report:
        source = f"run:{cell.backbone}"  # not a path of this machine
        measured["conversion_report"] = outcome.conversion_report | {"source": source}
    return ResultRecord(
        **measured,
        backbone=cell.backbone,
        protocol=cell.config.get("protocol", cell.kind),
        seed=cell.seed,
        config=used,
        config_digest=json_digest(identity(type(config), used)),
        protocol_version=order.kind.version,
        code_digest=code_digest,
        versions=versions(),
        git_hash=code,
        hardware=hardware()
        | {"threads": order.threads}
        | ({"processes": order.processes} if order.processes > 1 else {}),
        command=order.command,
        started=started,
        finished=now(),
    )


def digest_artefacts(folder: Path, artefacts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return SHA-256 and number of bytes of each file of the artefacts, by its name.

    The files of a folder are named NAME/PATH. An artefact that is missing has no digest.
    """
    digests = {}
    for name, place in artefacts.items():
        path = folder / place
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file():
                key = "/".join((name, *file.relative_to(path).parts))
                digests[key] = {"sha256": file_digest(file), "bytes": file.stat().st_size}
    return digests


def _fit(order: Order, config: Any) -> Any:
    """Return the config with the values that depend on the backbone of a transfer."""
    spec = read_exported_spec(order.cell.upstream) if order.cell.upstream else None
    return fit_to_backbone(order.kind, config, spec) if spec else config


def _changes(config: Any, fitted: Any) -> dict[str, Any]:
    """Return the values of `fitted` that are not those of `config`, as JSON types."""
    if fitted is config:
        return {}
    before = config.model_dump(mode="json")
    return {key: value for key, value in fitted.model_dump(mode="json").items() if value != before[key]}


def _describe_fit(config: Any, fitted: Any) -> list[str]:
    """Return a note for each value that depends on the backbone."""
    return [
        f"{key}={getattr(config, key)} is {value} for this backbone"
        for key, value in _changes(config, fitted).items()
    ]


def environment(threads: int, visible: str | None) -> dict[str, str]:
    """Return a worker's environment: threads, visible GPUs ("": none, None: unchanged), no launcher."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith("TORCHELASTIC_")
    }
    gpus = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return kept | dict.fromkeys(names, str(threads)) | gpus | {"PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    sys.exit(main())
