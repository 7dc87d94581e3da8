"""Configs of the ImageNet protocols: supervised training from scratch, fine-tuning, linear probing."""

from typing import Literal

from pydantic import Field, model_validator

from mae_bench.config import TrainConfig
from mae_bench.pretrain_config import ModelConfig


class EvalConfig(TrainConfig):
    """What every protocol on the ImageNet layout shares. img_size None: the size that the backbone was trained at."""

    img_size: tuple[int, int] | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_pct: float = Field(0.875, gt=0, le=1, description="evaluation resizes the short side to img_size / crop_pct")
    eval_batch_size: int = Field(256, gt=0)
    global_pool: Literal["token", "avg"] = "avg"


class ClassifyConfig(EvalConfig):
    """Training all weights of a classifier (arXiv 2111.06377, Tables 9 and 11)."""

    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    mixup: float = Field(0.8, ge=0)
    cutmix: float = Field(1.0, ge=0)
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    random_erasing: float = Field(0.0, ge=0, le=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    ema_decay: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _even_batches(self) -> "ClassifyConfig":
        if self.mixes and (self.global_batch_size % 2 or self.device_batch_size == 1):
            raise ValueError(
                f"global_batch_size {self.global_batch_size}, device_batch_size {self.device_batch_size}: "
                "an odd batch, and mixup and cutmix mix pairs"
            )
        return self

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs, so that batches have to be even."""
        return self.mixup > 0 or self.cutmix > 0


class SupervisedConfig(ClassifyConfig):
    """The supervised baseline from scratch (Table 11); its backbone is exported."""

    kind: Literal["supervised"]
    model: ModelConfig
    betas: tuple[float, float] = (0.9, 0.95)


class FinetuneConfig(ClassifyConfig):
    """End-to-end fine-tuning with layer-wise learning-rate decay (Table 9)."""

    kind: Literal["finetune"]
    layer_decay: float = Field(0.75, gt=0, le=1)


class LinearProbeConfig(EvalConfig):
    """A linear classifier on frozen features behind a BatchNorm without affine parameters, trained by LARS (Table 10)."""

    kind: Literal["linear_probe"]
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
