"""The training loop: schedule, accumulation, mixed precision, EMA, checkpoints, exact resume, and a stop at a non-finite loss."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mae_bench.config import TrainConfig
from mae_bench.data.images import BadImages
from mae_bench.data.loader import Batch, seed_everything, seed_of
from mae_bench.engine.accumulation import accumulation
from mae_bench.engine.distributed import world
from mae_bench.engine.schedule import absolute_lr, cosine_lr
from mae_bench.engine.state import STATE_FILE, load_state, save_state
from mae_bench.errors import UserError
from mae_bench.job import Job
from mae_bench.progress import Progress

LOG_FILE = "log.jsonl"
LOSSES_HELD = 20  # steps between two reads of the losses on a GPU: each read waits for the device

BatchLoss = Callable[[nn.Module, Batch, int], torch.Tensor]


def autocast(device: torch.device, amp_dtype: str) -> AbstractContextManager[Any]:
    """Mixed precision in `amp_dtype`; float32 computes as it is."""
    return torch.autocast(device.type, getattr(torch, amp_dtype), enabled=amp_dtype != "float32")


class Trainer:
    """Trains `model` for config.epochs on batches that depend on the step alone, so that a resumed run equals an uninterrupted
    one.

    All randomness of step s (drop path, mixup, noise) follows from seed_of(seed, s): no generator state has to be saved.
    `loss_of(model, batch, step)` returns the mean loss of a (micro-)batch.
    """

    def __init__(
        self,
        job: Job,
        config: TrainConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        progress: Progress,
        bad_images: BadImages,
        ema_decay: float | None = None,
        multiple_of: int = 1,
    ):
        self.job, self.config, self.model, self.optimizer, self.progress, self.bad_images = (
            job,
            config,
            model,
            optimizer,
            progress,
            bad_images,
        )
        self.device = torch.device(job.device)
        self.accumulation = accumulation(config.global_batch_size, world().size, config.device_batch_size, multiple_of)
        progress.note(str(self.accumulation))
        self.steps_per_epoch, self.total_steps = steps_per_epoch, math.ceil(config.epochs * steps_per_epoch)
        self.lr = absolute_lr(config.base_lr, config.global_batch_size)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp_dtype == "float16")
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=True) if ema_decay else None
        self.step, self.seconds, self.final_loss, self.log_bytes = 0, 0.0, math.nan, 0
        self._held: list[torch.Tensor] = []
        self._resume()

    def fit(self, batches: Callable[[int, int], Iterator[Batch]], loss_of: BatchLoss) -> None:
        """Runs the steps that are left; `batches(start, stop)` yields the batches of those steps.

        Raises UserError at a non-finite loss (naming the step; the last good state stays) and Interrupted after saving when
        asked to stop.
        """
        self.progress.stage("train", self.total_steps)
        with open(self.job.dir / LOG_FILE, "a", encoding="utf-8") as log:
            log.seek(log.truncate(self.log_bytes))  # lines after the state that we go on from belong to steps that are run again
            try:
                self._steps(batches, loss_of, log)
            finally:
                if not self._held:  # losses that were not looked at may hide one that is not finite
                    self._save(log)

    def _steps(self, batches: Callable[[int, int], Iterator[Batch]], loss_of: BatchLoss, log: TextIO) -> None:
        saved = began = time.monotonic()
        seconds_before = self.seconds
        for batch in batches(self.step, self.total_steps):
            self._train_step(batch, loss_of)
            self.seconds = seconds_before + time.monotonic() - began
            held = len(self._held) < LOSSES_HELD and self.device.type != "cpu" and self.step < self.total_steps
            if held and not self.progress.should_stop:
                continue
            self._read_losses(log)
            if time.monotonic() - saved >= self.config.checkpoint_seconds:
                self._save(log)
                saved = time.monotonic()
            self.progress.step(self.step, loss=self.final_loss, lr=self.lr_at(self.step))

    @property
    def images_per_second(self) -> float:
        """Trained images a second, loading included."""
        return self.step * self.config.global_batch_size / self.seconds if self.seconds else 0.0

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, before the groups' scales."""
        c = self.config
        return cosine_lr(step / self.steps_per_epoch, lr=self.lr, min_lr=c.min_lr, warmup_epochs=c.warmup_epochs, epochs=c.epochs)

    def _train_step(self, batch: Batch, loss_of: BatchLoss) -> None:
        for name, reason in batch.bad:
            self.bad_images.add(name, reason)
        seed_everything(seed_of(self.job.seed, self.step, -2))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(self.step) * group.get("lr_scale", 1.0)
        self.model.train()
        total = torch.zeros((), device=self.device)
        for part in self.accumulation.split(batch):
            share = len(part.targets) / len(batch.targets)
            with autocast(self.device, self.config.amp_dtype):
                loss = loss_of(self.model, part, self.step) * share
            self.scaler.scale(loss).backward()
            total += loss.detach()
        self._held.append(total)
        self._update()
        self.step += 1

    def _update(self) -> None:
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update_parameters(self.model)

    def _read_losses(self, log: TextIO) -> None:
        first = self.step - len(self._held)
        for step, loss in enumerate(torch.stack(self._held).tolist(), first):
            if not math.isfinite(loss):
                raise self._not_finite(f"the loss became {loss} at step {step}")
            self.final_loss = loss
            log.write(
                json.dumps({"step": step, "epoch": round(step / self.steps_per_epoch, 4), "loss": loss, "lr": self.lr_at(step)})
                + "\n"
            )
        self._held.clear()

    def _not_finite(self, what: str) -> UserError:
        return UserError(
            f"{what} (epoch {self.step / self.steps_per_epoch:.2f})",
            expected="finite numbers",
            fix=f"lower base_lr (now {self.config.base_lr}), set clip_grad, or use amp_dtype=float32; "
            f"{self.job.dir} keeps the last good state",
        )

    def _save(self, log: TextIO) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise self._not_finite(
                f"weights are no longer finite after step {self.step - 1}, though its loss was {self.final_loss}"
            )
        log.flush()
        self.log_bytes = log.tell()
        save_state(
            self.job.dir,
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "ema": self.ema.state_dict() if self.ema else None,
                "step": self.step,
                "seconds": self.seconds,
                "log_bytes": self.log_bytes,
                "final_loss": self.final_loss,
                "bad_images": self.bad_images.names,
            },
        )

    def _resume(self) -> None:
        if (state := load_state(self.job.dir, self.device)) is None:
            return
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise UserError(
                f"{self.job.dir} holds the state of another architecture: {error}",
                expected="the model of this config",
                fix="use another output folder, or the config that the run began with",
            ) from error
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.step, self.seconds, self.final_loss = state["step"], state["seconds"], state["final_loss"]
        self.log_bytes = state["log_bytes"]
        for name, reason in state["bad_images"].items():
            self.bad_images.add(name, reason)
        self.progress.note(f"resumed at step {self.step} of {self.total_steps}")


def clear_state(folder: Path) -> None:
    """Removes the training state of a finished job: its export and record are what stays."""
    (folder / STATE_FILE).unlink(missing_ok=True)
