"""What a launcher started: rank 0 runs the suite, the other ranks start their part of a cell when it asks for it."""

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

JOIN_SECONDS = 1800.0  # that the processes have to find one another: nodes boot at different times
SHARED_SECONDS = 60.0  # that a new folder may take to be seen on another machine
ENDED = "ended"  # keys of the store: rank 0 is done; a rank was asked to stop; the orders, and what becomes of each
ASKED = "asked"


def adopt_slurm(variables: MutableMapping[str, str]) -> None:
    """Gives the tasks of a Slurm step (srun) torchrun's variables; a step of one task, and any other launcher, stay as they are.

    MASTER_ADDR and MASTER_PORT that are given stand: the port follows from the job's and the step's number.
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
    """The first name of a list as Slurm writes it: "gpu[07-09,12],big1" -> "gpu07"."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodelist)
    return "".join(part or "" for part in found.groups()) if found else nodelist


def launched() -> bool:
    """Whether torchrun, or srun, started this process together with others."""
    adopt_slurm(os.environ)
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class LaunchGroup:
    """The processes of one launch, seen from one of them; they speak through the launcher's store, which waits for nobody.

    So a rank may be busy for hours - data that is checked, a transfer that runs on rank 0 alone - and no time runs out.
    """

    def __init__(self) -> None:
        self.store = _store()  # waits for all
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._parent = os.getppid()
        self._orders = 0

    def start(self, module: str, folder: Path, device: str, threads: int) -> Ranks:
        """Starts the cell in `folder` on every rank; for rank 0, after the cell's order is written."""
        self._orders += 1
        order = {"module": module, "folder": str(folder.resolve()), "device": device, "threads": threads}
        order |= {"address": os.environ["MASTER_ADDR"], "port": free_port()}
        self.store.set(f"order/{self._orders}", json.dumps(order))
        others = [Remote(self.store, self._orders, rank) for rank in range(1, self.size)]
        return Ranks([self._own_worker(order), *others])

    def asked_to_stop(self) -> bool:
        """Whether a signal reached any of the processes, or this one's launcher is gone."""
        if self._orphaned():
            return True
        try:
            return bool(self.store.check([ASKED]))
        except RuntimeError:  # the store's process is gone, and so is the launcher
            return True

    def _orphaned(self) -> bool:
        """Whether the launcher is gone: torchrun dies of a SIGUSR1 that it was not told to handle."""
        return os.getppid() != self._parent

    def follow(self, stop: list[int]) -> None:
        """What a rank does that is not 0: it starts its part of each order, until rank 0 has ended. Interrupted if asked to."""
        try:
            number = 1
            while self._wait_for(f"order/{number}", stop):
                order = json.loads(self.store.get(f"order/{number}"))
                self.store.set(
                    f"code/{number}/{self.rank}",
                    str(self._obey(number, self._worker_of(number, order), stop)),
                )
                number += 1
            self.store.add("left", 1)
        except RuntimeError as error:  # the store's own, whose process is gone
            if self._orphaned():
                raise Interrupted from error
            raise UserError(
                "rank 0 has ended without a word", fix="look at what it printed; the same command goes on"
            ) from error
        if stop:
            raise Interrupted

    def _wait_for(self, order: str, stop: list[int]) -> bool:
        """True once the order is there, False when there will be none."""
        while not self.store.check([order]):
            if self._pass_on(stop) or self.store.check([ENDED]):
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _worker_of(self, number: int, order: dict[str, Any]) -> Worker:
        """This rank's worker for rank 0's order; UserError where it does not see the folder that rank 0 has made."""
        deadline = time.monotonic() + SHARED_SECONDS
        while not os.path.isdir(order["folder"]):
            if time.monotonic() > deadline:
                self.store.set(f"code/{number}/{self.rank}", "1")
                raise UserError(
                    f"rank {self.rank} on {socket.gethostname()} does not see {order['folder']}",
                    expected="a folder on a disk that all machines share", fix="--out DIR",
                )  # fmt: skip
            time.sleep(POLL_SECONDS)
        return self._own_worker(order)

    def _obey(self, number: int, worker: Worker, stop: list[int]) -> int:
        """Its exit code once it has ended, by itself or because it has to."""
        asked = False
        try:
            while worker.poll() is None and not self.store.check([f"kill/{number}"]):
                if not asked and (self._pass_on(stop) or self.store.check([f"stop/{number}"])):
                    asked = True
                    worker.ask_to_stop()
                time.sleep(POLL_SECONDS)
        except RuntimeError:
            stop_all([worker], stop)
            raise
        code = worker.poll()
        worker.kill()
        return INTERRUPTED if code is None else code

    def _pass_on(self, stop: list[int]) -> bool:
        """Whether this rank has to stop; rank 0 learns it."""
        if asked := bool(stop) or self._orphaned():
            self.store.set(ASKED, "")
        return asked

    def _own_worker(self, order: dict[str, Any]) -> Worker:
        visible = None if order["device"] == "cuda" else ""
        variables = rank_variables(self.rank, self.size, _gpu_of_rank(), order["address"], order["port"])
        return Worker(order["module"], Path(order["folder"]), order["threads"], visible, variables)

    def dismiss(self) -> None:
        """Rank 0's last word; it waits until the others have heard it, for its process may hold the store."""
        deadline = time.monotonic() + GRACE_SECONDS
        with suppress(RuntimeError):
            self.store.set(ENDED, "")
            while self.store.add("left", 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)


class Remote:
    """Another rank's process, as rank 0 sees it through the store; without a store it counts as stopped."""

    def __init__(self, store: Any, number: int, rank: int):
        self._store, self._number, self._rank = store, number, rank

    def poll(self) -> int | None:
        """The exit code that its rank has told."""
        key = f"code/{self._number}/{self._rank}"
        try:
            return int(self._store.get(key)) if self._store.check([key]) else None
        except RuntimeError:
            return INTERRUPTED

    def ask_to_stop(self) -> None:
        """Its rank sends it SIGTERM."""
        with suppress(RuntimeError):
            self._store.set(f"stop/{self._number}", "")

    def kill(self) -> None:
        """Its rank kills it."""
        with suppress(RuntimeError):
            self._store.set(f"kill/{self._number}", "")


def _gpu_of_rank() -> int:
    """The number of this rank's GPU among those that it sees: 0 where the launcher shows each rank its own alone."""
    return 0 if _sees_its_own_alone() else int(os.environ["LOCAL_RANK"])


def _sees_its_own_alone() -> bool:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return bool(chosen) and "," not in chosen


def check_gpus() -> None:
    """UserError when more ranks were started on this machine than it has GPUs."""
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), visible_gpus()
    if ranks > len(gpus) and not _sees_its_own_alone():
        raise UserError(f"{ranks} processes on a machine with {len(gpus)} GPUs", expected="one process a GPU",
                        fix=f"--nproc-per-node {len(gpus)}")  # fmt: skip


def _store() -> Any:
    from torch.distributed import rendezvous

    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise UserError(f"WORLD_SIZE is set, but {', '.join(absent)} is not", expected="the variables that torchrun sets",
                        fix="start it by torchrun or srun, or unset WORLD_SIZE")  # fmt: skip
    try:
        return next(rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS)))[0]
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the processes cannot meet at {place}: {str(error).splitlines()[0]}",
                        fix="give another port: MASTER_PORT, or --master-port of torchrun") from error  # fmt: skip
