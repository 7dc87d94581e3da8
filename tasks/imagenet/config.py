"""Configs of the ImageNet protocols."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mae_bench.config import JobConfig, TrainConfig
from mae_bench.pretrain.config import ModelConfig

Pool = Literal["token", "avg"]
SHARED_WITH_PROBE = (
    "protocol",
    "data",
    "max_bad_images",
    "global_pool",
    "img_size",
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
    "trackers",
)


class ImageConfig(JobConfig):
    """What every protocol on the ImageNet layout shares. img_size None: the size that the backbone was trained at."""

    img_size: tuple[int, int] | None = None
    crop_pct: float = Field(
        0.875, gt=0, le=1, description="evaluation resizes the short side to img_size / crop_pct"
    )
    eval_batch_size: int = Field(256, gt=0)
    amp_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    num_workers: int = Field(0, ge=0, description="loader processes; 0 loads in the training process")
    expect: Literal["imagenet-1k", "inat-2017", "inat-2018", "inat-2019", "places205", "places365"] | None = (
        Field(
            None,
            description="the data set that the numbers are for: another list of classes or number of images is refused",
        )
    )
    overlap: Literal["note", "refuse"] = Field(
        "note",
        description="what becomes of a set whose splits share images, byte for byte: it is told in the record, or refused",
    )


class PooledConfig(ImageConfig):
    """What protocols that pool a backbone's tokens themselves share."""

    global_pool: Literal["token", "avg", "own"] = Field(
        "avg", description="own: as the checkpoint's authors pool, by its spec"
    )


class EvalConfig(TrainConfig, PooledConfig):
    """What every protocol that trains shares."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    eval_epochs: float | None = Field(
        None,
        gt=0,
        description="epochs between two evaluations while training, of which the best is told; none: at the end alone",
    )


class ClassifyConfig(EvalConfig):
    """Training all weights of a classifier (arXiv 2111.06377, Tables 9 and 11)."""

    global_pool: Pool = "avg"
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

    @model_validator(mode="after")
    def _has_one_size(self) -> "SupervisedConfig":
        if self.img_size not in (None, self.model.img_size):
            raise ValueError(
                f"img_size {self.img_size} with model.img_size {self.model.img_size}: set the model's alone"
            )
        return self


class FinetuneConfig(ClassifyConfig):
    """End-to-end fine-tuning with layer-wise learning-rate decay (Table 9)."""

    kind: Literal["finetune"]
    layer_decay: float = Field(0.75, gt=0, le=1)
    export_classifier: bool = Field(
        False,
        description="keep the fine-tuned model as `classifier/` in the cell's folder, a checkpoint for eval_only and robustness",
    )


class PartialFinetuneConfig(FinetuneConfig):
    """Fine-tuning the last blocks alone, for several numbers of blocks: a curve (Figure 9).

    blocks: 0 is a linear probe by `linear`, 0.5 the MLP of the last block, a number above the depth is left out.
    """

    kind: Literal["partial_finetune"]  # type: ignore[assignment]
    blocks: list[Annotated[float, Field(ge=0)]] = Field([0, 0.5, 1, 2, 4, 6, 12, 18, 24], min_length=1)
    score: float = Field(1, description="the one of `blocks` that is the score")
    linear: dict[str, Any] = Field(
        {}, description="fields of linear_probe for 0 blocks, over those that both have"
    )

    @model_validator(mode="after")
    def _counts_blocks(self) -> "PartialFinetuneConfig":
        if wrong := [count for count in self.blocks if count != 0.5 and count % 1]:
            raise ValueError(f"blocks {wrong}: 0, 0.5 (the MLP of the last block) or whole numbers")
        if self.score not in self.blocks:
            raise ValueError(f"score {self.score:g} is none of blocks {self.blocks}")
        if 0 in self.blocks:
            self.probe()
        return self

    def probe(self) -> "LinearProbeConfig":
        """The config of 0 blocks."""
        shared = {
            name: getattr(self, name) for name in LinearProbeConfig.model_fields if name in SHARED_WITH_PROBE
        }
        return LinearProbeConfig(**(shared | self.linear | {"kind": "linear_probe"}))


class LinearProbeConfig(EvalConfig):
    """Linear classifiers on frozen features behind a BatchNorm without affine parameters, trained by LARS (Table 10).

    One head for each of lrs x pools x layers (by default one: base_lr, global_pool, the last layer), all in one pass over the
    backbone; the best on `holdout`, a share of the training images that none is trained on, is scored on val.
    """

    kind: Literal["linear_probe"]
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    lrs: list[Annotated[float, Field(gt=0)]] = Field(
        [], description="base_lr of each head; none: base_lr alone"
    )
    pools: list[Pool] = Field([], description="none: global_pool alone")
    layers: list[Annotated[int, Field(gt=0)]] = Field(
        [1], min_length=1, description="how many last blocks are joined"
    )
    holdout: float = Field(
        0.0, ge=0, lt=1, description="share of each class's training images that heads are chosen on"
    )
    features: Literal["augmented", "cached"] = Field(
        "augmented",
        description="each image anew in each epoch, cropped at random; or once, cropped in the centre",
    )

    @model_validator(mode="after")
    def _chooses_fairly(self) -> "LinearProbeConfig":
        if self.num_heads > 1 and not self.holdout:
            raise ValueError(
                f"{self.num_heads} heads to choose from: set holdout (0.02), a share of train; val is not chosen on"
            )
        if self.device_batch_size == 1:
            raise ValueError(
                "device_batch_size 1: a BatchNorm stands before the heads, and one image has no variance"
            )
        if self.num_heads > 1 and self.clip_grad:
            raise ValueError(
                f"clip_grad with {self.num_heads} heads: the norm is that of all, and each is trained as if alone"
            )
        if self.num_heads > 1 and self.eval_epochs:
            raise ValueError(f"eval_epochs with {self.num_heads} heads: the head is chosen at the end")
        return self

    @property
    def num_heads(self) -> int:
        """Heads trained side by side."""
        return max(1, len(self.lrs)) * max(1, len(self.pools)) * len(self.layers)


class KnnConfig(PooledConfig):
    """Weighted nearest neighbours on frozen features (DINO, arXiv 2104.14294, section 4.1 and appendix)."""

    kind: Literal["knn"]
    ks: list[Annotated[int, Field(gt=0)]] = Field([10, 20, 100, 200], min_length=1)
    k: int = Field(20, description="the one of `ks` that is the score, as DINO's")
    temperature: float = Field(0.07, gt=0)
    chunk: int = Field(
        65536, gt=0, description="training features at a time: memory is eval_batch_size x chunk"
    )

    @model_validator(mode="after")
    def _scores_one_of_them(self) -> "KnnConfig":
        if self.k not in self.ks:
            raise ValueError(f"k {self.k} is none of ks {self.ks}")
        return self


class FewShotConfig(PooledConfig):
    """A linear classifier on frozen features of few labelled images, drawn several times."""

    kind: Literal["few_shot"]
    shots: list[Annotated[int, Field(gt=0)]] = Field([1, 2, 5, 10], description="images a class")
    shares: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        [0.01, 0.1], description="of each class's images, at least one"
    )
    draws: int = Field(5, ge=2)
    score: str = Field("1%", description="the one that is the score: 5shot, 1% ...")
    weight_decays: list[Annotated[float, Field(gt=0)]] = Field(
        [1e-4, 1e-3, 1e-2, 1e-1, 1.0],
        min_length=1,
        description="chosen on training images that were not drawn",
    )


class EvalOnlyConfig(ImageConfig):
    """A classifier as it is, on the validation images; `data` needs no train split."""

    kind: Literal["eval_only"]
    real: str | None = Field(
        None, description="ReaL's labels (real.json, arXiv 2006.07159): top1_real is told too"
    )


class RobustnessConfig(ImageConfig):
    """A classifier of ImageNet-1k as it is, on images that its training did not see the like of (`data` is that set's folder)."""

    kind: Literal["robustness"]
    set: Literal["imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-v2", "imagenet-c"]
