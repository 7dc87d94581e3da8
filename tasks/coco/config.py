"""The config of Mask R-CNN on COCO with a plain ViT backbone (ViTDet, arXiv 2203.16527)."""

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from mae_bench.config import EvaluationOnly, KeepConfig, NotIdentity


class MaskRCNNConfig(KeepConfig):
    """Mask R-CNN; the defaults are detectron2's ViTDet recipe for ViT-B.

    The 100 epochs of the paper are 184,375 iterations of 64 images. There is one pyramid level per stride and
    one coarser level for the RPN; `anchor_sizes` has one size per level.
    """

    img_size: int = Field(
        1024, gt=0, description="side in pixels of the square that images are scaled, cropped and padded to"
    )
    scale_range: tuple[float, float] = Field(
        (0.1, 2.0), description="range of the large-scale jitter, relative to img_size"
    )
    iterations: int = Field(gt=0, description="number of training steps (ViTDet: 184375)")
    global_batch_size: int = Field(64, gt=0, description="images per training step")
    lr: float = Field(1e-4, gt=0, description="absolute learning rate, not scaled by the batch size")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's betas")
    weight_decay: float = Field(
        0.1, ge=0, description="AdamW's weight decay; none for norms, position table and prefix tokens"
    )
    layer_decay: float = Field(
        0.7, gt=0, le=1, description="multiply the lr by this once per layer below the head (ViT-L: 0.8)"
    )
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="rate of the last block; rises linearly from 0 (ViT-L: 0.4)"
    )
    clip_grad: float | None = Field(None, gt=0, description="largest norm of the gradient; null: no limit")
    lr_schedule: Literal["step", "cosine"] = Field("step", description="shape of the lr after the warmup")
    lr_steps: tuple[float, ...] = Field(
        (0.888889, 0.962961), description="shares of the iterations at which `step` divides the lr by 10"
    )
    warmup_iterations: int = Field(250, ge=0, description="steps over which the lr rises linearly")
    amp_dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="autocast precision of training"
    )

    pyramid_strides: tuple[int, ...] = Field(
        (4, 8, 16, 32), description="strides in pixels of the simple feature pyramid's levels"
    )
    pyramid_width: int = Field(256, gt=0, description="channels of each pyramid level")
    anchor_sizes: tuple[int, ...] = Field(
        (32, 64, 128, 256, 512), description="side of the anchors in pixels, one per level"
    )
    rpn_convs: int = Field(2, gt=0, description="hidden convolutions of the RPN")
    rpn_batch_size: int = Field(256, gt=0, description="anchors per image in the RPN's loss")
    pre_nms_topk: tuple[int, int] = Field(
        (2000, 1000), description="proposals per level before NMS: (training, test)"
    )
    post_nms_topk: tuple[int, int] = Field(
        (1000, 1000), description="proposals per image after NMS: (training, test)"
    )
    roi_batch_size: int = Field(512, gt=0, description="proposals per image in the losses of the heads")
    box_conv_dims: tuple[int, ...] = Field(
        (256, 256, 256, 256), description="widths of the box head's convolutions"
    )
    box_fc_dims: tuple[int, ...] = Field(
        (1024,), min_length=1, description="widths of the box head's linear layers"
    )
    mask_conv_dims: tuple[int, ...] = Field(
        (256, 256, 256, 256, 256),
        min_length=1,
        description="widths of the mask head's convolutions; the last is a deconvolution",
    )

    score_threshold: EvaluationOnly[float] = Field(
        0.05, ge=0, lt=1, description="drop detections with a lower score"
    )
    detections_per_image: EvaluationOnly[int] = Field(
        100, gt=0, description="largest number of detections per image"
    )
    eval_batch_size: EvaluationOnly[int] = Field(1, gt=0, description="images per forward pass in evaluation")
    num_workers: NotIdentity[int] = Field(
        0, ge=0, description="data loader processes; 0 loads images in the training process"
    )
    checkpoint_period: NotIdentity[int] = Field(
        1000, gt=0, description="iterations between two saved training states"
    )

    @model_validator(mode="after")
    def _check(self) -> "MaskRCNNConfig":
        num_levels = len(self.pyramid_strides) + 1
        if len(self.anchor_sizes) != num_levels:
            raise ValueError(
                f"anchor_sizes has {len(self.anchor_sizes)} sizes for {num_levels} levels "
                "(one per stride and one coarser)"
            )
        if any(coarse != 2 * fine for fine, coarse in pairwise(self.pyramid_strides)):
            raise ValueError(
                f"pyramid_strides {self.pyramid_strides} do not double from one level to the next"
            )
        coarsest = self.pyramid_strides[-1]
        if self.img_size % coarsest:
            raise ValueError(f"img_size {self.img_size} is not a multiple of the coarsest stride {coarsest}")
        if not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"scale_range {self.scale_range} is not (smallest, largest) above 0")
        if list(self.lr_steps) != sorted(self.lr_steps) or any(not 0 < step < 1 for step in self.lr_steps):
            raise ValueError(f"lr_steps {self.lr_steps} are not increasing shares between 0 and 1")
        if self.warmup_iterations >= self.iterations:
            raise ValueError(
                f"warmup_iterations {self.warmup_iterations} are not fewer than iterations {self.iterations}"
            )
        return self
