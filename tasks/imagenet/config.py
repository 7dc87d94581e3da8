"""Configs of the ImageNet protocols."""

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from mae_bench.config import EvaluationOnly, JobConfig, KeepConfig, NotIdentity, TrainConfig
from mae_bench.pretrain.config import ModelConfig

Pool = Literal["token", "avg"]
# A size that follows from the backbone's patch: nearest-HEIGHTxWIDTH.
NEAREST = r"nearest-([1-9]\d*)x([1-9]\d*)"
DataSet = Literal["imagenet-1k", "inat-2017", "inat-2018", "inat-2019", "places205", "places365"]

# Fields of partial_finetune that its linear probe (0 blocks) takes over.
SHARED_WITH_PROBE = (
    "protocol",
    "data",
    "max_bad_images",
    "global_pool",
    "img_size",
    "nearest_to",
    "crop_pct",
    "eval_batch_size",
    "amp_dtype",
    "num_workers",
    "expect",
    "overlap",
    "epochs",
    "base_lr",
    "global_batch_size",
    "device_batch_size",
    "crop_scale",
    "deterministic",
    "compile",
    "parallel",
    "checkpoint_seconds",
    "keep_checkpoints",
    "keep_weights",
    "trackers",
)


class ImageConfig(JobConfig):
    """Fields of every protocol on the ImageNet layout."""

    img_size: tuple[int, int] | Annotated[str, Field(pattern=f"^{NEAREST}$")] | None = Field(
        None,
        description="(height, width) of the input in pixels; null: the size the backbone was trained at; "
        "nearest: the multiples of the backbone's patch that are nearest to nearest_to, or to HxW by "
        "nearest-HxW",
    )
    nearest_to: NotIdentity[tuple[PositiveInt, PositiveInt]] = Field(
        (224, 224), description="what img_size=nearest stands for; img_size then becomes nearest-HxW"
    )
    crop_pct: float = Field(
        0.875,
        gt=0,
        le=1,
        description="evaluation scales the short side to img_size / crop_pct and crops the centre (224/256)",
    )
    eval_batch_size: int = Field(256, gt=0, description="images per process and forward pass in evaluation")
    amp_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="autocast precision; logits and losses are float32 in any case"
    )
    num_workers: NotIdentity[int] = Field(
        0, ge=0, description="data loader processes; 0 loads images in the training process"
    )
    expect: DataSet | None = Field(
        None, description="name of the data set; refuse data with other classes or another number of images"
    )
    overlap: NotIdentity[Literal["note", "refuse"]] = Field(
        "note",
        description="what to do if both splits contain byte-identical images: note it or refuse to run",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_nearest(cls, value: Any) -> Any:
        """Write the size that `nearest` stands for into img_size, which identifies the protocol."""
        if not isinstance(value, dict) or value.get("img_size") != "nearest":
            return value
        height, width = value.get("nearest_to", cls.model_fields["nearest_to"].default)
        return {**value, "img_size": f"nearest-{height}x{width}"}


class PooledConfig(ImageConfig):
    """Fields of the protocols that pool the backbone's tokens."""

    global_pool: Literal["token", "avg", "own"] = Field(
        "avg",
        description="token: class token; avg: mean of the patch tokens; own: as the checkpoint's spec says",
    )


class EvalConfig(TrainConfig, PooledConfig, KeepConfig):
    """Fields of the protocols that train."""

    crop_scale: tuple[float, float] = Field(
        (0.08, 1.0), description="range of RandomResizedCrop, as shares of the image's area"
    )
    eval_epochs: float | None = Field(
        None, gt=0, description="evaluate every so many epochs and report the best; null: only at the end"
    )


class ClassifyConfig(EvalConfig):
    """Fields of the protocols that train the backbone.

    The defaults are those of arXiv 2111.06377, Tables 9 (fine-tuning) and 11 (from scratch).
    """

    global_pool: Pool = Field("avg", description="token: class token; avg: mean of the patch tokens")
    crop_pct: EvaluationOnly[float] = Field(
        0.875,
        gt=0,
        le=1,
        description="evaluation scales the short side to img_size / crop_pct and crops the centre (224/256)",
    )
    auto_augment: str | None = Field(
        "rand-m9-mstd0.5-inc1", description="timm's RandAugment policy (9, 0.5); null: none"
    )
    mixup: float = Field(0.8, ge=0, description="alpha of mixup; 0: off")
    cutmix: float = Field(1.0, ge=0, description="alpha of cutmix; 0: off")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target spread over all classes")
    random_erasing: float = Field(
        0.0, ge=0, le=1, description="probability per image (0.25 in facebookresearch/mae)"
    )
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="rate of the last block; rises linearly from 0 (0.2 for ViT-H)"
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of the weights' moving average per step (Table 11: 0.9999); null: off",
    )

    @model_validator(mode="after")
    def _check_even_batches(self) -> "ClassifyConfig":
        if self.mixes and (self.global_batch_size % 2 or self.device_batch_size == 1):
            raise ValueError(
                f"global_batch_size {self.global_batch_size}, device_batch_size {self.device_batch_size}: "
                "an odd batch, but mixup and cutmix mix images in pairs"
            )
        return self

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs, which requires even batches."""
        return self.mixup > 0 or self.cutmix > 0


class SupervisedConfig(ClassifyConfig):
    """Supervised training from scratch (Table 11); the backbone is exported as a baseline."""

    kind: Literal["supervised"]
    model: ModelConfig
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's betas (Table 11)")

    @model_validator(mode="after")
    def _check_img_size(self) -> "SupervisedConfig":
        if self.img_size not in (None, self.model.img_size):
            raise ValueError(
                f"img_size {self.img_size} with model.img_size {self.model.img_size}: set only model.img_size"
            )
        return self


class FinetuneConfig(ClassifyConfig):
    """End-to-end fine-tuning with layer-wise learning rate decay (Table 9)."""

    kind: Literal["finetune"]
    layer_decay: float = Field(
        0.75, gt=0, le=1, description="multiply the lr by this once per layer below the head (Table 9)"
    )
    export_classifier: bool = Field(
        False,
        description="save the fine-tuned model in `classifier/`, as a source for eval_only and robustness",
    )


class PartialFinetuneConfig(FinetuneConfig):
    """Fine-tuning of only the last blocks, for several numbers of blocks (Figure 9)."""

    kind: Literal["partial_finetune"]  # type: ignore[assignment]
    blocks: list[Annotated[float, Field(ge=0)]] = Field(
        [0, 0.5, 1, 2, 4, 6, 12, 18, 24],
        min_length=1,
        description="numbers of tuned blocks: 0 is a linear probe, 0.5 the MLP of the last block; "
        "numbers above the depth are skipped",
    )
    score: float = Field(1, description="number of blocks whose top1 is the score; one of `blocks`")
    linear: dict[str, Any] = Field(
        {}, description="fields of linear_probe for 0 blocks; they override the fields that both share"
    )

    @model_validator(mode="after")
    def _check_blocks(self) -> "PartialFinetuneConfig":
        wrong = [count for count in self.blocks if count != 0.5 and count % 1]
        if wrong:
            raise ValueError(f"blocks {wrong}: expected 0, 0.5 (the MLP of the last block) or whole numbers")
        if self.score not in self.blocks:
            raise ValueError(f"score {self.score:g} is not one of blocks {self.blocks}")
        if 0 in self.blocks:
            self.build_probe_config()
        return self

    def build_probe_config(self) -> "LinearProbeConfig":
        """Return the linear_probe config that 0 blocks run with."""
        shared = {
            name: getattr(self, name) for name in LinearProbeConfig.model_fields if name in SHARED_WITH_PROBE
        }
        return LinearProbeConfig(**(shared | self.linear | {"kind": "linear_probe"}))


class LinearProbeConfig(EvalConfig):
    """Linear heads on frozen features after a BatchNorm without affine parameters, by LARS (Table 10).

    One head is trained per combination of lrs, pools and layers (by default one: base_lr, global_pool, the
    last layer), all in one pass over the backbone. The head with the best top1 on `holdout` is scored on val.
    """

    kind: Literal["linear_probe"]
    weight_decay: float = Field(0.0, ge=0, description="LARS' weight decay (Table 10: 0)")
    momentum: float = Field(0.9, ge=0, lt=1, description="LARS' momentum (Table 10)")
    lrs: list[Annotated[float, Field(gt=0)]] = Field(
        [], description="base_lr of each head; empty: only base_lr (Table 10: 0.1)"
    )
    pools: list[Pool] = Field([], description="poolings of the features; empty: only global_pool")
    layers: list[Annotated[int, Field(gt=0)]] = Field(
        [1], min_length=1, description="numbers of last blocks whose features are concatenated"
    )
    holdout: float = Field(
        0.0, ge=0, lt=1, description="share of each class's training images kept out to choose the head on"
    )
    features: Literal["augmented", "cached"] = Field(
        "augmented", description="augmented: random crops, anew in every epoch; cached: the centre crop, once"
    )

    @model_validator(mode="after")
    def _check_heads(self) -> "LinearProbeConfig":
        if self.num_heads > 1 and not self.holdout:
            raise ValueError(
                f"{self.num_heads} heads to choose from: set holdout (0.02), a share of train to choose on"
            )
        if self.device_batch_size == 1:
            raise ValueError("device_batch_size 1: the BatchNorm before the heads needs two images or more")
        if self.num_heads > 1 and self.clip_grad:
            raise ValueError(
                f"clip_grad with {self.num_heads} heads: it would clip the norm of all heads together"
            )
        if self.num_heads > 1 and self.eval_epochs:
            raise ValueError(f"eval_epochs with {self.num_heads} heads: the head is chosen only at the end")
        return self

    @property
    def num_heads(self) -> int:
        """Number of heads trained side by side."""
        return max(1, len(self.lrs)) * max(1, len(self.pools)) * len(self.layers)


class KnnConfig(PooledConfig):
    """Weighted nearest neighbours on frozen features (DINO, arXiv 2104.14294, section 4.1, appendix F.1)."""

    kind: Literal["knn"]
    ks: list[Annotated[int, Field(gt=0)]] = Field(
        [10, 20, 100, 200], min_length=1, description="numbers of neighbours (DINO: 10, 20, 100, 200)"
    )
    k: int = Field(20, description="number of neighbours whose top1 is the score; one of `ks` (DINO: 20)")
    temperature: float = Field(0.07, gt=0, description="a neighbour's vote is exp(similarity / temperature)")
    chunk: int = Field(
        65536, gt=0, description="training features per step; memory grows as eval_batch_size x chunk"
    )

    @model_validator(mode="after")
    def _check_k(self) -> "KnnConfig":
        if self.k not in self.ks:
            raise ValueError(f"k {self.k} is not one of ks {self.ks}")
        return self


class FewShotConfig(PooledConfig):
    """A linear classifier on frozen features of a few labelled images, averaged over several random draws."""

    kind: Literal["few_shot"]
    shots: list[Annotated[int, Field(gt=0)]] = Field(
        [1, 2, 5, 10], description="numbers of labelled images per class"
    )
    shares: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        [0.01, 0.1], description="shares of each class's images; at least one image per class is drawn"
    )
    draws: int = Field(5, ge=2, description="number of random draws per number of labels")
    score: str = Field("1%", description="number of labels whose top1 is the score: 5shot, 1%, ...")
    weight_decays: list[Annotated[float, Field(gt=0)]] = Field(
        [1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        min_length=1,
        description="values to choose from, on training images that were not drawn",
    )


class EvalOnlyConfig(ImageConfig):
    """Evaluation of a trained classifier on the validation images; `data` needs no train split."""

    kind: Literal["eval_only"]
    real: str | None = Field(
        None, description="path of ReaL's labels (real.json, arXiv 2006.07159); adds the metric top1_real"
    )


class RobustnessConfig(ImageConfig):
    """Evaluation of an ImageNet-1k classifier on shifted images; `data` is the folder of that set."""

    kind: Literal["robustness"]
    set: Literal["imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-v2", "imagenet-c"] = Field(
        description="the set in `data`"
    )
