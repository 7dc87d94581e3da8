"""The config of Mask R-CNN on COCO with a plain ViT backbone (ViTDet, arXiv 2203.16527); it imports no framework."""

from typing import Literal

from pydantic import Field, model_validator

from mae_bench.config import JobConfig, NotIdentity


class MaskRCNNConfig(JobConfig):
    """The defaults are detectron2's ViTDet recipe for ViT-B; lengths are iterations, sizes pixels, `lr` is absolute.

    One pyramid level a stride, and one coarser level on top for the RPN; `anchor_sizes` has one size for each of them.
    """

    img_size: int = Field(
        1024, gt=0, description="side of the square that images are scaled, cropped and padded to"
    )
    scale_range: tuple[float, float] = Field(
        (0.1, 2.0), description="of the large-scale jitter, over img_size"
    )
    iterations: int = Field(gt=0)
    global_batch_size: int = Field(64, gt=0)
    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.1, ge=0, description="none for norms, position table and prefix tokens")
    layer_decay: float = Field(0.7, gt=0, le=1)
    drop_path: float = Field(0.1, ge=0, lt=1)
    clip_grad: float | None = Field(None, gt=0, description="largest norm of the gradient")
    lr_schedule: Literal["step", "cosine"] = "step"
    lr_steps: tuple[float, ...] = Field(
        (0.888889, 0.962961), description="shares of the iterations: step divides by 10 there"
    )
    warmup_iterations: int = Field(250, ge=0)
    amp_dtype: Literal["float32", "bfloat16"] = "bfloat16"

    pyramid_strides: tuple[int, ...] = (4, 8, 16, 32)
    pyramid_width: int = Field(256, gt=0)
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    rpn_convs: int = Field(2, gt=0)
    rpn_batch_size: int = Field(256, gt=0, description="anchors an image in the RPN's loss")
    pre_nms_topk: tuple[int, int] = Field(
        (2000, 1000), description="proposals a level before NMS: (training, test)"
    )
    post_nms_topk: tuple[int, int] = Field(
        (1000, 1000), description="proposals an image after NMS: (training, test)"
    )
    roi_batch_size: int = Field(512, gt=0, description="proposals an image in the heads' losses")
    box_conv_dims: tuple[int, ...] = (256, 256, 256, 256)
    box_fc_dims: tuple[int, ...] = Field((1024,), min_length=1)
    mask_conv_dims: tuple[int, ...] = Field(
        (256, 256, 256, 256, 256), min_length=1, description="the last: deconvolution"
    )

    score_threshold: float = Field(0.05, ge=0, lt=1, description="detections below it are dropped")
    detections_per_image: int = Field(100, gt=0)
    eval_batch_size: int = Field(1, gt=0)
    num_workers: NotIdentity[int] = Field(
        0, ge=0, description="loader processes; 0 loads in the training process"
    )
    checkpoint_period: NotIdentity[int] = Field(
        1000, gt=0, description="iterations between two saved training states"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "MaskRCNNConfig":
        levels = len(self.pyramid_strides) + 1
        if len(self.anchor_sizes) != levels:
            raise ValueError(
                f"anchor_sizes has {len(self.anchor_sizes)} sizes for {levels} levels (one a stride, one coarser)"
            )
        if any(
            coarse != 2 * fine
            for fine, coarse in zip(self.pyramid_strides, self.pyramid_strides[1:], strict=False)
        ):
            raise ValueError(
                f"pyramid_strides {self.pyramid_strides} do not double from one level to the next"
            )
        if self.img_size % self.pyramid_strides[-1]:
            raise ValueError(
                f"img_size {self.img_size} is not a multiple of the coarsest stride {self.pyramid_strides[-1]}"
            )
        if not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"scale_range {self.scale_range} is not (smallest, largest) above 0")
        if list(self.lr_steps) != sorted(self.lr_steps) or any(not 0 < step < 1 for step in self.lr_steps):
            raise ValueError(f"lr_steps {self.lr_steps} are not rising shares between 0 and 1")
        if self.warmup_iterations >= self.iterations:
            raise ValueError(
                f"warmup_iterations {self.warmup_iterations} are not fewer than iterations {self.iterations}"
            )
        return self
