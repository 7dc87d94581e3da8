"""Translate our config into detectron2's: model, optimizer and schedule as a LazyConfig."""

from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from omegaconf import DictConfig, OmegaConf

from backbones.adapters.detectron2 import (
    TopLevelMaxPool,
    build_lr_scale,
    load_vit_backbone,
)
from backbones.adapters.pyramid import get_pyramid_scales
from mae_bench.spec import BackboneSpec
from tasks.coco.config import MaskRCNNConfig

NO_WEIGHT_DECAY = ("pos_embed", "cls_token", "reg_token")
SCHEDULE_PARTS = 10**6  # fvcore takes integer milestones; the schedule is a function of the share done
WARMUP_FACTOR = 0.001  # share of the lr at iteration 0, as in detectron2's ViTDet configs


def build_lazy_config(
    config: MaskRCNNConfig, spec: BackboneSpec, source: str | Path, num_classes: int
) -> DictConfig:
    """Return {"model", "optimizer", "lr_multiplier"} as LazyCalls; `build` gives the optimizer its model."""
    optimizer = L(adamw)(
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
    )
    setup = {
        "model": _build_model(config, spec, str(source), num_classes),
        "optimizer": optimizer,
        "lr_multiplier": _build_lr_multiplier(config),
    }
    return OmegaConf.create(setup, flags={"allow_objects": True})


def build(setup: DictConfig, device: str) -> tuple[torch.nn.Module, torch.optim.Optimizer, Any]:
    """Build the model on the device, its optimizer and the lr multiplier of a `build_lazy_config`."""
    model = instantiate(setup.model).to(device)
    setup.optimizer.model = model
    return model, instantiate(setup.optimizer), instantiate(setup.lr_multiplier)


def dump(setup: DictConfig, folder: Path) -> None:
    """Write `setup` to folder/detectron2.yaml for LazyConfig.load; call it before `build` adds the model."""
    LazyConfig.save(setup, str(folder / "detectron2.yaml"))


def adamw(
    model: Any, lr: float, betas: tuple[float, float], weight_decay: float, layer_decay: float
) -> torch.optim.AdamW:
    """Return AdamW over detectron2's parameter groups, with the lr decayed by layer.

    Norms, position table and prefix tokens have no weight decay. Dumped configs refer to this function by
    name.
    """
    params = get_default_optimizer_params(
        model,
        base_lr=lr,
        weight_decay_norm=0.0,
        lr_factor_func=build_lr_scale(model.backbone.net.spec, layer_decay),
        overrides={name: {"weight_decay": 0.0} for name in NO_WEIGHT_DECAY},
    )
    # a plain tuple of betas, so that the optimizer's state is plain data
    return torch.optim.AdamW(params, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay)


def _build_lr_multiplier(config: MaskRCNNConfig) -> Any:
    if config.lr_schedule == "cosine":
        schedule = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
    else:
        schedule = L(MultiStepParamScheduler)(
            values=[0.1**k for k in range(len(config.lr_steps) + 1)],
            milestones=[round(step * SCHEDULE_PARTS) for step in config.lr_steps],
            num_updates=SCHEDULE_PARTS,
        )
    if not config.warmup_iterations:
        return schedule
    return L(WarmupParamScheduler)(
        scheduler=schedule,
        warmup_factor=WARMUP_FACTOR,
        warmup_length=config.warmup_iterations / config.iterations,
        warmup_method="linear",
    )


def _build_model(config: MaskRCNNConfig, spec: BackboneSpec, source: str, num_classes: int) -> Any:
    """Return detectron2's mask_rcnn_vitdet with our backbone and sizes.

    Images are RGB in 0..255, normalised by the spec's mean and std.
    """
    return L(GeneralizedRCNN)(
        backbone=_build_backbone(config, spec, source),
        proposal_generator=_build_rpn(config),
        roi_heads=_build_roi_heads(config, num_classes),
        pixel_mean=[255 * value for value in spec.mean],
        pixel_std=[255 * value for value in spec.std],
        input_format="RGB",
    )


def _build_backbone(config: MaskRCNNConfig, spec: BackboneSpec, source: str) -> Any:
    return L(SimpleFeaturePyramid)(
        net=L(load_vit_backbone)(source=source, drop_path_rate=config.drop_path),
        in_feature=f"block{spec.depth - 1}",
        out_channels=config.pyramid_width,
        scale_factors=get_pyramid_scales(spec, config.pyramid_strides),
        top_block=L(TopLevelMaxPool)(in_feature=_name_levels(config)[-1]),
        norm="LN",
        square_pad=config.img_size,
    )


def _name_levels(config: MaskRCNNConfig) -> list[str]:
    return [f"p{stride.bit_length() - 1}" for stride in config.pyramid_strides]


def _build_rpn(config: MaskRCNNConfig) -> Any:
    strides = [*config.pyramid_strides, 2 * config.pyramid_strides[-1]]
    return L(RPN)(
        in_features=[*_name_levels(config), f"p{strides[-1].bit_length() - 1}"],
        head=L(StandardRPNHead)(
            in_channels=config.pyramid_width, num_anchors=3, conv_dims=[-1] * config.rpn_convs
        ),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[size] for size in config.anchor_sizes],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=strides,
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=config.rpn_batch_size,
        positive_fraction=0.5,
        pre_nms_topk=config.pre_nms_topk,
        post_nms_topk=config.post_nms_topk,
        nms_thresh=0.7,
    )


def _build_roi_heads(config: MaskRCNNConfig, num_classes: int) -> Any:
    levels = _name_levels(config)
    return L(StandardROIHeads)(
        num_classes=num_classes,
        batch_size_per_image=config.roi_batch_size,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False),
        box_in_features=levels,
        box_pooler=_build_pooler(config, 7),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=L(ShapeSpec)(channels=config.pyramid_width, height=7, width=7),
            conv_norm="LN",
            conv_dims=config.box_conv_dims,
            fc_dims=config.box_fc_dims,
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels=config.box_fc_dims[-1]),
            test_score_thresh=config.score_threshold,
            test_topk_per_image=config.detections_per_image,
            box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
            num_classes=num_classes,
        ),
        mask_in_features=levels,
        mask_pooler=_build_pooler(config, 14),
        mask_head=L(MaskRCNNConvUpsampleHead)(
            input_shape=L(ShapeSpec)(channels=config.pyramid_width, width=14, height=14),
            num_classes=num_classes,
            conv_norm="LN",
            conv_dims=config.mask_conv_dims,
        ),
    )


def _build_pooler(config: MaskRCNNConfig, size: int) -> Any:
    scales = [1 / stride for stride in config.pyramid_strides]
    return L(ROIPooler)(output_size=size, scales=scales, sampling_ratio=0, pooler_type="ROIAlignV2")
