"""Processes that train one model together: rank and world size, and reductions over all ranks."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mae_bench.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# A rank may wait this long for one that still downloads or unpacks images. The launcher notices ranks that
# die
TIMEOUT = timedelta(hours=12)


@dataclass(frozen=True)
class World:
    """This process among `size`; `local_rank` counts within the machine and is the index of its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes the shared files: record, log, export."""
        return self.rank == 0


def world() -> World:
    """Return rank and size of the open `process_group`, or a world of one process."""
    if not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))


@contextmanager
def process_group(device: str) -> Iterator[World]:
    """Open the process group described by torchrun's variables; without them, a world of one process.

    CPU tensors use gloo and CUDA tensors NCCL in the same group, so that exchanging a number never waits
    for a GPU.

    Raise UserError if only some of the variables are set.
    """
    if "WORLD_SIZE" not in os.environ:
        yield World()
        return
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is set, but {', '.join(missing)} is not", expected="the variables that torchrun sets"
        )
    cuda = device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Return the sum of each value over all processes, in float64 (exact for integers)."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gather_over_ranks(value: Any) -> list[Any]:
    """Return the values of all processes, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


class Agreement:
    """Sums over all processes, available one call later so that no process waits.

    Used for decisions that all processes must take at the same step, such as stopping after a signal that
    reaches one process before the others.
    """

    def __init__(self) -> None:
        self._pending: tuple[torch.Tensor, Any] | None = None

    def exchange(self, values: Sequence[float]) -> list[float]:
        """Submit values and return the sums of the previous call; with one process, the values."""
        if not dist.is_initialized():
            return list(values)
        sums = self.settle() or [0.0] * len(values)
        pending = torch.tensor(values, dtype=torch.float64)
        self._pending = (pending, dist.all_reduce(pending, async_op=True))
        return sums

    def settle(self) -> list[float]:
        """Return the sums of the last submission if they were not returned yet, else an empty list."""
        if self._pending is None:
            return []
        pending, work = self._pending
        self._pending = None
        work.wait()
        return pending.tolist()
