"""Exact evaluation: every image once over all processes, a prediction kept of each, sums and counts until the last line."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from backbones.translating.report import ConversionReport
from mae_bench.data.batches.loader import evaluation_batches
from mae_bench.data.batches.transforms import eval_transform, normalize
from mae_bench.data.checks.layouts import LayoutReport
from mae_bench.data.sets.source import BadImages, ImageSource
from mae_bench.engine.distributed import gather_over_ranks, world
from mae_bench.engine.precision import autocast
from mae_bench.engine.trainer import Trainer
from mae_bench.errors import UserError
from mae_bench.files import write_atomic, write_json
from mae_bench.job import Job, Outcome
from mae_bench.models.cost import backbone_gmacs, num_params, peak_memory_mib
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec
from tasks.imagenet.config import EvalConfig, ImageConfig
from tasks.imagenet.data import Data

Inputs = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor
]  # indices (N,), targets (N,), what a model takes (N, ...)
PREDICTIONS_FILE = "predictions.npz"
EPOCHS_FILE = "epochs.json"
TOP = 5  # classes kept of every prediction


@dataclass(frozen=True)
class Predictions:
    """What a model said of N images. indices (N,) in the image set, targets (N,), top5 (N, at most 5) classes in falling order
    (-1: no more of them have a vote), margin (N,) of the first over the second logit, loss (N,) the cross-entropies in nats.

    Of neighbours, which give votes, margin is in shares of the votes and there is no loss.
    """

    indices: np.ndarray
    targets: np.ndarray
    top5: np.ndarray
    margin: np.ndarray
    loss: np.ndarray | None = None

    def metrics(self) -> dict[str, Metric]:
        """top1 and top5 in percent, the mean loss in nats."""
        hits, count = self.top5 == self.targets[:, None], len(self.targets)
        found = {
            "top1": Metric(100 * int(hits[:, 0].sum()) / count),
            "top5": Metric(100 * int(hits.any(axis=1).sum()) / count),
        }
        return (
            found
            if self.loss is None
            else found | {"loss": Metric(float(self.loss.mean(dtype=float)), "nats", "lower")}
        )

    def save(self, path: Path) -> None:
        """As a compressed .npz of these arrays. Two models are compared image by image by the indices of their files, which mean
        the same images where their records have one data_digest."""
        arrays = {name: array for name, array in vars(self).items() if array is not None}
        write_atomic(path, lambda file: np.savez_compressed(file, **arrays))


def said(logits: torch.Tensor, indices: torch.Tensor, targets: torch.Tensor) -> Predictions:
    """The predictions of a batch: logits (N, K) in float32, indices and targets (N,)."""
    loss = F.cross_entropy(logits, targets.to(logits.device), reduction="none")
    values, classes = logits.topk(min(TOP, logits.shape[1]), dim=1)
    return Predictions(
        indices.numpy(),
        targets.cpu().numpy(),
        classes.cpu().numpy().astype(np.int32),
        (values[:, 0] - values[:, 1]).cpu().numpy(),
        loss.cpu().numpy(),
    )


def joined(parts: Sequence[Predictions]) -> Predictions:
    """The predictions of several batches in the order of the indices: so sums are the same in whatever batches they came."""
    order = np.argsort(np.concatenate([part.indices for part in parts]), kind="stable")
    names = [name for name, array in vars(parts[0]).items() if array is not None]
    return Predictions(
        **{name: np.concatenate([getattr(part, name) for part in parts])[order] for name in names}
    )


def gathered(parts: Sequence[Predictions], total: int) -> Predictions:
    """The predictions of all processes, on every process alike; UserError where none of the `total` images can be read."""
    everyones = [part for parts in gather_over_ranks(list(parts)) for part in parts]
    if not everyones:
        raise UserError(f"none of {total} images can be read", expected="images that decode")
    return joined(everyones)


@contextmanager
def fits_memory(what: str, fix: str) -> Iterator[None]:
    """UserError where the device's memory does not hold what is done inside."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device's memory does not hold {what}", expected="a batch that fits", fix=fix
        ) from error


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
    def run(self, model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """The model's output in float32; UserError where the device's memory does not hold the batch."""
        size = len(inputs)
        fix = (
            f"set eval_batch_size={size // 2}: the scores stay"
            if size > 1
            else "use a device with more memory"
        )
        with (
            fits_memory(f"an evaluation of {size} images at once", fix),
            autocast(self.device, self.config.amp_dtype),
        ):
            return model(inputs).float()


def predict(
    run: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[Inputs], total: int, progress: Progress
) -> Predictions:
    """What `run` (inputs -> logits) says of all batches of all processes, on every process alike, in the order of the indices.

    total: how many images there are, for the progress. UserError where logits are not finite: the model has diverged.
    """
    progress.stage("evaluate", total)
    seen: list[Predictions] = []
    count = 0
    for indices, targets, inputs in batches:
        seen.append(said(run(inputs), indices, targets))
        count += len(targets)
        progress.step(count * world().size)
    found = gathered(seen, total)
    if found.loss is not None and (strange := int((~np.isfinite(found.loss)).sum())):
        raise UserError(
            f"the loss of {strange} of {len(found.loss)} evaluated images is not finite",
            expected="finite logits: this model has diverged, or its numbers are too large for the precision",
            fix="train with a lower base_lr or with clip_grad, or use amp_dtype=float32",
        )
    return found


def predict_images(
    model: nn.Module, images: ImageSource, bad: BadImages, feed: Feed, progress: Progress
) -> Predictions:
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
    found = predict_images(
        model, data.val, data.bad_val, Feed(config, spec, torch.device(job.device)), progress
    )
    if world().is_main:
        found.save(job.dir / PREDICTIONS_FILE)
    return found.metrics(), len(found.targets)


def watch_epochs(
    trainer: Trainer,
    period: float | None,
    metrics_of: Callable[[nn.Module], dict[str, Metric]],
    job: Job,
    progress: Progress,
) -> None:
    """Evaluates every `period` epochs while training and keeps the list in the job's folder; a resumed run goes on with it.

    What stands there of later steps, or of a run that began anew, is dropped."""
    if world().is_main:
        _write_epochs(
            job, [known for known in epochs_of(job) if known["step"] <= trainer.step] if period else []
        )
    if period is None:
        return

    def hook(model: nn.Module, step: int) -> None:
        found = {name: metric.value for name, metric in metrics_of(model).items()}
        if world().is_main:
            entry = {"step": step, "epoch": step / trainer.steps_per_epoch, **found}
            _write_epochs(job, [*epochs_of(job), entry])
        progress.stage("train", trainer.total_steps)

    trainer.every_epochs(period, hook, everywhere=True)


def _write_epochs(job: Job, epochs: list[dict[str, float]]) -> None:
    if epochs:
        write_json(job.dir / EPOCHS_FILE, epochs)
    else:
        (job.dir / EPOCHS_FILE).unlink(missing_ok=True)


def epochs_of(job: Job) -> list[dict[str, float]]:
    """The evaluations while training, in order; none where there were none."""
    path = job.dir / EPOCHS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def best_epoch(job: Job, last: float, last_top1: float) -> tuple[dict[str, Metric], list[str]]:
    """The best of the evaluations while training and of the `last` epoch's, as metrics beside the score, and a note that says
    which is the score. Nothing where there were none."""
    if not (epochs := epochs_of(job)):
        return {}, []
    told = {entry["epoch"]: entry["top1"] for entry in epochs} | {last: last_top1}
    best = max(told, key=lambda epoch: (told[epoch], -epoch))
    note = f"the score is the last epoch's; best_top1, of epoch {best:g}, was chosen on the validation images themselves"
    return {"best_top1": Metric(told[best]), "best_epoch": Metric(best, "epochs")}, [note]


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
    seconds, params = time.monotonic() - began, num_params(model)
    outcome = outcome_of(
        metrics, num_samples, data.report, config, spec, report, job, seconds, params, notes=data.notes
    )
    return trained_outcome(outcome, trainer, job)


def trained_outcome(outcome: Outcome, trainer: Trainer, job: Job) -> Outcome:
    """An outcome with what its training cost and the best of its epochs."""
    best, notes = best_epoch(job, trainer.step / trainer.steps_per_epoch, outcome.metrics["top1"].value)
    cost = {"seconds_train": trainer.seconds, "images_per_second": trainer.images_per_second}
    return replace(
        outcome, metrics=outcome.metrics | best, notes=[*notes, *outcome.notes], cost=outcome.cost | cost
    )


def outcome_of(
    metrics: dict[str, Metric],
    num_samples: int,
    data: LayoutReport,
    config: ImageConfig,
    spec: BackboneSpec,
    report: ConversionReport,
    job: Job,
    seconds_eval: float,
    params: int,
    main_metric: str = "top1",
    *,
    notes: list[str],
) -> Outcome:
    """The Outcome of a protocol on a set of images.

    images_per_second: evaluated ones; a protocol that trains tells the trained ones in their place.
    """
    cost = {
        "seconds_eval": seconds_eval,
        "images_per_second": num_samples / seconds_eval,
        "params": float(params),
        "gmacs": backbone_gmacs(spec, config.img_size),
        "peak_memory_mib": peak_memory_mib(torch.device(job.device)),
    }
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
        cost=cost,
        notes=notes,
        artefacts={name: file for name, file in files.items() if (job.dir / file).is_file()},
    )
