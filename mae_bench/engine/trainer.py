"""Training loop: schedule, accumulation, mixed precision, EMA, exact resume, stop at a non-finite loss."""

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
from mae_bench.engine.accumulation import plan_accumulation
from mae_bench.engine.checkpoint import Checkpoints, Shapes, Tensors
from mae_bench.engine.distributed import Agreement, gather_over_ranks, sum_over_ranks, world
from mae_bench.engine.ema import Ema
from mae_bench.engine.meters import Meters
from mae_bench.engine.optim import allocate_optimizer_tensors, collect_optimizer_tensors
from mae_bench.engine.parallel import Parallel, gather_tensor, local_tensor
from mae_bench.engine.precision import autocast, build_grad_scaler, deterministic
from mae_bench.engine.schedule import absolute_lr, cosine_lr
from mae_bench.engine.trackers import Log, Tracker, open_trackers, require_trackers
from mae_bench.errors import UserError
from mae_bench.job import STATES, Job
from mae_bench.progress import Progress

STEPS_PER_READ = 20  # on a GPU, losses are read every so many steps, as each read waits for the device

BatchLoss = Callable[[nn.Module, Batch, int], torch.Tensor]
Hook = Callable[[nn.Module, int], None]


class BatchesExhausted(RuntimeError):
    """The iterator of batches ended before the training: an error of the caller."""


@dataclass(frozen=True)
class StepDecision:
    """What all processes do after the same step."""

    stop: bool
    save: bool
    raise_error: bool


class Trainer:
    """Trains `model` for config.epochs; a resumed run equals an uninterrupted one.

    Batches may only depend on the step. All randomness of step s (drop path, mixup, noise) follows from
    derive_seed(seed, s), so no generator state has to be saved.

    build_optimizer: called with the model once its weights are placed: on one device, replicated or sharded.
    multiple_of: see `plan_accumulation`.
    flops_per_image: see `Meters`.
    """

    def __init__(
        self,
        job: Job,
        config: TrainConfig,
        model: nn.Module,
        build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
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
        self.accumulation = plan_accumulation(
            config.global_batch_size, world().size, config.device_batch_size, multiple_of
        )
        self.steps_per_epoch, self.total_steps = steps_per_epoch, math.ceil(config.epochs * steps_per_epoch)
        self.lr = absolute_lr(config.base_lr, config.global_batch_size)
        self.parallel = Parallel(model, config, self.device, other_weights=ema_decay is not None)
        self.model = self.parallel.model
        self.optimizer = build_optimizer(self.model)
        self.scaler = build_grad_scaler(self.device, config.amp_dtype)
        self.ema = Ema(self.model, ema_decay) if ema_decay else None
        self.meters = Meters(self.device, config.amp_dtype, config.global_batch_size, flops_per_image)
        self.checkpoints = Checkpoints(job.dir / STATES, config.keep_checkpoints, progress.note)
        self.step, self.final_loss = 0, math.nan
        self._log_bytes = 0
        self._saved_step = 0
        # Loss and grad_norm of the steps that were not read from the device yet
        self._unread: list[dict[str, torch.Tensor]] = []
        self._hooks: list[tuple[float, Hook, bool]] = []
        self._error: UserError | None = None
        self._agreement = Agreement()
        progress.note(str(self.accumulation))
        self._resume()

    def every_epochs(self, epochs: float, hook: Hook, *, everywhere: bool = False) -> None:
        """Call `hook(full_model, step)` whenever this many epochs are complete, also after a resume.

        everywhere: call it on every process, not only on the main one.
        """
        self._hooks.append((epochs * self.steps_per_epoch, hook, everywhere))

    def full_model(self) -> nn.Module:
        """Return a plain module with all weights on this process, for evaluation and export.

        The weights are averaged if there is an EMA; else the result may be the trained model itself. Every
        process must call this.
        """
        return self.parallel.gather_model(self.ema.weights if self.ema else None)

    def fit(self, batches: Callable[[int, int], Iterator[Batch]], loss_of: BatchLoss) -> None:
        """Run the remaining steps.

        batches: `batches(start, stop)` yields this process's batches of those steps, whole or split into the
            micro-batches of `accumulation.sizes`.
        loss_of: `loss_of(model, batch, step)` returns the mean loss of a (micro-)batch.

        Raise UserError at a non-finite loss (naming the step; the last good state is kept), and Interrupted
        after saving if asked to stop. All processes do so after the same step.
        """
        with self.progress.deferred(), deterministic(self.config.deterministic), ExitStack() as files:
            self.progress.stage("train", self.total_steps)
            self._open_log(files)
            self.parallel.call.train()
            self.meters.start()
            self._last_save = time.monotonic()
            stream = self.meters.measure_waits(batches(self.step, self.total_steps))
            for first in stream:  # of a step; `_train_step` takes its other micro-batches from the stream
                self._train_step(chain((first,), stream), loss_of)
                self._after_step(_decide(self._agreement.exchange(self._requests())))
            self._after_step(_decide(self._agreement.settle() or [0.0, 0.0, 0.0]))
            if self.step != self.total_steps:  # never pass on a model that is not fully trained
                raise BatchesExhausted(f"the batches ended at step {self.step} of {self.total_steps}")

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all resumes."""
        return self.meters.seconds

    @property
    def images_per_second(self) -> float:
        """Training images per second, data loading included."""
        return self.meters.images_per_second

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, before the scales of the groups."""
        config = self.config
        return cosine_lr(
            step / self.steps_per_epoch,
            lr=self.lr,
            min_lr=config.min_lr,
            warmup_epochs=config.warmup_epochs,
            epochs=config.epochs,
        )

    # One step

    def _train_step(self, stream: Iterator[Batch], loss_of: BatchLoss) -> None:
        seed_everything(
            derive_seed(self.job.seed, self.step, -2 - world().rank)
        )  # drop path differs per process
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(self.step) * group.get("lr_scale", 1.0)
        try:
            values = {"loss": self._backward(stream, loss_of), **self._update()}
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory() from error
        self._unread.append(values)
        if self.ema:
            self.ema.update(self.model, self.step)
        self.meters.count_step()
        self.step += 1

    def _backward(self, stream: Iterator[Batch], loss_of: BatchLoss) -> torch.Tensor:
        """Accumulate the gradients of a step over its micro-batches; return its loss ()."""
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
                    torch.autograd.backward(self.scaler.scale(loss))
                total += loss.detach()
        return total

    def _update(self) -> dict[str, torch.Tensor]:
        """Run one step of the optimizer; return the gradient norm if it is clipped."""
        values = {}
        # Not left to the fused kernel, which does not see an overflow in the shard of another process
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_grad is not None:
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            norm = gather_tensor(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad, norm)
            values["grad_norm"] = norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return values

    def _out_of_memory(self) -> UserError:
        size = max(self.accumulation.sizes)
        smaller = f"set device_batch_size={size // 2}: accumulation is adapted and the result does not change"
        return UserError(
            f"the device's memory does not hold a training step on {size} images at once (step {self.step})",
            expected="a micro-batch that fits",
            fix=smaller if size > 1 else "use a smaller model, or parallel=fsdp on more devices",
        )

    # Between two steps, the same on all processes

    def _requests(self) -> list[float]:
        """Return the fields of `StepDecision` that this process requests."""
        save = world().is_main and time.monotonic() - self._last_save >= self.config.checkpoint_seconds
        return [float(self.progress.should_stop), float(save), float(self._error is not None)]

    def _after_step(self, decision: StepDecision) -> None:
        due_hooks = [hook for hook in self._hooks if self._completes(hook[0])] if self._unread else []
        is_done = self.step == self.total_steps
        if decision.raise_error:
            self._raise_shared_error()
        must_read = decision.stop or decision.save or bool(due_hooks) or is_done
        if must_read or len(self._unread) >= self._steps_per_read:
            self._read_losses()
        for _, hook, everywhere in due_hooks:
            self._call(hook, everywhere)
        if due_hooks:
            self.meters.start()  # the time of hooks is not training time
        if (decision.stop or decision.save or is_done) and self.step > self._saved_step:
            self._save()
        if decision.stop:
            self.progress.interrupt()

    @property
    def _steps_per_read(self) -> int:
        return 1 if self.device.type == "cpu" else STEPS_PER_READ

    def _completes(self, period: float) -> bool:
        """Return whether the last step completed a multiple of `period` steps."""
        return math.floor(self.step / period + 1e-9) > math.floor((self.step - 1) / period + 1e-9)

    def _call(self, hook: Hook, everywhere: bool) -> None:
        model = self.full_model()
        if everywhere or world().is_main:
            hook(model, self.step)
        self.parallel.call.train()

    def _read_losses(self) -> None:
        """Read the losses of the last steps and log them. Raise UserError if one is not finite."""
        if not self._unread:
            return
        first, size = self.step - len(self._unread), world().size
        losses = sum_over_ranks(torch.stack([values["loss"] for values in self._unread]).tolist())
        meters = self.meters.read()
        for step, (values, total) in enumerate(zip(self._unread, losses, strict=True), first):
            self.final_loss = total / size
            if not math.isfinite(total):
                raise self._not_finite(f"the loss became {total / size} at step {step}")
            self._log_step(step, values, meters if step == self.step - 1 else {})
        self._unread.clear()
        self.progress.step(self.step, loss=self.final_loss, lr=self.lr_at(self.step))

    def _log_step(self, step: int, values: dict[str, torch.Tensor], meters: dict[str, float]) -> None:
        """Write one line of the log and one point of each curve."""
        logged = {
            "epoch": round(step / self.steps_per_epoch, 4),
            "loss": self.final_loss,
            "lr": self.lr_at(step),
        }
        if "grad_norm" in values:
            norm = values["grad_norm"].item()
            if math.isfinite(norm):  # infinite after an overflow in float16, when the step is skipped
                logged["grad_norm"] = norm
        for tracker in self._trackers:
            tracker.log(step, logged | meters)

    def _not_finite(self, what: str) -> UserError:
        saved = f"{self.job.dir} keeps the state of step {self._saved_step}"
        advice = f"lower base_lr (now {self.config.base_lr}), set clip_grad, or use amp_dtype=float32"
        return UserError(
            f"{what} (epoch {self.step / self.steps_per_epoch:.2f})",
            expected="finite numbers",
            fix=f"{advice}; {saved if self._saved_step else 'no state has been saved yet'}",
        )

    def _count_bad(self, images: Iterable[tuple[str, str]]) -> None:
        try:
            for name, reason in images:
                self.bad_images.add(name, reason)
        except UserError as error:  # too many: raised later, on all processes at the same step
            self._error = error

    def _raise_shared_error(self) -> None:
        """Raise on all processes the error of any of them."""
        errors = [error for error in gather_over_ranks(self._error) if error]
        if errors:
            raise errors[0]

    def _open_log(self, files: ExitStack) -> None:
        """Open the log and the trackers, on the main process only."""
        self._trackers: list[Tracker] = []
        if world().is_main:
            self._log = Log(self.job.dir, self._log_bytes)
            self._trackers = [self._log, *open_trackers(self.job, self.config.trackers, self.step)]
        for tracker in self._trackers:
            files.callback(tracker.close)

    # The training state

    def _tensors(self) -> Tensors:
        parts: dict[str, Tensors] = {
            "model": self.model.state_dict(),
            "ema": self.ema.weights if self.ema else {},
            "optimizer": collect_optimizer_tensors(self.model, self.optimizer),
        }
        named: Tensors = {}
        for part, tensors in parts.items():
            named |= {f"{part}.{name}": tensor for name, tensor in tensors.items()}
        return named

    def _save(self) -> None:
        finite = torch.stack([local_tensor(p).isfinite().all() for p in self.model.parameters()]).all()
        if sum_over_ranks([float(not finite)])[0]:
            what = f"weights are no longer finite after step {self.step - 1}"
            raise self._not_finite(f"{what}, though its loss was {self.final_loss}")
        for names in gather_over_ranks(self.bad_images.names):
            self._count_bad(names.items())
        self._raise_shared_error()
        self.checkpoints.save(self.step, self._tensors(), self._values())
        self._saved_step, self._last_save = self.step, time.monotonic()

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
        self.step = self._saved_step = values["step"]
        self.final_loss, self._log_bytes = values["final_loss"], values["log_bytes"]
        self.meters.resume(values["meters"])
        self.scaler.load_state_dict(values["scaler"])
        for name, reason in values["bad_images"].items():
            self.bad_images.add(name, reason)
        self.progress.note(f"resumed at step {self.step} of {self.total_steps}")

    def _targets(self, saved: Shapes) -> Tensors:
        """Return the tensors to fill from a saved state. Raise UserError if its architecture differs."""
        current = {name: tensor.shape for name, tensor in self._tensors().items()}
        current = {name: shape for name, shape in current.items() if not name.startswith("optimizer.")}
        stored = {name: shape for name, (shape, _) in saved.items() if not name.startswith("optimizer.")}
        if current != stored:
            raise _other_architecture(self.job.dir, current, stored)
        optimizer = {
            name.removeprefix("optimizer."): shape
            for name, shape in saved.items()
            if name.startswith("optimizer.")
        }
        allocate_optimizer_tensors(self.model, self.optimizer, optimizer)
        return self._tensors()


def _decide(sums: list[float]) -> StepDecision:
    """Return the decision of all processes, from the sums of their requests."""
    stop, save, raise_error = (bool(value) for value in sums)
    return StepDecision(stop, save, raise_error)


def _other_architecture(
    folder: Path, current: dict[str, torch.Size], stored: dict[str, torch.Size]
) -> UserError:
    names = sorted(name for name in current.keys() | stored.keys() if current.get(name) != stored.get(name))
    shown = [
        f"{name} was {_format_shape(stored.get(name))} and is {_format_shape(current.get(name))}"
        for name in names[:3]
    ]
    more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
    return UserError(
        f"{folder} contains the state of another architecture: {'; '.join(shown)}{more}",
        expected="the model of this config",
        fix="use another output folder, or the config with which the run was started",
    )


def _format_shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))
