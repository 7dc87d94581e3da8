"""The config of UperNet on ADE20K's layout with a plain ViT backbone; it imports no framework."""

from typing import Literal

from pydantic import Field, model_validator

from mae_bench.config import JobConfig, NotIdentity


class UPerNetConfig(JobConfig):
    """The defaults are mmsegmentation's MAE recipe for ViT-B (BEiT's, arXiv 2106.08254); sizes are pixels, `lr` is absolute.

    The classes come from the data. The learning rate rises linearly, then falls to 0 as a polynomial (mmengine's PolyLR).
    """

    crop_size: int = Field(
        512, gt=0, description="side of the training crop, and of the window where test_mode is slide"
    )
    img_scale: tuple[int, int] = Field(
        (2048, 512), description="largest long and short side that images are scaled to"
    )
    ratio_range: tuple[float, float] = Field(
        (0.5, 2.0), description="of the random scale in training, over img_scale"
    )
    cat_max_ratio: float = Field(
        0.75, gt=0, le=1, description="largest share of a crop that one class may cover"
    )
    iterations: int = Field(gt=0)
    global_batch_size: int = Field(
        16, ge=2, description="at least 2: the head normalises maps of one pixel over the batch"
    )
    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(
        0.05, ge=0, description="none for 1-D parameters, position table and prefix tokens"
    )
    layer_decay: float = Field(0.65, gt=0, le=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    warmup_iterations: int = Field(1500, ge=0)
    poly_power: float = Field(1.0, gt=0)
    amp_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="of training; evaluation is in float32"
    )

    out_indices: tuple[int, int, int, int] | None = Field(
        None, description="0-based blocks; by default each quarter's last"
    )
    head_channels: int = Field(768, gt=0)
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = Field(0.1, ge=0, lt=1, description="before the classifiers")
    aux_channels: int = Field(
        256, ge=0, description="of the auxiliary FCN head on the third map; 0 leaves the head out"
    )
    aux_weight: float = Field(0.4, ge=0)

    test_mode: Literal["whole", "slide"] = "slide"
    test_stride: int = Field(341, gt=0, description="of the sliding window")
    num_workers: NotIdentity[int] = Field(
        0, ge=0, description="loader processes; 0 loads in the training process"
    )
    checkpoint_seconds: NotIdentity[float] = Field(
        30, ge=0, description="seconds between two saved training states"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "UPerNetConfig":
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
