"""Processes that train one model together: who this one is, and the few things that all of them must agree on."""

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
PATIENCE = timedelta(
    hours=12
)  # with one that still fetches or unpacks its machine's images; of one that dies the launcher hears


@dataclass(frozen=True)
class World:
    """This process among `size` of them; `local_rank` counts those of its machine and is the number of its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process alone writes what all share: record, log, export."""
        return self.rank == 0


def world() -> World:
    """This process's place; alone, unless `process_group` is open."""
    if not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))


@contextmanager
def process_group(device: str) -> Iterator[World]:
    """Opens the group that torchrun's variables describe; without them, the world is this process alone.

    CPU tensors travel by gloo and CUDA tensors by NCCL in the same group, so that agreeing on a number never waits for a GPU.
    """
    if "WORLD_SIZE" not in os.environ:
        yield World()
        return
    if absent := [name for name in VARIABLES if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is set, but {', '.join(absent)} is not", expected="the variables that torchrun sets"
        )
    cuda = device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """The sums of each value over all processes, in float64; sums of integers are exact."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def gather_over_ranks(value: Any) -> list[Any]:
    """Every process's value, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


class Agreement:
    """Numbers that all processes see alike, one call late, so that none waits: a signal reaches one process before the others."""

    def __init__(self) -> None:
        self._offered: tuple[torch.Tensor, Any] | None = None

    def exchange(self, values: Sequence[float]) -> list[float]:
        """Offers this process's values; returns the sums of those offered a call ago. Alone: these themselves."""
        if not dist.is_initialized():
            return list(values)
        agreed = self.settle() or [0.0] * len(values)
        offer = torch.tensor(values, dtype=torch.float64)
        self._offered = (offer, dist.all_reduce(offer, async_op=True))
        return agreed

    def settle(self) -> list[float]:
        """The sums of the last offer, if it was not taken up yet."""
        if self._offered is None:
            return []
        offer, work = self._offered
        self._offered = None
        work.wait()
        return offer.tolist()
