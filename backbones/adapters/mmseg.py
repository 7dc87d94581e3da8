"""Wrap a timm ViT as an mmsegmentation backbone, with preprocessor, neck, lr decay and bfloat16."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import nn

from backbones.adapters.features import FeatureMaps, get_lr_scale
from backbones.adapters.pyramid import get_patch_side
from backbones.load import load_backbone
from mae_bench.engine.optim import build_param_groups, finetune_no_decay
from mae_bench.errors import NotInstalled
from mae_bench.spec import BackboneSpec

try:
    # Both packages print notices about optional parts that are not used here.
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        import mmseg.datasets
        import mmseg.models  # noqa: F401
        from mmengine.model import is_model_wrapper
        from mmengine.optim import OptimWrapper
        from mmseg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
except ModuleNotFoundError as error:
    raise NotInstalled(
        f"the module {error.name!r} is not installed",
        expected="mmsegmentation (onedl-mmsegmentation) for the ADE20K tasks",
        fix='run `make setup` in a source checkout, or `pip install "mae_bench[ade20k]"`',
    ) from error

# Shapes: N batch, C channels, H W image, h w grid, D width.
VIT_PREFIX = "backbone.features.vit."  # of the ViT's parameters inside a segmentor


@MODELS.register_module()
class MAEBenchViT(nn.Module):
    """The ViT of a checkpoint as an mmsegmentation backbone.

    Use `custom_imports=dict(imports=["backbones.adapters.mmseg"])` and `backbone=dict(type="MAEBenchViT",
    source=...)`. It has no `init_weights`, and hides timm's, so that mmengine does not overwrite the loaded
    weights.

    Args:
        source: what `backbones.load.load_backbone` reads.
        out_indices: 0-based blocks; by default the last of each quarter.
        drop_path_rate: stochastic depth rate of the last block.
    """

    def __init__(self, source: str, out_indices: Sequence[int] | None = None, drop_path_rate: float = 0.0):
        super().__init__()
        vit, self.spec, self.report = load_backbone(
            source, drop_path_rate=drop_path_rate, dynamic_img_size=True
        )
        self.features = FeatureMaps(vit, self.spec, out_indices)

    def forward(self, imgs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Map imgs (N, C, H, W), H and W multiples of the patch, to one map (N, D, h, w) per index."""
        return tuple(self.features(imgs))


def build_preprocessor(spec: BackboneSpec, crop_size: int) -> dict[str, Any]:
    """Return the config of a SegDataPreProcessor: pixels of 0 to 255, mmcv's BGR converted to RGB.

    Images are padded to the crop in training and to a multiple of the patch in testing; no loss or metric
    sees the padding.
    """
    return {
        "type": "SegDataPreProcessor",
        "mean": [255 * value for value in spec.mean],
        "std": [255 * value for value in spec.std],
        "bgr_to_rgb": True,
        "pad_val": 0,
        "seg_pad_val": 255,
        "size": (crop_size, crop_size),
        "test_cfg": {"size_divisor": get_patch_side(spec, "mmsegmentation")},
    }


def build_neck(spec: BackboneSpec, norm: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a Feature2Pyramid: strides 4, 8, 16, 32 for patches of 8 or 16.

    For other patches the strides are as close to these as the neck's scales allow.
    """
    rescales = [4, 2, 1, 0.5] if get_patch_side(spec, "mmsegmentation") > 8 else [2, 1, 0.5, 0.25]
    return {"type": "Feature2Pyramid", "embed_dim": spec.embed_dim, "rescales": rescales, "norm_cfg": norm}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MAEBenchLayerDecay:
    """Build an optimizer with layer-wise lr decay: `paramwise_cfg=dict(layer_decay=0.65)`.

    Layer i of a backbone of depth d has lr x layer_decay ** (d + 1 - i) (facebookresearch/mae
    util/lr_decay.py); neck and heads have the full lr. 1-D parameters, position table and prefix tokens have
    no weight decay. mmsegmentation's own constructor only knows the parameter names of its own ViTs.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None):
        self.wrapper, self.paramwise = dict(optim_wrapper_cfg), dict(paramwise_cfg or {})

    def __call__(self, model: nn.Module) -> OptimWrapper:
        segmentor: Any = model.module if is_model_wrapper(model) else model
        depth, decay = segmentor.backbone.spec.depth, self.paramwise.get("layer_decay", 1.0)

        def lr_scale(name: str) -> float:
            return get_lr_scale(name, VIT_PREFIX, depth, decay)

        wrapper = {"type": "OptimWrapper", **self.wrapper}
        optimizer = dict(wrapper.pop("optimizer"))
        groups = build_param_groups(
            segmentor.named_parameters(), optimizer["weight_decay"], finetune_no_decay, lr_scale
        )
        for group in groups:
            group["lr"] = optimizer["lr"] * group["lr_scale"]
        built = OPTIMIZERS.build({**optimizer, "params": groups})
        return OPTIM_WRAPPERS.build({**wrapper, "optimizer": built})


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):  # type: ignore[misc]
    """bfloat16 autocast on any device, without loss scaling; mmengine's AmpOptimWrapper requires a GPU."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16):
            yield
