"""Exact evaluation: every image once over all processes, a prediction kept of each, sums and counts until the last line."""

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from backbones.report import ConversionReport
from mae_bench.cost import backbone_gmacs, num_params, peak_memory_mib
from mae_bench.data.images import BadImages, ImageSource
from mae_bench.data.layouts import LayoutReport
from mae_bench.data.loader import evaluation_batches
from mae_bench.data.transforms import eval_transform, normalize
from mae_bench.engine.distributed import gather_over_ranks, sum_over_ranks, world
from mae_bench.engine.precision import autocast
from mae_bench.engine.trainer import Trainer
from mae_bench.errors import UserError
from mae_bench.files import write_atomic, write_json
from mae_bench.job import Job, Outcome
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec
from tasks.imagenet.config import EvalConfig, ImageConfig
from tasks.imagenet.data import Data

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # indices (N,), targets (N,), what a model takes (N, ...)
PREDICTIONS_FILE = "predictions.npz"
EPOCHS_FILE = "epochs.json"
TOP = 5  # classes kept of every prediction


@dataclass(frozen=True)
class Predictions:
    """What a model said of N images. indices (N,) in the image set, targets (N,), top5 (N, at most 5) classes in falling order,
    margin (N,) of the first over the second logit; loss: the sum of cross-entropies in nats."""

    indices: np.ndarray
    targets: np.ndarray
    top5: np.ndarray
    margin: np.ndarray
    loss: float

    def metrics(self) -> dict[str, Metric]:
        """top1 and top5 in percent, the mean loss in nats."""
        hits, count = self.top5 == self.targets[:, None], len(self.targets)
        return {
            "top1": Metric(100 * int(hits[:, 0].sum()) / count),
            "top5": Metric(100 * int(hits.any(axis=1).sum()) / count),
            "loss": Metric(self.loss / count, "nats", "lower"),
        }

    def save(self, path: Path) -> None:
        """As a compressed .npz, so that two models can be compared image by image."""
        write_atomic(
            path,
            lambda file: np.savez_compressed(
                file, indices=self.indices, targets=self.targets, top5=self.top5, margin=self.margin
            ),
        )


@dataclass(frozen=True)
class Feed:
    """How a protocol gives evaluation images to a backbone: size and crop by the config, mean and std by the spec."""

    config: ImageConfig
    spec: BackboneSpec
    device: torch.device

    def batches(self, images: ImageSource, bad: BadImages) -> Iterator[Inputs]:
        """This process's share of the set: images (N, C, H, W) on the device, normalised."""
        config, spec = self.config, self.spec
        transform = eval_transform(config.img_size or spec.img_size, config.crop_pct, spec.interpolation)
        size, rank = config.eval_batch_size, world()
        for batch in evaluation_batches(images, transform, size, config.num_workers, rank.rank, rank.size):
            for name, reason in batch.bad:
                bad.add(name, reason)
            if len(batch.targets):
                imgs = normalize(batch.imgs.to(self.device, non_blocking=True), spec.mean, spec.std)
                yield batch.indices, batch.targets, imgs

    @torch.no_grad()
    def run(self, model: nn.Module, imgs: torch.Tensor) -> torch.Tensor:
        """The model's output in float32; UserError where the device's memory does not hold the batch."""
        try:
            with autocast(self.device, self.config.amp_dtype):
                return model(imgs).float()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the device's memory does not hold an evaluation of {len(imgs)} images at once",
                expected="a batch that fits",
                fix=f"set eval_batch_size={max(1, len(imgs) // 2)}: the scores stay",
            ) from error


def predict(
    run: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[Inputs], total: int, progress: Progress
) -> Predictions:
    """What `run` (inputs -> logits) says of all batches of all processes, on every process alike, in the order of the indices.

    total: how many images there are, for the progress."""
    progress.stage("evaluate", total)
    seen: list[tuple[np.ndarray, ...]] = []
    loss, count = 0.0, 0
    for indices, targets, inputs in batches:
        logits = run(inputs)
        loss += F.cross_entropy(logits, targets.to(logits.device), reduction="sum").item()
        values, classes = logits.topk(min(TOP, logits.shape[1]), dim=1)
        margin = values[:, 0] - values[:, 1]
        seen.append((indices.numpy(), targets.numpy(), classes.cpu().numpy().astype(np.int32), margin.cpu().numpy()))
        count += len(targets)
        progress.step(count * world().size)
    total_loss = sum_over_ranks([loss])[0]
    parts = [part for parts in gather_over_ranks(seen) for part in parts]
    if not parts:
        raise UserError(f"none of {total} images can be read", expected="images that decode")
    places, labels, top, margins = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(places, kind="stable")
    return Predictions(places[order], labels[order], top[order], margins[order], total_loss)


def predict_images(model: nn.Module, images: ImageSource, bad: BadImages, feed: Feed, progress: Progress) -> Predictions:
    """The predictions of every image that decodes, each once over all processes."""
    model.eval()
    found = predict(lambda imgs: feed.run(model, imgs), feed.batches(images, bad), len(images), progress)
    share_bad(bad)
    return found


def share_bad(bad: BadImages) -> None:
    """Makes the bad images that any process met known to all."""
    for name, reason in (item for names in gather_over_ranks(bad.names) for item in names.items()):
        bad.add(name, reason)


def evaluate(
    model: nn.Module, data: Data, config: ImageConfig, spec: BackboneSpec, job: Job, progress: Progress
) -> tuple[dict[str, Metric], int]:
    """Metrics of the validation set and how many images there were; the predictions are kept in the job's folder."""
    found = predict_images(model, data.val, data.bad_val, Feed(config, spec, torch.device(job.device)), progress)
    if world().is_main:
        found.save(job.dir / PREDICTIONS_FILE)
    return found.metrics(), len(found.targets)


def watch_epochs(
    trainer: Trainer, period: float | None, metrics_of: Callable[[nn.Module], dict[str, Metric]], job: Job, progress: Progress
) -> None:
    """Evaluates every `period` epochs while training and keeps the list in the job's folder; a resumed run goes on with it."""
    if period is None:
        return

    def hook(model: nn.Module, step: int) -> None:
        found = {name: metric.value for name, metric in metrics_of(model).items()}
        if world().is_main:
            entry = {"step": step, "epoch": step / trainer.steps_per_epoch, **found}
            write_json(job.dir / EPOCHS_FILE, [known for known in epochs_of(job) if known["step"] < step] + [entry])
        progress.stage("train", trainer.total_steps)

    trainer.every_epochs(period, hook, everywhere=True)


def epochs_of(job: Job) -> list[dict[str, float]]:
    """The evaluations while training, in order; none where there were none."""
    path = job.dir / EPOCHS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def best_epoch(job: Job) -> tuple[dict[str, Metric], list[str]]:
    """The best of the evaluations while training, as metrics beside the score, and a note that says which is the score."""
    if not (epochs := epochs_of(job)):
        return {}, []
    best = max(epochs, key=lambda entry: (entry["top1"], -entry["epoch"]))
    note = f"the score is the last epoch's; best_top1, of epoch {best['epoch']:g}, was chosen on the validation images themselves"
    return {"best_top1": Metric(best["top1"]), "best_epoch": Metric(best["epoch"], "epochs")}, [note]


def score(
    model: nn.Module,
    trainer: Trainer,
    data: Data,
    config: EvalConfig,
    spec: BackboneSpec,
    report: ConversionReport,
    job: Job,
    progress: Progress,
) -> Outcome:
    """Evaluates a trained model and says everything that is known of the cell. Main metric top1, of the last epoch."""
    began = time.monotonic()
    metrics, num_samples = evaluate(model, data, config, spec, job, progress)
    outcome = outcome_of(metrics, num_samples, data.report, spec, report, job, time.monotonic() - began, notes=data.notes)
    return trained_outcome(outcome, trainer, num_params(model), backbone_gmacs(spec, config.img_size), job)


def trained_outcome(outcome: Outcome, trainer: Trainer, params: int, gmacs: float, job: Job) -> Outcome:
    """An outcome with what its training cost and the best of its epochs."""
    best, notes = best_epoch(job)
    cost = {
        "seconds_train": trainer.seconds,
        "images_per_second": trainer.images_per_second,
        "params": float(params),
        "gmacs": gmacs,
    }
    return replace(outcome, metrics=outcome.metrics | best, notes=[*notes, *outcome.notes], cost=outcome.cost | cost)


def outcome_of(
    metrics: dict[str, Metric],
    num_samples: int,
    data: LayoutReport,
    spec: BackboneSpec,
    report: ConversionReport,
    job: Job,
    seconds_eval: float,
    main_metric: str = "top1",
    *,
    notes: list[str],
) -> Outcome:
    """The Outcome of a protocol on a set of images."""
    files = {"predictions": PREDICTIONS_FILE, "epochs": EPOCHS_FILE}
    return Outcome(
        task="imagenet",
        dataset=data.name,
        split="val",
        num_samples=num_samples,
        metrics=metrics,
        main_metric=main_metric,
        data_digest=data.digest,
        backbone_spec=spec.to_dict(),
        backbone_digest=report.digest,
        conversion_report=report.to_dict(),
        cost={"seconds_eval": seconds_eval, "peak_memory_mib": peak_memory_mib(torch.device(job.device))},
        notes=notes,
        artefacts={name: file for name, file in files.items() if (job.dir / file).is_file()},
    )
