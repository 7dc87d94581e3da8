"""A toy training run for tests, in this process or, run as a script, in several."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mae_bench.config import TrainConfig
from mae_bench.data.batches.loader import Batch, TrainingOrder
from mae_bench.data.sets.source import BadImages
from mae_bench.engine import parallel
from mae_bench.engine.distributed import gather_over_ranks, process_group, world
from mae_bench.engine.optim import adamw_builder, pretrain_no_decay
from mae_bench.engine.trainer import Trainer
from mae_bench.errors import Interrupted, UserError
from mae_bench.job import Job
from mae_bench.progress import Progress

CONFIG = {
    "kind": "test",
    "protocol": "test",
    "data": "",
    "epochs": 3,
    "warmup_epochs": 1,
    "base_lr": 0.32,
    "global_batch_size": 8,
    "checkpoint_seconds": 0,
}
NUM_IMAGES = 37
STEPS_PER_EPOCH = NUM_IMAGES // 8


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.fc, self.drop = nn.Linear(16, 16), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(F.gelu(self.fc(x)))


class Net(nn.Module):
    """Blocks between two linear layers; `statistics` adds a BatchNorm, whose buffers differ per process."""

    def __init__(self, dropout: float = 0.0, statistics: bool = False, classes: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 16)
        self.blocks = nn.Sequential(Block(dropout), Block(dropout))
        self.norm = nn.BatchNorm1d(16) if statistics else nn.Identity()
        self.head = nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.blocks(self.stem(x))))
        return out


def pixels(index: torch.Tensor) -> torch.Tensor:
    """The `image` of an index (N,) -> (N, 6)."""
    return torch.sin(index[:, None] * torch.arange(1.0, 7.0))


class Run:
    """One training run; `seen` lists (step, start, indices) of the micro-batches of this process.

    stop_at, crash_at, kill_at: the step in which the process `on` gets SIGTERM, a RuntimeError, SIGKILL.
    poison, overflow: the step with a NaN loss, or with one infinite gradient value.
    narrow: gather weights in bfloat16 on the CPU too.
    in_parts: let the loader yield micro-batches, not whole batches.
    dtype: of the weights and the pixels.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dropout: float = 0.5,
        statistics: bool = False,
        classes: int = 3,
        ema: bool = True,
        hook_epochs: float | None = None,
        bad: int = 0,
        narrow: bool = False,
        in_parts: bool = False,
        dtype: str = "float32",
        **changes: Any,
    ):
        folder.mkdir(exist_ok=True)
        self.faults = {
            key: changes.pop(key, None)
            for key in ("stop_at", "crash_at", "kill_at", "poison", "overflow", "on")
        }
        config = TrainConfig(**{**CONFIG, **changes})  # type: ignore[arg-type]
        self.progress, self.bad = Progress(folder / "events.jsonl" if world().is_main else None), bad
        self.progress.stop_on_signals()
        self.order = TrainingOrder(NUM_IMAGES, config.global_batch_size, 5, world().rank, world().size)
        self.seen: list[tuple[int, int, list[int]]] = []
        self.hooked: list[int] = []
        self.in_parts, self.dtype = in_parts, getattr(torch, dtype)
        self.meets: list[bool] = []  # of each micro-batch, whether copies exchange its gradients
        if narrow:
            parallel.NARROW_DEVICES.add("cpu")
        self.trainer = Trainer(
            Job("test", "test", {}, folder, seed=5),
            config,
            Net(dropout, statistics, classes).to(self.dtype),
            adamw_builder(config, pretrain_no_decay),
            self.order.steps_per_epoch,
            self.progress,
            BadImages(0.1, 100),
            ema_decay=0.9 if ema else None,
        )
        if self.faults["overflow"] is not None:
            self.overflow()
        if hook_epochs:
            self.trainer.every_epochs(hook_epochs, lambda model, step: self.hooked.append(step))

    def fit(self) -> Trainer:
        """Train to the end."""
        self.trainer.fit(self.batches, self.loss)
        return self.trainer

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield batches like the loader."""
        order = replace(self.order, sizes=self.trainer.accumulation.sizes if self.in_parts else ())
        count = max(1, len(order.sizes))
        for number, items in enumerate(order.batches(start, stop)):
            step = start + number // count
            indices = torch.tensor([index for _, index, _ in items])
            bad = [(f"bad {step} {world().rank}", "broken")] if step < self.bad else []
            yield Batch(pixels(indices).to(self.dtype), indices % 3, indices, bad, start=items[0][2])

    def loss(self, model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
        """Return the cross-entropy, and trigger the requested faults."""
        self.seen.append((step, batch.start, batch.indices.tolist()))
        self.meets.append(getattr(model, "require_backward_grad_sync", True))
        if world().rank == (self.faults["on"] or 0):
            if step == self.faults["stop_at"]:
                os.kill(os.getpid(), signal.SIGTERM)
            if step == self.faults["crash_at"]:
                raise RuntimeError("crash")
            if step == self.faults["kill_at"]:
                os.kill(os.getpid(), signal.SIGKILL)
        loss = F.cross_entropy(model(batch.imgs), batch.targets)
        return (
            loss * float("nan")
            if step == self.faults["poison"] and world().rank == (self.faults["on"] or 0)
            else loss
        )

    def overflows(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient; at the step of the fault its first value is infinite on one process."""
        if self.trainer.step == self.faults["overflow"] and world().rank == self.faults["on"]:
            parallel.local_tensor(gradient).view(-1)[0] = float("inf")
        return gradient

    def overflow(self) -> None:
        """Make a gradient overflow on one process only: in its copy before the sum, or in its shard."""
        weight, scaler = self.trainer.model.get_parameter("head.weight"), self.trainer.scaler
        unscale = scaler.unscale_

        def unscale_with_overflow(optimizer: torch.optim.Optimizer) -> None:
            assert weight.grad is not None
            self.overflows(weight.grad)
            unscale(optimizer)

        if self.trainer.config.parallel == "ddp":
            weight.register_hook(lambda gradient: self.overflows(gradient.clone()))
        else:
            scaler.unscale_ = unscale_with_overflow  # type: ignore[method-assign]


@contextmanager
def signals_restored() -> Iterator[None]:
    """Restore the signal handlers."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(folder: Path, **changes: Any) -> Trainer:
    """Run a training in this process to its end."""
    with signals_restored():
        return Run(folder, **changes).fit()


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return all trained and averaged weights."""
    own = trainer.parallel.gather_model().state_dict()
    return {**own, **{f"full.{name}": tensor for name, tensor in trainer.full_model().state_dict().items()}}


def outcome(run: Run) -> dict[str, Any]:
    """Train and return the outcome of this process."""
    try:
        run.fit()
        ended = "done"
    except (UserError, Interrupted) as error:
        ended = f"{type(error).__name__}: {error}"
    return {
        "ended": ended,
        "step": run.trainer.step,
        "seen": run.seen,
        "hooked": run.hooked,
        "loss": run.trainer.final_loss,
        "bad": sorted(run.trainer.bad_images.names),
        "meets": run.meets,
        "scale": run.trainer.scaler.get_scale(),
    }


def main() -> None:
    """Train every run of a JSON file {name: settings}, in the group that torchrun's variables describe.

    Results are saved next to it: {name: {"ranks": [outcome], "weights": whole weights}}.
    """
    path = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.compile = partial(torch.compile, backend="eager")  # tests what is compiled; inductor is slow
    results = {}
    with process_group("cpu"):
        for name, settings in json.loads(path.read_text()).items():
            settings["folder"] = Path(settings["folder"])
            run = Run(**settings)
            everyone = gather_over_ranks(outcome(run))
            results[name] = {"ranks": everyone, "weights": weights(run.trainer)}
            if world().is_main:
                torch.save(results, path.with_suffix(".pt"))


if __name__ == "__main__":
    main()
