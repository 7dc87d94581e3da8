"""Exact distributed evaluation: each image is scored once, metrics are reduced from sums and counts.

N images, K classes, C channels, H W image.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mae_bench.data.batches.loader import load_evaluation_batches
from mae_bench.data.batches.transforms import normalize
from mae_bench.data.sets.source import BadImages, ImageSource
from mae_bench.engine.distributed import gather_over_ranks, world
from mae_bench.engine.precision import autocast
from mae_bench.engine.trainer import Trainer
from mae_bench.errors import UserError
from mae_bench.files import write_atomic, write_json
from mae_bench.job import Job, Outcome
from mae_bench.models.cost import backbone_gmacs, num_params
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.seal import read_sealed_json, seal_json
from tasks.context import TaskContext
from tasks.imagenet.config import EvalConfig, ImageConfig
from tasks.imagenet.crops import build_eval_crop
from tasks.imagenet.data import Data
from tasks.trained import Training, add_training

# indices (N,), targets (N,), input of the model (N, ...)
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
PREDICTIONS_FILE = "predictions.npz"
EPOCHS_FILE = "epochs.json"
TOP = 5  # classes kept per prediction


@dataclass(frozen=True)
class Predictions:
    """Predictions on N images.

    Attributes:
        indices (N,): positions in the image set.
        targets (N,): labels.
        top5 (N, at most 5): classes by falling score; -1 where fewer classes have a vote.
        margin (N,): first minus second logit; for nearest neighbours, difference of the shares of the votes.
        loss (N,): cross-entropy in nats; None for nearest neighbours.
    """

    indices: np.ndarray
    targets: np.ndarray
    top5: np.ndarray
    margin: np.ndarray
    loss: np.ndarray | None = None

    def metrics(self) -> dict[str, Metric]:
        """Return top1 and top5 in percent and the mean loss in nats."""
        hits, count = self.top5 == self.targets[:, None], len(self.targets)
        metrics = {
            "top1": Metric(100 * int(hits[:, 0].sum()) / count),
            "top5": Metric(100 * int(hits.any(axis=1).sum()) / count),
        }
        if self.loss is not None:
            metrics["loss"] = Metric(float(self.loss.mean(dtype=float)), "nats", "lower")
        return metrics

    def save(self, path: Path) -> None:
        """Write the arrays to a compressed .npz.

        Two files can be compared image by image if their records have the same data_digest.
        """
        arrays = {name: array for name, array in vars(self).items() if array is not None}
        write_atomic(path, lambda file: np.savez_compressed(file, **arrays))


def predictions_from_logits(
    logits: torch.Tensor, indices: torch.Tensor, targets: torch.Tensor
) -> Predictions:
    """Return the predictions of one batch: logits (N, K) in float32, indices and targets (N,)."""
    loss = F.cross_entropy(logits, targets.to(logits.device), reduction="none")
    values, classes = logits.topk(min(TOP, logits.shape[1]), dim=1)
    return Predictions(
        indices.numpy(),
        targets.cpu().numpy(),
        classes.cpu().numpy().astype(np.int32),
        (values[:, 0] - values[:, 1]).cpu().numpy(),
        loss.cpu().numpy(),
    )


def concatenate_predictions(parts: Sequence[Predictions]) -> Predictions:
    """Concatenate predictions and sort them by index, so that sums do not depend on the batches."""
    order = np.argsort(np.concatenate([part.indices for part in parts]), kind="stable")
    names = [name for name, array in vars(parts[0]).items() if array is not None]
    return Predictions(
        **{name: np.concatenate([getattr(part, name) for part in parts])[order] for name in names}
    )


def gather_predictions(parts: Sequence[Predictions], total: int) -> Predictions:
    """Return the predictions of all ranks on every rank.

    Raise UserError if none of the `total` images can be read.
    """
    gathered: list[Predictions] = []
    for rank_parts in gather_over_ranks(list(parts)):
        gathered += rank_parts
    if not gathered:
        raise UserError(f"none of {total} images can be read", expected="images that decode")
    return concatenate_predictions(gathered)


@contextmanager
def report_out_of_memory(what: str, fix: str) -> Iterator[None]:
    """Raise UserError if the code inside runs out of device memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device's memory does not hold {what}", expected="a batch that fits", fix=fix
        ) from error


@dataclass(frozen=True)
class Feed:
    """Feed evaluation images to a model: size and crop from the config, mean and std from the spec."""

    context: TaskContext[ImageConfig]

    def batches(self, images: ImageSource, bad: BadImages) -> Iterator[Inputs]:
        """Yield this rank's share of the set: normalised images (N, C, H, W) on the device."""
        config, spec, rank = self.context.config, self.context.spec, world()
        transform = build_eval_crop(config, spec, images)
        batches = load_evaluation_batches(
            images, transform, config.eval_batch_size, config.num_workers, rank.rank, rank.size
        )
        for batch in batches:
            for name, reason in batch.bad:
                bad.add(name, reason)
            if len(batch.targets):
                imgs = normalize(batch.imgs.to(self.context.device, non_blocking=True), spec.mean, spec.std)
                yield batch.indices, batch.targets, imgs

    @torch.no_grad()
    def run(self, model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """Return the model's output in float32; raise UserError if the device's memory does not hold it."""
        size = len(inputs)
        fix = "use a device with more memory"
        if size > 1:
            fix = f"set eval_batch_size={size // 2}; the scores do not change"
        with (
            report_out_of_memory(f"an evaluation of {size} images at once", fix),
            autocast(self.context.device, self.context.config.amp_dtype),
        ):
            output: torch.Tensor = model(inputs).float()
        return output


def predict(
    run: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[Inputs], total: int, progress: Progress
) -> Predictions:
    """Return the predictions of `run` (inputs -> logits) for all batches of all ranks, sorted, on every rank.

    total: the number of images, for the progress. Raise UserError if a loss is not finite.
    """
    progress.stage("evaluate", total)
    parts: list[Predictions] = []
    count = 0
    for indices, targets, inputs in batches:
        parts.append(predictions_from_logits(run(inputs), indices, targets))
        count += len(targets)
        progress.step(count * world().size)
    predictions = gather_predictions(parts, total)
    if predictions.loss is not None:
        _require_finite(predictions.loss)
    return predictions


def _require_finite(loss: np.ndarray) -> None:
    num_wrong = int((~np.isfinite(loss)).sum())
    if num_wrong:
        raise UserError(
            f"the loss of {num_wrong} of {len(loss)} evaluated images is not finite",
            expected="finite logits; this model has diverged, or its activations overflow the precision",
            fix="train with a lower base_lr or with clip_grad, or use amp_dtype=float32",
        )


def predict_images(
    model: nn.Module, images: ImageSource, bad: BadImages, feed: Feed, progress: Progress
) -> Predictions:
    """Return the predictions of every image that decodes, each once over all ranks."""
    model.eval()
    predictions = predict(
        lambda imgs: feed.run(model, imgs), feed.batches(images, bad), len(images), progress
    )
    share_bad(bad)
    return predictions


def share_bad(bad: BadImages) -> None:
    """Add the bad images that any rank found to `bad` on every rank."""
    for names in gather_over_ranks(bad.names):
        for name, reason in names.items():
            bad.add(name, reason)


def evaluate(
    context: TaskContext[ImageConfig], data: Data, model: nn.Module
) -> tuple[dict[str, Metric], int]:
    """Return metrics and number of images of the validation set; save the predictions in the job's folder."""
    predictions = predict_images(model, data.val, data.bad_val, Feed(context), context.progress)
    if world().is_main:
        predictions.save(context.job.dir / PREDICTIONS_FILE)
    return predictions.metrics(), len(predictions.targets)


def watch_epochs(
    context: TaskContext[EvalConfig], trainer: Trainer, metrics_of: Callable[[nn.Module], dict[str, Metric]]
) -> None:
    """Evaluate every `config.eval_epochs` epochs during training and keep the list in the job's folder.

    A resumed run extends the list; entries of later steps or of an earlier, discarded run are dropped.
    """
    job, period = context.job, context.config.eval_epochs
    if world().is_main:
        known = read_epochs(job) if period and trainer.step else []
        _write_epochs(job, [entry for entry in known if entry["step"] <= trainer.step])
    if period is None:
        return

    def hook(model: nn.Module, step: int) -> None:
        values = {name: metric.value for name, metric in metrics_of(model).items()}
        if world().is_main:
            entry = {"step": step, "epoch": step / trainer.steps_per_epoch, **values}
            _write_epochs(job, [*read_epochs(job), entry])
        context.progress.stage("train", trainer.total_steps)

    trainer.every_epochs(period, hook, everywhere=True)


def _write_epochs(job: Job, epochs: list[dict[str, float]]) -> None:
    if epochs:
        write_json(job.dir / EPOCHS_FILE, seal_json({"epochs": epochs}))
    else:
        (job.dir / EPOCHS_FILE).unlink(missing_ok=True)


def read_epochs(job: Job) -> list[dict[str, float]]:
    """Return the evaluations made during training, in order. Raise UserError if the file is damaged."""
    path = job.dir / EPOCHS_FILE
    if not path.is_file():
        return []
    fix = "restore it from a copy, or remove it: best_top1 then leaves out the epochs before the next one"
    epochs: list[dict[str, float]] = read_sealed_json(path, fix=fix)["epochs"]
    return epochs


def select_best_epoch(job: Job, last: float, last_top1: float) -> tuple[dict[str, Metric], list[str]]:
    """Return metrics of the best epoch, the `last` included, and a note that says which epoch is the score.

    Both are empty if nothing was evaluated during training.
    """
    epochs = read_epochs(job)
    if not epochs:
        return {}, []
    top1 = {entry["epoch"]: entry["top1"] for entry in epochs} | {last: last_top1}
    best = max(top1, key=lambda epoch: (top1[epoch], -epoch))
    note = f"the score is the last epoch's; best_top1 (epoch {best:g}) was chosen on the validation images"
    return {"best_top1": Metric(top1[best]), "best_epoch": Metric(best, "epochs")}, [note]


def score(context: TaskContext[EvalConfig], data: Data, model: nn.Module, training: Training) -> Outcome:
    """Evaluate a trained model and return the Outcome. The main metric is top1 of the last epoch."""
    add_bad_images(data, training)
    began = time.monotonic()
    metrics, num_samples = evaluate(context, data, model)
    seconds = time.monotonic() - began
    outcome = build_outcome(context, metrics, num_samples, seconds, num_params(model), notes=data.notes)
    return add_epochs(context, outcome, training)


def add_bad_images(data: Data, training: Training) -> None:
    """Count the training images that did not decode, which another cell may have found."""
    for name, reason in training.bad_images.items():
        data.bad_train.add(name, reason)


def add_epochs(context: TaskContext[EvalConfig], outcome: Outcome, training: Training) -> Outcome:
    """Return the outcome with its training and the metrics of its best epoch, if epochs were evaluated."""
    best, notes = select_best_epoch(context.job, training.epochs, outcome.metrics["top1"].value)
    if training.reused and context.config.eval_epochs:
        notes = ["best_top1 was not measured: only the last epoch was evaluated on these images"]
    outcome = replace(outcome, metrics=outcome.metrics | best, notes=[*notes, *outcome.notes])
    return add_training(context, outcome, training)


def build_outcome(
    context: TaskContext[ImageConfig],
    metrics: dict[str, Metric],
    num_samples: int,
    seconds_eval: float,
    num_params: int,
    main_metric: str = "top1",
    *,
    notes: list[str],
) -> Outcome:
    """Return the Outcome of a protocol on a set of images.

    images_per_second counts evaluated images; protocols that train replace it by the trained ones.
    """
    cost = {
        "seconds_eval": seconds_eval,
        "images_per_second": num_samples / seconds_eval,
        "gmacs": backbone_gmacs(context.spec, context.spec.img_size if context.config.img_size else None),
    }
    files = {"predictions": PREDICTIONS_FILE, "epochs": EPOCHS_FILE}
    return context.build_outcome(
        "imagenet",
        "val",
        num_samples,
        metrics,
        main_metric,
        num_params=num_params,
        cost=cost,
        notes=notes,
        artefacts={name: file for name, file in files.items() if (context.job.dir / file).is_file()},
    )
