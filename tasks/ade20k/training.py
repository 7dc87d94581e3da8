"""mmengine's Runner inside a job: log to a file, exact resume, stop on request or at a non-finite loss."""

import logging
import math
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
from tasks.ade20k.config import UPerNetConfig
from tasks.ade20k.data import STEP, SharedBadImages
from tasks.context import TaskContext
from tasks.states import TrainerStates

LOG_FILE = "mmseg.log"


class JobRunner(Runner):
    """mmengine's Runner on the job's device, which logs to the job's folder and not to the terminal."""

    def build_logger(
        self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any
    ) -> MMLogger:
        logger = super().build_logger(log_level, str(Path(self.work_dir).parent / LOG_FILE), **kwargs)
        logger.handlers = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
        return logger

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        return model.to(self.cfg["device"])

    def skip_resuming(self) -> None:
        """Evaluate the weights that the model has now, whatever state there is."""
        self._has_loaded = True

    def dump_config(self) -> None:
        """Do nothing: the job's folder already has the config."""


def dump_config(parts: dict[str, Any], path: Path) -> None:
    """Write mmengine's config as Python, which mmsegmentation's tools read."""
    Config(parts).dump(path)


def build_runner(parts: dict[str, Any], state: Path | None) -> tuple[JobRunner, float]:
    """Return the Runner of mmengine's config `parts` and the seconds trained so far.

    The Runner resumes from the state if there is one. It is loaded with weights_only first, because mmengine
    would fall back to unpickling.
    """
    cfg = Config(parts, format_python_code=False)  # formatting takes half a second per checkpoint
    # mmengine's loggers, hubs and scopes are global and found by this name
    cfg.experiment_name = f"mae_bench-{time.time_ns()}"
    if state is None:
        return JobRunner.from_cfg(cfg), 0.0
    meta = torch.load(state, map_location="cpu", weights_only=True, mmap=True)["meta"]
    cfg.load_from, cfg.resume = str(state), True
    return JobRunner.from_cfg(cfg), meta["seconds_train"]


class JobHook(Hook):
    """Seed, check, save and report each iteration.

    It runs after all other hooks, so that saved states are complete.

    seconds: training time over all runs of the job.
    """

    priority = "VERY_LOW"

    def __init__(
        self, context: TaskContext[UPerNetConfig], states: TrainerStates, bad: SharedBadImages, seconds: float
    ):
        self.progress, self.states, self.bad, self.num_bad = context.progress, states, bad, 0
        self.seed, self.checkpoint_seconds = context.job.seed, context.config.checkpoint_seconds
        self.seconds = seconds

    def before_train(self, runner: Runner) -> None:
        self.saved = self.counted = time.monotonic()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        # Drop path and dropout depend on the iteration, not on the number of loader processes.
        seed_everything(derive_seed(self.seed, STEP, batch_idx))
        self.lr = max(runner.optim_wrapper.get_lr()["lr"])  # that of the heads
        bad = list(self.bad.check().names.items())
        for name, reason in bad[self.num_bad :]:
            self.progress.note(f"{name} does not decode and is skipped: {reason}")
            self.num_bad += 1

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        done, loss = batch_idx + 1, float(outputs["loss"].detach())
        if not math.isfinite(loss):
            raise self._build_error(runner, f"loss {loss}", done)
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
        # the history of the log is the only part that weights_only would not load
        checkpoint["message_hub"] = {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}}

    def _save(self, runner: Runner, done: int) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in runner.model.parameters()):
            raise self._build_error(runner, "weights that are not finite", done)
        meta = {"epoch": 0, "iter": done, "seconds_train": self.seconds}

        def write(path: Path) -> None:
            runner.save_checkpoint(str(path.parent), path.name, meta=meta, by_epoch=False)

        self.states.save(done, write)
        self.saved = time.monotonic()

    def _build_error(self, runner: Runner, what: str, done: int) -> UserError:
        return UserError(
            f"training stopped at iteration {done} of {runner.max_iters}: {what}",
            expected="finite numbers",
            fix=f"lower lr or raise warmup_iterations; {self.states.describe_last()}",
        )
