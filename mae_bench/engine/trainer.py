"""The training loop: schedule, accumulation, mixed precision, EMA, exact resume, and a stop at a loss that is not finite."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mae_bench.config import TrainConfig
from mae_bench.data.batches.loader import Batch
from mae_bench.data.seeds import derive_seed, seed_everything
from mae_bench.data.sets.source import BadImages
from mae_bench.engine.accumulation import accumulation
from mae_bench.engine.checkpoint import Checkpoints, Shapes, Tensors
from mae_bench.engine.distributed import Agreement, gather_over_ranks, sum_over_ranks, world
from mae_bench.engine.ema import Ema
from mae_bench.engine.meters import Meters
from mae_bench.engine.optim import allocate_optimizer_tensors, optimizer_tensors
from mae_bench.engine.parallel import Parallel, local_tensor, whole_tensor
from mae_bench.engine.precision import autocast, deterministic, grad_scaler
from mae_bench.engine.schedule import absolute_lr, cosine_lr
from mae_bench.engine.trackers import Log, Tracker, open_trackers, require_trackers
from mae_bench.errors import UserError
from mae_bench.job import STATES, Job
from mae_bench.progress import Progress

LOSSES_HELD = 20  # steps between two reads of the losses on a GPU: each read waits for the device

BatchLoss = Callable[[nn.Module, Batch, int], torch.Tensor]
Hook = Callable[[nn.Module, int], None]


class BatchesEnded(RuntimeError):
    """The batches ended before the training did: a fault of whoever feeds it."""


@dataclass(frozen=True)
class Due:
    """What all processes do after the same step."""

    stop: bool
    save: bool
    trouble: bool


class Trainer:
    """Trains `model` for config.epochs on batches that depend on the step alone, so that a resumed run equals an uninterrupted
    one.

    All randomness of step s (drop path, mixup, noise) follows from derive_seed(seed, s): no generator state has to be saved.
    `make_optimizer(model)` is called once the model's weights are where they stay: on one device, copied or sharded.
    multiple_of: see `accumulation`; flops_per_image: see `Meters`.
    """

    def __init__(
        self,
        job: Job,
        config: TrainConfig,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        steps_per_epoch: int,
        progress: Progress,
        bad_images: BadImages,
        *,
        ema_decay: float | None = None,
        multiple_of: int = 1,
        flops_per_image: float | None = None,
    ):
        require_trackers(config.trackers)
        self.job, self.config, self.progress, self.bad_images = job, config, progress, bad_images
        self.device = torch.device(job.device)
        self.accumulation = accumulation(
            config.global_batch_size, world().size, config.device_batch_size, multiple_of
        )
        self.steps_per_epoch, self.total_steps = steps_per_epoch, math.ceil(config.epochs * steps_per_epoch)
        self.lr = absolute_lr(config.base_lr, config.global_batch_size)
        self.parallel = Parallel(model, config, self.device, other_weights=ema_decay is not None)
        self.model = self.parallel.model
        self.optimizer = make_optimizer(self.model)
        self.scaler = grad_scaler(self.device, config.amp_dtype)
        self.ema = Ema(self.model, ema_decay) if ema_decay else None
        self.meters = Meters(self.device, config.amp_dtype, config.global_batch_size, flops_per_image)
        self.checkpoints = Checkpoints(job.dir / STATES, config.keep_checkpoints, progress.note)
        self.step, self.final_loss = 0, math.nan
        self._log_bytes, self._saved = 0, 0  # the latter: the step of the last saved state
        self._held: list[dict[str, torch.Tensor]] = []
        self._hooks: list[tuple[float, Hook, bool]] = []
        self._trouble: UserError | None = None
        self._agreement = Agreement()
        progress.note(str(self.accumulation))
        self._resume()

    def every_epochs(self, epochs: float, hook: Hook, *, everywhere: bool = False) -> None:
        """Calls `hook(full_model, step)` each time that so many epochs are complete, resumed or not: on the main process, or
        `everywhere`."""
        self._hooks.append((epochs * self.steps_per_epoch, hook, everywhere))

    def full_model(self) -> nn.Module:
        """A plain module with all weights on this process, averaged ones where there is an EMA: for evaluation and export.

        Every process must call it. It may be the trained model itself.
        """
        return self.parallel.whole(self.ema.weights if self.ema else None)

    def fit(self, batches: Callable[[int, int], Iterator[Batch]], loss_of: BatchLoss) -> None:
        """Runs the steps that are left; `batches(start, stop)` yields this process's batches of those steps, whole or in the
        micro-batches of `accumulation.sizes`, and `loss_of(model, batch, step)` is the mean loss of a (micro-)batch.

        Raises UserError at a non-finite loss (naming the step; the last good state stays) and Interrupted after saving when
        asked to stop. All processes do so after the same step.
        """
        with self.progress.deferred(), deterministic(self.config.deterministic), ExitStack() as files:
            self.progress.stage("train", self.total_steps)
            self._open_log(files)
            self.parallel.call.train()
            self.meters.start()
            self._last_save = time.monotonic()
            stream = self.meters.waits(batches(self.step, self.total_steps))
            for first in stream:  # of a step; the others are taken as they are trained on
                self._train_step(chain((first,), stream), loss_of)
                self._after_step(Due(*map(bool, self._agreement.exchange(self._wishes()))))
            self._after_step(Due(*map(bool, self._agreement.settle() or [False] * 3)))
            if self.step != self.total_steps:  # nothing that follows may take this for a trained model
                raise BatchesEnded(f"the batches ended at step {self.step} of {self.total_steps}")

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all resumes."""
        return self.meters.seconds

    @property
    def images_per_second(self) -> float:
        """Trained images a second, loading included."""
        return self.meters.images_per_second

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, before the groups' scales."""
        c = self.config
        return cosine_lr(
            step / self.steps_per_epoch,
            lr=self.lr,
            min_lr=c.min_lr,
            warmup_epochs=c.warmup_epochs,
            epochs=c.epochs,
        )

    # One step

    def _train_step(self, stream: Iterator[Batch], loss_of: BatchLoss) -> None:
        seed_everything(
            derive_seed(self.job.seed, self.step, -2 - world().rank)
        )  # each process drops other paths
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(self.step) * group.get("lr_scale", 1.0)
        try:
            held = {"loss": self._backward(stream, loss_of), **self._update()}
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory() from error
        self._held.append(held)
        if self.ema:
            self.ema.update(self.model, self.step)
        self.meters.count_step()
        self.step += 1

    def _backward(self, stream: Iterator[Batch], loss_of: BatchLoss) -> torch.Tensor:
        """The gradients of a step, from its micro-batches; returns its loss."""
        total = torch.zeros((), device=self.device)
        left = self.accumulation.num_images
        while left:
            batch = next(stream)
            self._count_bad(batch.bad)
            for part in self.accumulation.split(batch):
                left -= len(part.targets)
                share = len(part.targets) / self.accumulation.num_images
                with self.parallel.accumulate(not left):
                    with autocast(self.device, self.config.amp_dtype):
                        loss = loss_of(self.parallel.call, part, self.step) * share
                    self.scaler.scale(loss).backward()
                total += loss.detach()
        return total

    def _update(self) -> dict[str, torch.Tensor]:
        """One step of the optimizer; returns the gradient's norm where it is clipped."""
        told = {}
        self.scaler.unscale_(
            self.optimizer
        )  # not left to the fused kernel: that cannot tell an overflow in another's shard
        if self.config.clip_grad is not None:
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            norm = whole_tensor(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad, norm)
            told["grad_norm"] = norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return told

    def _out_of_memory(self) -> UserError:
        size = max(self.accumulation.sizes)
        fix = f"set device_batch_size={size // 2}: the accumulation follows and the result stays"
        return UserError(
            f"the device's memory does not hold a training step on {size} images at once (step {self.step})",
            expected="a micro-batch that fits",
            fix=fix if size > 1 else "use a smaller model, or parallel=fsdp on more devices",
        )

    # What happens between two steps, on all processes alike

    def _wishes(self) -> list[float]:
        """What this process would have all of them do: stop, save, look at its trouble."""
        save = world().is_main and time.monotonic() - self._last_save >= self.config.checkpoint_seconds
        return [float(self.progress.should_stop), float(save), float(self._trouble is not None)]

    def _after_step(self, due: Due) -> None:
        hooks = [due for due in self._hooks if self._completes(due[0])] if self._held else []
        ended = self.step == self.total_steps
        if due.trouble:
            self._share_trouble()
        if len(self._held) >= self._held_steps or due.stop or due.save or hooks or ended:
            self._read_losses()
        for _, hook, everywhere in hooks:
            self._call(hook, everywhere)
        if hooks:
            self.meters.start()  # what they took is no training
        if (due.stop or due.save or ended) and self.step > self._saved:
            self._save()
        if due.stop:
            self.progress.interrupt()

    @property
    def _held_steps(self) -> int:
        return 1 if self.device.type == "cpu" else LOSSES_HELD

    def _completes(self, period: float) -> bool:
        """Whether the last step completed a multiple of `period` steps."""
        return math.floor(self.step / period + 1e-9) > math.floor((self.step - 1) / period + 1e-9)

    def _call(self, hook: Hook, everywhere: bool) -> None:
        model = self.full_model()
        if everywhere or world().is_main:
            hook(model, self.step)
        self.parallel.call.train()

    def _read_losses(self) -> None:
        if not self._held:
            return
        first, size = self.step - len(self._held), world().size
        losses = sum_over_ranks(torch.stack([held["loss"] for held in self._held]).tolist())
        meters = self.meters.read()
        for step, (held, total) in enumerate(zip(self._held, losses, strict=True), first):
            self.final_loss = total / size
            if not math.isfinite(total):
                raise self._not_finite(f"the loss became {total / size} at step {step}")
            self._record(step, held, meters if step == self.step - 1 else {})
        self._held.clear()
        self.progress.step(self.step, loss=self.final_loss, lr=self.lr_at(self.step))

    def _record(self, step: int, held: dict[str, torch.Tensor], meters: dict[str, float]) -> None:
        """One line of the log, one point of each curve."""
        norm = (
            held["grad_norm"].item() if "grad_norm" in held else math.nan
        )  # infinite where float16 overflows: no step is done
        values = {
            "epoch": round(step / self.steps_per_epoch, 4),
            "loss": self.final_loss,
            "lr": self.lr_at(step),
            **({"grad_norm": norm} if math.isfinite(norm) else {}),
            **meters,
        }
        for tracker in self._trackers:
            tracker.log(step, values)

    def _not_finite(self, what: str) -> UserError:
        return UserError(
            f"{what} (epoch {self.step / self.steps_per_epoch:.2f})",
            expected="finite numbers",
            fix=f"lower base_lr (now {self.config.base_lr}), set clip_grad, or use amp_dtype=float32; "
            + (
                f"{self.job.dir} keeps the state of step {self._saved}"
                if self._saved
                else "nothing had been saved yet"
            ),
        )

    def _count_bad(self, images: Iterable[tuple[str, str]]) -> None:
        try:
            for name, reason in images:
                self.bad_images.add(name, reason)
        except UserError as error:  # too many: the other processes have to hear of it before this one ends
            self._trouble = error

    def _share_trouble(self) -> None:
        """Raises on all processes what one has to tell."""
        if troubles := [trouble for trouble in gather_over_ranks(self._trouble) if trouble]:
            raise troubles[0]

    def _open_log(self, files: ExitStack) -> None:
        """The main process alone keeps the log and sends curves."""
        self._trackers: list[Tracker] = []
        if world().is_main:
            self._log = Log(self.job.dir, self._log_bytes)
            self._trackers = [self._log, *open_trackers(self.job, self.config.trackers, self.step)]
        for tracker in self._trackers:
            files.callback(tracker.close)

    # The state

    def _tensors(self) -> Tensors:
        parts: dict[str, Tensors] = {
            "model": self.model.state_dict(),
            "ema": self.ema.weights if self.ema else {},
            "optimizer": optimizer_tensors(self.model, self.optimizer),
        }
        return {
            f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()
        }

    def _save(self) -> None:
        finite = torch.stack([local_tensor(p).isfinite().all() for p in self.model.parameters()]).all()
        if sum_over_ranks([float(not finite)])[0]:
            raise self._not_finite(
                f"weights are no longer finite after step {self.step - 1}, though its loss was {self.final_loss}"
            )
        for names in gather_over_ranks(self.bad_images.names):
            self._count_bad(names.items())
        self._share_trouble()
        self.checkpoints.save(self.step, self._tensors(), self._values())
        self._saved, self._last_save = self.step, time.monotonic()

    def _values(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "final_loss": self.final_loss,
            "log_bytes": self._log.size() if world().is_main else 0,
            "meters": self.meters.state(),
            "scaler": self.scaler.state_dict(),
            "bad_images": self.bad_images.names,
        }

    def _resume(self) -> None:
        values = self.checkpoints.load(self._targets)
        if values is None:
            return
        self.step = self._saved = values["step"]
        self.final_loss, self._log_bytes = values["final_loss"], values["log_bytes"]
        self.meters.resume(values["meters"])
        self.scaler.load_state_dict(values["scaler"])
        for name, reason in values["bad_images"].items():
            self.bad_images.add(name, reason)
        self.progress.note(f"resumed at step {self.step} of {self.total_steps}")

    def _targets(self, saved: Shapes) -> Tensors:
        """The tensors that a saved state is read into; UserError if it is that of another architecture."""
        here = {
            name: tensor.shape
            for name, tensor in self._tensors().items()
            if not name.startswith("optimizer.")
        }
        there = {name: shape for name, (shape, _) in saved.items() if not name.startswith("optimizer.")}
        if here != there:
            raise _another_architecture(self.job.dir, here, there)
        optimizer = {
            name.removeprefix("optimizer."): shape
            for name, shape in saved.items()
            if name.startswith("optimizer.")
        }
        allocate_optimizer_tensors(self.model, self.optimizer, optimizer)
        return self._tensors()


def _another_architecture(
    folder: Path, here: dict[str, torch.Size], there: dict[str, torch.Size]
) -> UserError:
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    shown = [f"{name} was {_shape(there.get(name))} and is {_shape(here.get(name))}" for name in names[:3]]
    more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
    return UserError(
        f"{folder} holds the state of another architecture: {'; '.join(shown)}{more}",
        expected="the model of this config",
        fix="use another output folder, or the config that the run began with",
    )


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))
