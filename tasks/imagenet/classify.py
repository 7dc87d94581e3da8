"""A classifier on a ViT, its training on augmented images and its exact evaluation: what the ImageNet protocols share."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch import nn

from backbones.load import load_backbone
from backbones.report import ConversionReport
from mae_bench.cost import backbone_gmacs, num_params, peak_memory_mib
from mae_bench.data.images import BadImages, ImageSource, open_images
from mae_bench.data.layouts import LayoutReport, check_layout
from mae_bench.data.loader import Batch, TrainingOrder, evaluation_batches, training_batches
from mae_bench.data.transforms import eval_transform, normalize, train_transform
from mae_bench.engine.distributed import gather_over_ranks, sum_over_ranks, world
from mae_bench.engine.precision import autocast
from mae_bench.engine.trainer import Trainer
from mae_bench.errors import UserError
from mae_bench.files import write_atomic
from mae_bench.job import Job, Outcome
from mae_bench.models.vit import ViT
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec
from tasks.imagenet.config import ClassifyConfig, EvalConfig

PREDICTIONS_FILE = "predictions.npz"
BatchStream = Callable[[int, int], Iterator[Batch]]
TOP = 5  # classes kept of every prediction


class Classifier(nn.Module):
    """Pooled features and a linear head. N images, L patch tokens, D width, K classes.

    fc_norm: the backbone's final norm is dropped and a new one stands behind the pooling, as MAE fine-tunes; without it the
    backbone keeps its own, in front of the pooling (`norm`) or, in fine-tuned files, behind it (`fc_norm`).
    """

    def __init__(self, vit: ViT, spec: BackboneSpec, num_classes: int, pool: Literal["token", "avg"], *, fc_norm: bool):
        super().__init__()
        self.vit: Any = vit
        self.pool, self.num_prefix_tokens = pool, spec.num_prefix_tokens
        if fc_norm:
            vit.norm = vit.fc_norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(vit.num_features, eps=spec.norm_eps) if fc_norm else nn.Identity()
        self.head = nn.Linear(vit.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def features(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> (N, D)."""
        tokens = self.vit.forward_features(imgs)
        pooled = tokens[:, 0] if self.pool == "token" else tokens[:, self.num_prefix_tokens :].mean(dim=1)
        return self.fc_norm(self.vit.fc_norm(pooled))

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> logits (N, K)."""
        return self.head(self.features(imgs))


@dataclass(frozen=True)
class Data:
    """Both splits of an ImageNet layout, checked, with the budget of images that may fail to decode."""

    report: LayoutReport
    train: ImageSource
    val: ImageSource
    bad_train: BadImages
    bad_val: BadImages

    @property
    def notes(self) -> list[str]:
        return [note for note in (self.bad_train.note(), self.bad_val.note()) if note]


def open_data(config: EvalConfig) -> Data:
    """Checks the layout before anything is trained."""
    root = Path(config.data)
    report = check_layout("imagenet", root)
    train, val = open_images(root, "train"), open_images(root, "val")
    return Data(report, train, val, BadImages(config.max_bad_images, len(train)), BadImages(config.max_bad_images, len(val)))


def require_vit(config: EvalConfig, spec: BackboneSpec) -> tuple[int, int]:
    """The image size of the protocol; one that the patch does not divide raises UserError."""
    size = config.img_size or spec.img_size
    if any(side % patch for side, patch in zip(size, spec.patch_size, strict=True)):
        raise UserError(f"img_size {size} with a patch of {spec.patch_size}", expected="sides that the patch divides")
    if spec.num_prefix_tokens == 0 and config.global_pool == "token":
        raise UserError("global_pool=token with a backbone that has no class token", expected="global_pool=avg for this backbone")
    return size


def load_at_size(config: EvalConfig, source: str, drop_path_rate: float = 0.0) -> tuple[ViT, BackboneSpec, ConversionReport]:
    """The backbone behind a SOURCE, its position table resampled to the protocol's image size."""
    vit, spec, report = load_backbone(source, drop_path_rate=drop_path_rate)
    img_size = require_vit(config, spec)
    if img_size != spec.img_size:
        vit, spec, report = load_backbone(source, drop_path_rate=drop_path_rate, img_size=img_size)
    return vit, spec, report


def order_of(config: EvalConfig, data: Data, seed: int) -> TrainingOrder:
    """The order of this process's training images."""
    return TrainingOrder(len(data.train), config.global_batch_size, seed, world().rank, world().size)


def stream(data: Data, config: EvalConfig, order: TrainingOrder, spec: BackboneSpec, auto_augment: str | None) -> BatchStream:
    """A function (start, stop) -> the augmented training batches of those steps."""
    transform = train_transform(
        config.img_size or spec.img_size, config.crop_scale, spec.interpolation, auto_augment=auto_augment
    )

    def batches(start: int, stop: int) -> Iterator[Batch]:
        return training_batches(data.train, transform, order, start, stop, config.num_workers)

    return batches


class MixedLoss:
    """Cross-entropy under mixup, cutmix, label smoothing and random erasing, as MAE fine-tunes."""

    def __init__(self, config: ClassifyConfig, spec: BackboneSpec, num_classes: int, device: torch.device):
        self.config, self.spec, self.device = config, spec, device
        mixup = partial(Mixup, config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=num_classes)
        self.mixup = mixup() if config.mixes else None
        self.erase = RandomErasing(config.random_erasing, mode="pixel", device=device.type) if config.random_erasing else None
        self.soft = SoftTargetCrossEntropy()

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
        """The mean loss of the batch."""
        imgs = normalize(batch.imgs.to(self.device, non_blocking=True), self.spec.mean, self.spec.std)
        targets = batch.targets.to(self.device, non_blocking=True)
        if self.erase:
            imgs = self.erase(imgs)
        if self.mixup:
            imgs, soft = self.mixup(imgs, targets)
            return self.soft(model(imgs), soft)
        return F.cross_entropy(model(imgs), targets, label_smoothing=self.config.label_smoothing)


def train_classifier(
    config: ClassifyConfig,
    job: Job,
    progress: Progress,
    data: Data,
    model: Classifier,
    spec: BackboneSpec,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
) -> Trainer:
    """Trains all of `model`; the trainer that it returns has the full model, its EMA if any, and the times."""
    order = order_of(config, data, job.seed)
    trainer = Trainer(
        job,
        config,
        model,
        make_optimizer,
        order.steps_per_epoch,
        progress,
        data.bad_train,
        ema_decay=config.ema_decay,
        multiple_of=2 if config.mixes else 1,
    )
    loss = MixedLoss(config, spec, len(data.report.classes), torch.device(job.device))
    order = replace(order, sizes=trainer.accumulation.sizes)
    trainer.fit(stream(data, config, order, spec, config.auto_augment), loss)
    return trainer


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Data, config: EvalConfig, spec: BackboneSpec, job: Job, progress: Progress
) -> tuple[dict[str, Metric], int]:
    """Every validation image once over all processes: top1 and top5 in percent, loss in nats, and how many images there were.

    Sums and counts until the last line. The predictions (top-5 classes, margin of the first over the second logit) are kept as
    `predictions.npz` in the job's folder, so that two models can be compared image by image.
    """
    model.eval()
    device = torch.device(job.device)
    transform = eval_transform(config.img_size or spec.img_size, config.crop_pct, spec.interpolation)
    progress.stage("evaluate", len(data.val))
    seen: list[tuple[np.ndarray, ...]] = []
    loss_sum, count = 0.0, 0
    for batch in evaluation_batches(data.val, transform, config.eval_batch_size, config.num_workers, world().rank, world().size):
        for name, reason in batch.bad:
            data.bad_val.add(name, reason)
        if not len(batch.targets):
            continue
        with autocast(device, config.amp_dtype):
            logits = model(normalize(batch.imgs.to(device), spec.mean, spec.std)).float()
        loss_sum += F.cross_entropy(logits, batch.targets.to(device), reduction="sum").item()
        values, classes = logits.topk(min(TOP, logits.shape[1]), dim=1)
        seen.append(
            (batch.indices.numpy(), batch.targets.numpy(), classes.cpu().numpy(), (values[:, 0] - values[:, 1]).cpu().numpy())
        )
        count += len(batch.targets)
        progress.step(count)
    loss_sum, num_samples = sum_over_ranks([loss_sum, count])
    seen = [part for parts in gather_over_ranks(seen) for part in parts]
    for name, reason in (item for names in gather_over_ranks(data.bad_val.names) for item in names.items()):
        data.bad_val.add(name, reason)
    indices, targets, classes, margin = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    if world().is_main:
        write_atomic(
            job.dir / PREDICTIONS_FILE,
            lambda file: np.savez_compressed(
                file, indices=indices, targets=targets, top5=classes.astype(np.int32), margin=margin
            ),
        )
    hits = classes == targets[:, None]
    return {
        "top1": Metric(100 * int(hits[:, 0].sum()) / num_samples),
        "top5": Metric(100 * int(hits.any(axis=1).sum()) / num_samples),
        "loss": Metric(loss_sum / num_samples, "nats", "lower"),
    }, int(num_samples)


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
    return Outcome(
        task="imagenet",
        dataset=data.report.name,
        split="val",
        num_samples=num_samples,
        metrics=metrics,
        main_metric="top1",
        data_digest=data.report.digest,
        backbone_spec=spec.to_dict(),
        backbone_digest=report.digest,
        conversion_report=report.to_dict(),
        cost={
            "seconds_train": trainer.seconds,
            "seconds_eval": time.monotonic() - began,
            "images_per_second": trainer.images_per_second,
            "params": num_params(model),
            "gmacs": backbone_gmacs(spec, config.img_size),
            "peak_memory_mib": peak_memory_mib(torch.device(job.device)),
        },
        notes=data.notes,
        artefacts={"predictions": PREDICTIONS_FILE},
    )
