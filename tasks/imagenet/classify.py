"""A classifier on a ViT and its training on augmented images: what the ImageNet protocols that train share."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from torch import nn

from backbones.load import load_backbone
from backbones.reading.source import open_source
from backbones.translating.report import ConversionReport
from mae_bench.data.batches.loader import Batch, TrainingOrder, training_batches
from mae_bench.data.batches.transforms import normalize, train_transform
from mae_bench.data.sets.source import ImageSource
from mae_bench.engine.distributed import world
from mae_bench.engine.trainer import Trainer
from mae_bench.errors import UserError
from mae_bench.job import Job
from mae_bench.models.vit import ViT, has_class_token
from mae_bench.progress import Progress
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec
from tasks.imagenet.config import ClassifyConfig, EvalConfig, ImageConfig, PooledConfig
from tasks.imagenet.data import Data
from tasks.imagenet.evaluate import Feed, predict_images, watch_epochs

MLP_HALF = (
    "norm2",
    "mlp",
    "ls2",
    "gamma_2",
    "drop_path2",
)  # of timm's blocks; gamma_2 is a parameter of BEiT's and EVA's
BatchStream = Callable[[int, int], Iterator[Batch]]


class Classifier(nn.Module):
    """Pooled features and a linear head. N images, L patch tokens, D width, K classes.

    fc_norm: the backbone's final norm is dropped and a new one stands behind the pooling, as MAE fine-tunes; without it the
    backbone keeps its own, in front of the pooling (`norm`) or, in fine-tuned files, behind it (`fc_norm`).
    """

    def __init__(
        self, vit: ViT, spec: BackboneSpec, num_classes: int, pool: Literal["token", "avg"], *, fc_norm: bool
    ):
        super().__init__()
        self.vit: Any = vit
        self._frozen: list[nn.Module] = []
        self.pool, self.num_prefix_tokens = pool, spec.num_prefix_tokens
        if fc_norm:
            vit.norm = vit.fc_norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(vit.num_features, eps=spec.norm_eps) if fc_norm else nn.Identity()
        self.head = nn.Linear(vit.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def freeze(self, last_blocks: float) -> None:
        """Leaves the last blocks, what follows them and the head to be trained; 0.5 is the MLP half of the last block.

        What is frozen stays in eval mode: no drop path where nothing learns (arXiv 2111.06377, section 4.3 and A.1)."""
        vit = self.vit
        whole = int(last_blocks)
        blocks = list(vit.blocks)
        tuned: list[nn.Module] = blocks[len(blocks) - whole :]
        self._frozen = blocks[: len(blocks) - whole]
        scales: list[nn.Parameter] = []
        if last_blocks % 1:
            last = self._frozen.pop()
            tuned += [part for name, part in last.named_children() if name in MLP_HALF]
            self._frozen += [part for name, part in last.named_children() if name not in MLP_HALF]
            scales = [scale for name, scale in last.named_parameters(recurse=False) if name in MLP_HALF]
        vit.requires_grad_(False)
        for part in (*tuned, vit.norm, vit.fc_norm, *scales):
            part.requires_grad_(True)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def features(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> (N, D)."""
        tokens = self.vit.forward_features(imgs)
        pooled = tokens[:, 0] if self.pool == "token" else tokens[:, self.num_prefix_tokens :].mean(dim=1)
        return self.fc_norm(self.vit.fc_norm(pooled))

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> logits (N, K)."""
        return logits_of(self.head, self.features(imgs), self.training)


def logits_of(
    head: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor, training: bool
) -> torch.Tensor:
    """The head's logits; in evaluation in float32, whatever the precision before it: in bfloat16 many images have two first
    classes."""
    if training:
        return head(features)
    with torch.autocast(features.device.type, enabled=False):
        return head(features.float())


def size_of(config: ImageConfig, spec: BackboneSpec) -> tuple[int, int]:
    """The image size of the protocol; one that the patch does not divide raises UserError."""
    size = config.img_size or spec.img_size
    if any(side % patch for side, patch in zip(size, spec.patch_size, strict=True)):
        raise UserError(
            f"img_size {size} with a patch of {spec.patch_size}", expected="sides that the patch divides"
        )
    return size


C = TypeVar("C", bound=PooledConfig)


def pooled_as_it_is(config: C, spec: BackboneSpec) -> C:
    """The config with a pooling of its own in the place of "own"."""
    own = spec.global_pool if has_class_token(spec) else "avg"
    return config.model_copy(update={"global_pool": own}) if config.global_pool == "own" else config


def require_pool(pool: str, spec: BackboneSpec) -> None:
    """UserError where the class token is asked for and there is none."""
    if pool == "token" and not has_class_token(spec):
        raise UserError(
            "global_pool=token with a backbone that has no class token",
            expected="global_pool=avg for this backbone",
            fix="set tasks.NAME.global_pool=avg, for a grid of heads tasks.NAME.pools=[avg]",
        )


def load_at_size(
    config: ImageConfig, source: str, drop_path_rate: float = 0.0
) -> tuple[ViT, BackboneSpec, ConversionReport]:
    """The backbone behind a SOURCE, its position table resampled to the protocol's image size."""
    checkpoint = open_source(source)
    vit, spec, report = load_backbone(checkpoint, drop_path_rate=drop_path_rate)
    if isinstance(config, PooledConfig):
        require_pool(config.global_pool, spec)
    img_size = size_of(config, spec)
    if img_size != spec.img_size:
        vit, spec, report = load_backbone(checkpoint, drop_path_rate=drop_path_rate, img_size=img_size)
    return vit, spec, report


def order_of(config: EvalConfig, data: Data, seed: int) -> TrainingOrder:
    """The order of this process's training images."""
    return TrainingOrder(len(data.train), config.global_batch_size, seed, world().rank, world().size)


def stream(
    images: ImageSource,
    config: EvalConfig,
    order: TrainingOrder,
    spec: BackboneSpec,
    auto_augment: str | None,
) -> BatchStream:
    """A function (start, stop) -> the augmented training batches of those steps."""
    transform = train_transform(
        config.img_size or spec.img_size, config.crop_scale, spec.interpolation, auto_augment=auto_augment
    )

    def batches(start: int, stop: int) -> Iterator[Batch]:
        return training_batches(images, transform, order, start, stop, config.num_workers)

    return batches


class MixedLoss:
    """Cross-entropy under mixup, cutmix, label smoothing and random erasing, as MAE fine-tunes."""

    def __init__(self, config: ClassifyConfig, spec: BackboneSpec, num_classes: int, device: torch.device):
        self.config, self.spec, self.device = config, spec, device
        mixup = partial(
            Mixup,
            config.mixup,
            config.cutmix,
            label_smoothing=config.label_smoothing,
            num_classes=num_classes,
        )
        self.mixup = mixup() if config.mixes else None
        self.erase = (
            RandomErasing(config.random_erasing, mode="pixel", device=device.type)
            if config.random_erasing
            else None
        )
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
    loss = MixedLoss(config, spec, data.num_classes, torch.device(job.device))
    order = replace(order, sizes=trainer.accumulation.sizes)
    feed = Feed(config, spec, torch.device(job.device))
    metrics_of = partial(_val_metrics, data, feed, progress)
    watch_epochs(trainer, config.eval_epochs, metrics_of, job, progress)
    trainer.fit(stream(data.train, config, order, spec, config.auto_augment), loss)
    return trainer


def _val_metrics(data: Data, feed: Feed, progress: Progress, model: nn.Module) -> dict[str, Metric]:
    return predict_images(model, data.val, data.bad_val, feed, progress).metrics()
