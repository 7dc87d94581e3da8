"""Run a suite on launched processes: rank 0 runs it, the others start their ranks of a cell on its orders."""

import json
import os
import re
import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from mae_bench.environment.provenance import visible_gpus
from mae_bench.errors import Interrupted, UserError
from mae_bench.runner.processes import (
    GRACE_SECONDS,
    POLL_SECONDS,
    Ranks,
    Worker,
    free_port,
    rank_variables,
    stop_all,
)
from mae_bench.runner.worker import INTERRUPTED

JOIN_SECONDS = 1800.0  # timeout of the rendezvous: nodes boot at different times
SHARED_SECONDS = 60.0  # until a new folder must be visible on other machines
# Keys of the store, next to those of the orders and their exit codes.
ENDED = "ended"  # rank 0 is done
ASKED = "asked"  # a rank was asked to stop


def adopt_slurm(variables: MutableMapping[str, str]) -> None:
    """Set torchrun's variables for the tasks of a Slurm step (srun), unless a launcher has set them.

    MASTER_ADDR and MASTER_PORT are kept if given; by default the port follows from the numbers of job and
    step.
    """
    size = int(variables.get("SLURM_NTASKS", "1"))
    if "WORLD_SIZE" in variables or size < 2 or "SLURM_STEP_ID" not in variables:
        return
    names = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "localhost")
    port = 20000 + (int(variables.get("SLURM_JOB_ID", "0")) * 7 + int(variables["SLURM_STEP_ID"])) % 10000
    address = variables.get("MASTER_ADDR", first_host(names))
    found = rank_variables(
        int(variables["SLURM_PROCID"]), size, int(variables["SLURM_LOCALID"]), address, port
    )
    variables.update(found | {name: variables[name] for name in ("MASTER_PORT",) if name in variables})


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: "gpu[07-09,12],big1" -> "gpu07"."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodelist)
    return "".join(part or "" for part in found.groups()) if found else nodelist


def launched() -> bool:
    """Whether torchrun or srun started this process as one of several."""
    adopt_slurm(os.environ)
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class LaunchGroup:
    """The processes of one launch, as seen by one of them.

    Ranks communicate through the launcher's key-value store, which does not block: a rank may be busy for
    hours (checking data, or a transfer that runs on rank 0 only) without a timeout.
    """

    def __init__(self) -> None:
        self._parent = os.getppid()
        self.store = _store()  # blocks until all processes have joined
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._orders = 0

    def start(self, module: str, folder: Path, device: str, threads: int) -> Ranks:
        """Start the cell in `folder` on every rank; for rank 0, once its order is written."""
        self._orders += 1
        order = {"module": module, "folder": str(folder.resolve()), "device": device, "threads": threads}
        order |= {"address": os.environ["MASTER_ADDR"], "port": free_port()}
        self.store.set(f"order/{self._orders}", json.dumps(order))
        others = [Remote(self.store, self._orders, rank) for rank in range(1, self.size)]
        return Ranks([self._own_worker(order), *others])

    def asked_to_stop(self) -> bool:
        """Whether any of the processes received a stop signal, or the launcher of this one is gone."""
        if self._orphaned():
            return True
        try:
            return bool(self.store.check([ASKED]))
        except RuntimeError:  # the process of the store is gone, so the launcher is
            return True

    def _orphaned(self) -> bool:
        """Whether the launcher is gone: torchrun dies of an unhandled SIGUSR1."""
        return os.getppid() != self._parent

    def follow(self, stop: list[int]) -> None:
        """Execute the orders of rank 0 until it has ended. Raise Interrupted if asked to stop."""
        try:
            number = 1
            while self._wait_for(f"order/{number}", stop):
                order = json.loads(self.store.get(f"order/{number}"))
                code = self._wait_for_worker(number, self._start_worker(number, order), stop)
                self.store.set(f"code/{number}/{self.rank}", str(code))
                number += 1
            self.store.add("left", 1)
        except RuntimeError as error:  # of the store, whose process is gone
            if self._orphaned():
                raise Interrupted from error
            raise UserError(
                "rank 0 has ended unexpectedly", fix="see its output; re-run the same command to resume"
            ) from error
        if stop:
            raise Interrupted

    def _wait_for(self, order: str, stop: list[int]) -> bool:
        """Wait for an order; return False if there will be none."""
        while not self.store.check([order]):
            if self._report_stop(stop) or self.store.check([ENDED]):
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _start_worker(self, number: int, order: dict[str, Any]) -> Worker:
        """Start this rank's worker for an order. Raise UserError if the folder of the cell is not visible."""
        deadline = time.monotonic() + SHARED_SECONDS
        while not os.path.isdir(order["folder"]):
            if time.monotonic() > deadline:
                self.store.set(f"code/{number}/{self.rank}", "1")
                raise UserError(
                    f"rank {self.rank} on {socket.gethostname()} does not see {order['folder']}",
                    expected="a folder on a disk shared by all machines",
                    fix="--out DIR",
                )
            time.sleep(POLL_SECONDS)
        return self._own_worker(order)

    def _wait_for_worker(self, number: int, worker: Worker, stop: list[int]) -> int:
        """Return the exit code of the worker once it has ended, by itself or on request."""
        asked = False
        try:
            while worker.poll() is None and not self.store.check([f"kill/{number}"]):
                if not asked and (self._report_stop(stop) or self.store.check([f"stop/{number}"])):
                    asked = True
                    worker.ask_to_stop()
                time.sleep(POLL_SECONDS)
        except RuntimeError:
            stop_all([worker], stop)
            raise
        code = worker.poll()
        worker.kill()
        return INTERRUPTED if code is None else code

    def _report_stop(self, stop: list[int]) -> bool:
        """Return whether this rank has to stop, and if so report it to rank 0."""
        asked = bool(stop) or self._orphaned()
        if asked:
            self.store.set(ASKED, "")
        return asked

    def _own_worker(self, order: dict[str, Any]) -> Worker:
        visible = None if order["device"] == "cuda" else ""
        variables = rank_variables(self.rank, self.size, _gpu_of_rank(), order["address"], order["port"])
        return Worker(order["module"], Path(order["folder"]), order["threads"], visible, variables)

    def dismiss(self) -> None:
        """Tell the other ranks that rank 0 is done, and wait for them: this process may own the store."""
        deadline = time.monotonic() + GRACE_SECONDS
        with suppress(RuntimeError):
            self.store.set(ENDED, "")
            while self.store.add("left", 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)


class Remote:
    """The process of another rank, seen through the store; without a store it counts as stopped."""

    def __init__(self, store: Any, number: int, rank: int):
        self._store, self._number, self._rank = store, number, rank

    def poll(self) -> int | None:
        """Return the exit code reported by its rank, None while it runs."""
        key = f"code/{self._number}/{self._rank}"
        try:
            return int(self._store.get(key)) if self._store.check([key]) else None
        except RuntimeError:
            return INTERRUPTED

    def ask_to_stop(self) -> None:
        """Let its rank send it SIGTERM."""
        with suppress(RuntimeError):
            self._store.set(f"stop/{self._number}", "")

    def kill(self) -> None:
        """Let its rank kill it."""
        with suppress(RuntimeError):
            self._store.set(f"kill/{self._number}", "")


def _gpu_of_rank() -> int:
    """Return the index of this rank's GPU among those visible: 0 if each rank sees only its own."""
    return 0 if _sees_only_its_gpu() else int(os.environ["LOCAL_RANK"])


def _sees_only_its_gpu() -> bool:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return bool(chosen) and "," not in chosen


def check_gpus() -> None:
    """Raise UserError if more ranks were started on this machine than it has GPUs."""
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), visible_gpus()
    if ranks > len(gpus) and not _sees_only_its_gpu():
        raise UserError(
            f"{ranks} processes on a machine with {len(gpus)} GPUs",
            expected="one process per GPU",
            fix=f"--nproc-per-node {len(gpus)}",
        )


def _store() -> Any:
    from torch.distributed.rendezvous import rendezvous

    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise UserError(
            f"WORLD_SIZE is set, but {', '.join(absent)} is not",
            expected="the variables that torchrun sets",
            fix="start it with torchrun or srun, or unset WORLD_SIZE",
        )
    try:
        return next(rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))[0]
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the processes cannot connect to {place}: {str(error).splitlines()[0]}",
            fix="choose another port: MASTER_PORT, or --master-port of torchrun",
        ) from error
