"""A classifier on a ViT and its training on augmented images, shared by the ImageNet protocols that train.

N images, L patch tokens, D width, K classes, C channels, H W image.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss.cross_entropy import SoftTargetCrossEntropy
from torch import nn

from backbones.load import load_backbone
from backbones.reading.source import open_source
from backbones.translating.report import ConversionReport
from mae_bench.data.batches.loader import Batch, TrainingOrder, load_training_batches
from mae_bench.data.batches.transforms import normalize
from mae_bench.data.sets.source import ImageSource
from mae_bench.engine.distributed import world
from mae_bench.engine.trainer import Trainer
from mae_bench.errors import UserError
from mae_bench.models.vit import ViT, has_class_token
from mae_bench.record import Metric
from mae_bench.spec import BackboneSpec
from tasks.context import TaskContext
from tasks.imagenet.config import ClassifyConfig, EvalConfig, ImageConfig, PooledConfig
from tasks.imagenet.crops import build_train_crop
from tasks.imagenet.data import Data
from tasks.imagenet.evaluate import Feed, predict_images, watch_epochs
from tasks.imagenet.fit import resolve_img_size
from tasks.trained import Training, train_once

# The MLP half of timm's blocks; gamma_2 is a parameter of BEiT's and EVA's.
MLP_HALF = ("norm2", "mlp", "ls2", "gamma_2", "drop_path2")
BatchStream = Callable[[int, int], Iterator[Batch]]


class Classifier(nn.Module):
    """A ViT, a pooling of its tokens and a linear head.

    fc_norm: replace the backbone's final norm by a new one after the pooling, as MAE fine-tunes. Otherwise
    the backbone keeps its own norm: before the pooling (`norm`) or, in fine-tuned checkpoints, after it
    (`fc_norm`).
    """

    def __init__(
        self, vit: ViT, spec: BackboneSpec, num_classes: int, pool: Literal["token", "avg"], *, fc_norm: bool
    ):
        super().__init__()
        self.vit: Any = vit
        self._frozen: list[nn.Module] = []
        self.pool, self.num_prefix_tokens = pool, spec.num_prefix_tokens
        self.fc_norm: nn.Module = nn.Identity()
        if fc_norm:
            vit.norm = vit.fc_norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(vit.num_features, eps=spec.norm_eps)
        self.head = nn.Linear(vit.num_features, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def freeze(self, last_blocks: float) -> None:
        """Freeze everything before the last blocks; 0.5 trains the MLP half of the last block.

        Frozen modules stay in eval mode, without drop path (arXiv 2111.06377, sections 4.3 and A.1).
        """
        vit = self.vit
        num_tuned = int(last_blocks)
        blocks = list(vit.blocks)
        tuned: list[nn.Module] = blocks[len(blocks) - num_tuned :]
        self._frozen = blocks[: len(blocks) - num_tuned]
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

    def forward_features(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> pooled features (N, D)."""
        tokens = self.vit.forward_features(imgs)  # (N, prefix tokens + L, D)
        pooled = tokens[:, 0] if self.pool == "token" else tokens[:, self.num_prefix_tokens :].mean(dim=1)
        features: torch.Tensor = self.fc_norm(self.vit.fc_norm(pooled))
        return features

    def forward(self, imgs: torch.Tensor) -> torch.Tensor:
        """imgs (N, C, H, W) -> logits (N, K)."""
        return forward_head(self.head, self.forward_features(imgs), self.training)


def forward_head(
    head: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor, training: bool
) -> torch.Tensor:
    """Return the head's logits, in evaluation in float32: in bfloat16 the top logits of many images tie."""
    if training:
        return head(features)
    with torch.autocast(features.device.type, enabled=False):
        return head(features.float())


P = TypeVar("P", bound=PooledConfig)


def resolve_pool(config: P, spec: BackboneSpec) -> P:
    """Return the config with global_pool "own" replaced by the backbone's pooling."""
    if config.global_pool != "own":
        return config
    own = spec.global_pool if has_class_token(spec) else "avg"
    return config.model_copy(update={"global_pool": own})


def require_pool(pool: str, spec: BackboneSpec) -> None:
    """Raise UserError if the class token is asked for and the backbone has none."""
    if pool == "token" and not has_class_token(spec):
        raise UserError(
            "global_pool=token with a backbone that has no class token",
            expected="global_pool=avg for this backbone",
            fix="set tasks.NAME.global_pool=avg, for a grid of heads tasks.NAME.pools=[avg]",
        )


def load_at_size(
    config: ImageConfig, source: str, drop_path_rate: float = 0.0
) -> tuple[ViT, BackboneSpec, ConversionReport]:
    """Load the backbone of a SOURCE with its position table resampled to the protocol's image size."""
    checkpoint = open_source(source)
    vit, spec, report = load_backbone(checkpoint, drop_path_rate=drop_path_rate)
    if isinstance(config, PooledConfig):
        require_pool(config.global_pool, spec)
    img_size = resolve_img_size(config, spec)
    if img_size != spec.img_size:
        vit, spec, report = load_backbone(checkpoint, drop_path_rate=drop_path_rate, img_size=img_size)
    return vit, spec, report


def build_stream(
    context: TaskContext[EvalConfig], images: ImageSource, order: TrainingOrder, auto_augment: str | None
) -> BatchStream:
    """Return a function (start, stop) -> the augmented training batches of those steps."""
    config, spec = context.config, context.spec
    transform = build_train_crop(config, spec, images, auto_augment)

    def stream(start: int, stop: int) -> Iterator[Batch]:
        return load_training_batches(images, transform, order, start, stop, config.num_workers)

    return stream


class MixedLoss:
    """Cross-entropy with mixup, cutmix, label smoothing and random erasing, as MAE fine-tunes."""

    def __init__(self, config: ClassifyConfig, spec: BackboneSpec, num_classes: int, device: torch.device):
        self.config, self.spec, self.device = config, spec, device
        self.mixup: Any = None
        if config.mixes:
            smoothing = config.label_smoothing
            self.mixup = Mixup(
                config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=num_classes
            )
        self.erase: Any = None
        if config.random_erasing:
            self.erase = RandomErasing(config.random_erasing, mode="pixel", device=device.type)
        self.soft_loss: Any = SoftTargetCrossEntropy()

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> torch.Tensor:
        """Return the mean loss of the batch."""
        imgs = normalize(batch.imgs.to(self.device, non_blocking=True), self.spec.mean, self.spec.std)
        targets = batch.targets.to(self.device, non_blocking=True)
        if self.erase:
            imgs = self.erase(imgs)
        if self.mixup:
            imgs, soft_targets = self.mixup(imgs, targets)
            loss: torch.Tensor = self.soft_loss(model(imgs), soft_targets)
            return loss
        return F.cross_entropy(model(imgs), targets, label_smoothing=self.config.label_smoothing)


def train_classifier(
    context: TaskContext[ClassifyConfig],
    data: Data,
    model: Classifier,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
) -> tuple[Classifier, Training]:
    """Train `model`, unless an earlier cell has; return the trained model, averaged if there is an EMA."""
    return train_once(
        context, "train", model, lambda: end_training(_train(context, data, model, make_optimizer))
    )


def end_training(trainer: Trainer) -> tuple[Any, Training]:
    """Return the trained model and what a record states about its training."""
    training = Training(
        trainer.seconds,
        trainer.images_per_second,
        trainer.bad_images.names,
        epochs=trainer.step / trainer.steps_per_epoch,
    )
    return trainer.full_model(), training


def _train(
    context: TaskContext[ClassifyConfig],
    data: Data,
    model: Classifier,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
) -> Trainer:
    config, job = context.config, context.job
    order = TrainingOrder(len(data.train), config.global_batch_size, job.seed, world().rank, world().size)
    trainer = Trainer(
        job,
        config,
        model,
        make_optimizer,
        order.steps_per_epoch,
        context.progress,
        data.bad_train,
        ema_decay=config.ema_decay,
        multiple_of=2 if config.mixes else 1,
    )
    loss = MixedLoss(config, context.spec, data.num_classes, context.device)
    order = replace(order, sizes=trainer.accumulation.sizes)
    watch_epochs(context, trainer, partial(_compute_val_metrics, context, data))
    trainer.fit(build_stream(context, data.train, order, config.auto_augment), loss)
    return trainer


def _compute_val_metrics(
    context: TaskContext[ClassifyConfig], data: Data, model: nn.Module
) -> dict[str, Metric]:
    return predict_images(model, data.val, data.bad_val, Feed(context), context.progress).metrics()
