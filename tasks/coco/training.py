"""Train Mask R-CNN with detectron2: checkpoints, exact resume, stop on request or at a non-finite loss."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, hooks
from detectron2.utils.events import JSONWriter
from torch import nn

from mae_bench.data.sets.source import BadImages
from mae_bench.errors import Interrupted, UserError
from mae_bench.progress import Progress
from tasks.coco.config import MaskRCNNConfig
from tasks.context import TaskContext
from tasks.states import TrainerStates
from tasks.trained import Training


class AutocastTrainer(SimpleTrainer):
    """bfloat16 on the CPU, where AMPTrainer refuses to run: it requires CUDA even without loss scaling."""

    def run_step(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            super().run_step()


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer on sealed states, with an error on any key mismatch."""

    def __init__(self, model: nn.Module, states: TrainerStates, **parts: Any):
        super().__init__(model, **parts)
        self.states = states

    def save(self, name: str, *, iteration: int, **extra: Any) -> None:
        """Save the state after `iteration`, counted from 0; `name` is not used."""
        parts = {"model": self.model, **self.checkpointables}
        data = {**{key: part.state_dict() for key, part in parts.items()}, "iteration": iteration, **extra}
        self.states.save(iteration + 1, lambda path: torch.save(data, path))

    def resume(self) -> bool:
        """Load the newest intact state; return whether there is one."""
        state = self.states.find()
        if state:
            self.load(str(state))
        return state is not None

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        wrong = [
            *incompatible.missing_keys,
            *incompatible.unexpected_keys,
            *incompatible.incorrect_shapes,
        ]
        if wrong:
            raise UserError(
                f"{self.states.last} does not fit the model: {wrong[:3]}",
                expected="a checkpoint of the same config",
                fix="remove the job's folder to train from the start",
            )


class GradientHook(HookBase):
    """Clip the norm of the gradient, and stop before a gradient that is not finite reaches the weights."""

    def __init__(self, parameters: Iterable[nn.Parameter], clip_grad: float | None):
        self.parameters, self.clip_grad = list(parameters), clip_grad or math.inf

    def after_backward(self) -> None:
        if not torch.isfinite(nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)):
            raise FloatingPointError("the gradient is not finite")


class Unread(HookBase):
    """Save the unreadable images with the training state, where the class name is the key."""

    def __init__(self, bad: BadImages):
        self.bad = bad

    def state_dict(self) -> dict[str, str]:
        return dict(self.bad.names)

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        for name, reason in state_dict.items():
            self.bad.add(name, reason)


class Clock(HookBase):
    """Count the seconds of all iterations, over resumed runs; the class name is the key in the state."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def before_step(self) -> None:
        self._began = time.perf_counter()

    def after_step(self) -> None:
        self.seconds += time.perf_counter() - self._began

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.seconds = state_dict["seconds"]


class ProgressHook(HookBase):
    """Report each iteration; save and leave if the job has to stop."""

    def __init__(self, checkpointer: Checkpointer, progress: Progress):
        self.checkpointer, self.progress = checkpointer, progress

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        try:
            self.progress.step(self.trainer.iter + 1, loss=latest["total_loss"][0], lr=latest["lr"][0])
        except Interrupted:
            self.checkpointer.save("", iteration=self.trainer.iter)
            raise


def train(
    context: TaskContext[MaskRCNNConfig],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_multiplier: Any,
    batches: Callable[[int], Any],
    bad: BadImages,
) -> tuple[nn.Module, Training]:
    """Train to config.iterations from the job's last intact state, and return the model.

    `batches(start)` returns the loader from iteration `start` on, which adds unreadable images to `bad`.
    Raise Interrupted, after saving, when asked to stop, and UserError if a loss or gradient is not finite;
    weights are never saved after one.
    """
    config, job = context.config, context.job
    trainer = _build_trainer(model, optimizer, config, job.device)
    checkpointer = Checkpointer(model, TrainerStates(context), trainer=trainer)
    clock = Clock()
    trainer.register_hooks(
        [
            GradientHook(model.parameters(), config.clip_grad),
            hooks.LRScheduler(scheduler=lr_multiplier),
            clock,
            Unread(bad),
            hooks.PeriodicCheckpointer(checkpointer, config.checkpoint_period),
            hooks.PeriodicWriter([JSONWriter(str(job.dir / "log.jsonl"))], period=20),
            ProgressHook(checkpointer, context.progress),
        ]
    )
    start = trainer.iter + 1 if checkpointer.resume() else 0
    context.progress.stage("train", config.iterations)
    try:
        if start < config.iterations:
            trainer.data_loader = batches(start)
            trainer.train(start, config.iterations)
    except FloatingPointError as error:
        reason, last = str(error).splitlines()[0], checkpointer.states.describe_last()
        raise UserError(
            f"training stopped at iteration {trainer.iter + 1} of {config.iterations}: {reason}",
            expected="a finite loss",
            fix=f"lower lr (now {config.lr:g}) or raise warmup_iterations; {last}",
        ) from error
    images_per_second = config.iterations * config.global_batch_size / clock.seconds
    return model, Training(clock.seconds, images_per_second, bad.names)


def _build_trainer(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: MaskRCNNConfig, device: str
) -> SimpleTrainer:
    if config.amp_dtype == "float32":
        return SimpleTrainer(model, None, optimizer)
    if device == "cpu":
        return AutocastTrainer(model, None, optimizer)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    return AMPTrainer(model, None, optimizer, grad_scaler=scaler, precision=torch.bfloat16)
