"""mmengine's Runner inside a job: its log in a file, exact resume, stop on request and at a non-finite loss."""

import logging
import math
import os
import pickle
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import nn

from mae_bench.data.seeds import derive_seed, seed_everything
from mae_bench.errors import Interrupted, UserError
from mae_bench.progress import Progress
from tasks.ade20k.data import STEP, SharedBadImages

CHECKPOINT_FILE = "checkpoint.pth"
LOG_FILE = "mmseg.log"


class JobRunner(Runner):
    """mmengine's Runner on the job's device, with its log in the job's folder and not on the terminal."""

    def build_logger(
        self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any
    ) -> MMLogger:
        logger = super().build_logger(log_level, str(Path(self.work_dir).parent / LOG_FILE), **kwargs)
        logger.handlers = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
        return logger

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        return model.to(self.cfg["device"])

    def dump_config(self) -> None:
        """Nothing: the job's folder has it already."""


def dump_config(parts: dict[str, Any], path: Path) -> None:
    """Writes mmengine's config as Python, which mmsegmentation's own tools read."""
    Config(parts).dump(path)


def build_runner(parts: dict[str, Any], checkpoint: Path) -> tuple[JobRunner, float]:
    """The Runner of mmengine's config `parts`, set to go on from the checkpoint if there is one, and the seconds trained before.

    The checkpoint is tried as data only, because mmengine would turn to unpickling; one that cannot be read is a UserError.
    """
    cfg = Config(parts, format_python_code=False)  # formatting costs half a second at each checkpoint
    cfg.experiment_name = (
        f"mae_bench-{time.time_ns()}"  # mmengine's loggers, hubs and scopes are global and known by it
    )
    if not checkpoint.exists():
        return JobRunner.from_cfg(cfg), 0.0
    try:
        meta = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["meta"]
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{checkpoint} cannot be read: {error}", expected="the training state of this run",
                        fix=f"remove {checkpoint} to start this job again from its beginning") from error  # fmt: skip
    cfg.load_from, cfg.resume = str(checkpoint), True
    return JobRunner.from_cfg(cfg), meta["seconds_train"]


class JobHook(Hook):
    """Seeds, checks, saves and reports each iteration; the last of the hooks, so that a saved state is whole.

    seconds: of training, over all runs of the job.
    """

    priority = "VERY_LOW"

    def __init__(
        self, progress: Progress, checkpoint: Path, bad: SharedBadImages, *,
        seed: int, checkpoint_seconds: float, seconds: float,
    ):  # fmt: skip
        self.progress, self.checkpoint, self.bad, self.num_bad = progress, checkpoint, bad, 0
        self.seed, self.checkpoint_seconds, self.seconds = seed, checkpoint_seconds, seconds

    def before_train(self, runner: Runner) -> None:
        self.saved = self.counted = time.monotonic()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        seed_everything(
            derive_seed(self.seed, STEP, batch_idx)
        )  # drop path and dropout follow from the iteration, whoever loaded it
        self.lr = max(runner.optim_wrapper.get_lr()["lr"])  # the heads'
        for name, reason in list(self.bad.check().names.items())[self.num_bad :]:
            self.progress.note(f"{name} does not decode and is skipped: {reason}")
            self.num_bad += 1

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        done, loss = batch_idx + 1, float(outputs["loss"].detach())
        if not math.isfinite(loss):
            raise self._not_finite(runner, f"loss {loss}", done)
        now = time.monotonic()
        self.seconds, self.counted = self.seconds + now - self.counted, now
        if done == runner.max_iters or now - self.saved >= self.checkpoint_seconds:
            self._save(runner, done)
        try:
            self.progress.step(done, loss=loss, lr=self.lr)
        except Interrupted:
            self._save(runner, done)
            raise

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self.progress.step(batch_idx + 1)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        # the history of the log is the one part that could not be read back as data
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}

    def _save(self, runner: Runner, done: int) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in runner.model.parameters()):
            raise self._not_finite(runner, "weights that are not finite", done)
        part = self.checkpoint.with_suffix(".part")
        meta = {"epoch": 0, "iter": done, "seconds_train": self.seconds}
        try:
            runner.save_checkpoint(str(part.parent), part.name, meta=meta, by_epoch=False)
            os.replace(part, self.checkpoint)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UserError(
                f"the training state could not be written to {part.parent}: {error}", expected="room on the disk",
                fix="free some and run the same command again: it goes on from the last state",
            ) from error  # fmt: skip
        self.saved = time.monotonic()

    def _not_finite(self, runner: Runner, what: str, done: int) -> UserError:
        kept = (
            f"the last good checkpoint is {self.checkpoint}"
            if self.checkpoint.exists()
            else "no checkpoint was saved yet"
        )
        return UserError(
            f"training stopped at iteration {done} of {runner.max_iters}: {what}", expected="finite numbers",
            fix=f"lower lr or raise warmup_iterations; {kept}",
        )  # fmt: skip
