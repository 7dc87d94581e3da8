"""The config of UperNet on the ADE20K layout with a plain ViT backbone."""

from typing import Literal

from pydantic import Field, model_validator

from mae_bench.config import EvaluationOnly, KeepConfig, NotIdentity


class UPerNetConfig(KeepConfig):
    """UperNet; the defaults are mmsegmentation's MAE recipe for ViT-B, which is BEiT's (arXiv 2106.08254).

    The classes are read from the data.
    """

    crop_size: int = Field(
        512, gt=0, description="side in pixels of the training crop, and of the window if test_mode is slide"
    )
    img_scale: tuple[int, int] = Field(
        (2048, 512), description="largest long and short side in pixels that images are scaled to"
    )
    ratio_range: tuple[float, float] = Field(
        (0.5, 2.0), description="range of the random scale in training, relative to img_scale"
    )
    cat_max_ratio: float = Field(
        0.75, gt=0, le=1, description="largest share of a crop that one class may cover"
    )
    iterations: int = Field(gt=0, description="number of training steps (mmsegmentation: 160000)")
    global_batch_size: int = Field(
        16, ge=2, description="images per training step; BatchNorm after pooling to one pixel needs two"
    )
    lr: float = Field(1e-4, gt=0, description="absolute learning rate, not scaled by the batch size")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's betas")
    weight_decay: float = Field(
        0.05,
        ge=0,
        description="AdamW's weight decay; none for 1-D parameters, position table and prefix tokens",
    )
    layer_decay: float = Field(
        0.65, gt=0, le=1, description="multiply the lr by this once per layer below the head"
    )
    drop_path: float = Field(0.1, ge=0, lt=1, description="rate of the last block; rises linearly from 0")
    warmup_iterations: int = Field(1500, ge=0, description="steps over which the lr rises linearly")
    poly_power: float = Field(
        1.0, gt=0, description="power of the polynomial by which the lr then falls to 0 (PolyLR)"
    )
    amp_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="autocast precision of training; evaluation runs in float32"
    )

    out_indices: tuple[int, int, int, int] | None = Field(
        None, description="0-based blocks whose output the head reads; null: the last of each quarter"
    )
    head_channels: int = Field(768, gt=0, description="width of the UperNet head")
    pool_scales: tuple[int, ...] = Field(
        (1, 2, 3, 6), description="sides in cells of the pyramid pooling's grids"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout rate before the classifiers")
    aux_channels: int = Field(
        256, ge=0, description="width of the auxiliary FCN head on the third feature map; 0: no such head"
    )
    aux_weight: float = Field(0.4, ge=0, description="weight of the auxiliary head's loss")

    test_mode: EvaluationOnly[Literal["whole", "slide"]] = Field(
        "slide", description="whole: one forward pass per image; slide: average over a sliding window"
    )
    test_stride: EvaluationOnly[int] = Field(341, gt=0, description="stride of the sliding window in pixels")
    num_workers: NotIdentity[int] = Field(
        0, ge=0, description="data loader processes; 0 loads images in the training process"
    )
    checkpoint_seconds: NotIdentity[float] = Field(
        30, ge=0, description="seconds between two saved training states"
    )

    @model_validator(mode="after")
    def _check(self) -> "UPerNetConfig":
        if self.warmup_iterations >= self.iterations:
            raise ValueError(
                f"warmup_iterations {self.warmup_iterations} are not fewer than iterations {self.iterations}"
            )
        if not 0 < self.ratio_range[0] <= self.ratio_range[1]:
            raise ValueError(f"ratio_range {self.ratio_range} is not (smallest, largest) above 0")
        if min(self.img_scale) < 1:
            raise ValueError(f"img_scale {self.img_scale} is not two sides in pixels")
        if self.test_mode == "slide" and self.test_stride > self.crop_size:
            raise ValueError(
                f"test_stride {self.test_stride} leaves gaps between windows of crop_size {self.crop_size}"
            )
        return self
