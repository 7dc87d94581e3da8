"""The mmsegmentation backbone around a timm ViT, and what its config needs: preprocessor, neck, layer-wise decay, bfloat16."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import nn

from backbones.adapters.features import FeatureMaps, get_layer_id
from backbones.load import load_backbone
from mae_bench.engine.optim import build_param_groups, finetune_no_decay
from mae_bench.errors import NotInstalled, UserError
from mae_bench.spec import BackboneSpec

try:
    with (
        redirect_stdout(io.StringIO()),
        warnings.catch_warnings(action="ignore"),
    ):  # they greet with what they lack, unused here
        import mmseg.datasets
        import mmseg.models  # noqa: F401
        from mmengine.model import is_model_wrapper
        from mmengine.optim import OptimWrapper
        from mmseg.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
except ModuleNotFoundError as error:
    raise NotInstalled(
        f"the module {error.name!r} is not installed", expected="mmsegmentation (onedl-mmsegmentation) for the ADE20K tasks",
        fix='run `make setup` in a source checkout, or `pip install "mae_bench[ade20k]"`',
    ) from error  # fmt: skip

VIT_PREFIX = "backbone.features.vit."  # of the ViT's parameters inside a segmentor


@MODELS.register_module()
class MAEBenchViT(nn.Module):
    """The ViT of a checkpoint as a backbone of mmsegmentation: `custom_imports=dict(imports=["backbones.adapters.mmseg"])`,
    then `backbone=dict(type="MAEBenchViT", source=...)`.

    source: what `backbones.load.load_backbone` reads. out_indices: 0-based blocks, by default the last of each quarter.
    It has no `init_weights`, and hides timm's, so that mmengine's initialisation leaves the loaded weights alone.
    """

    def __init__(self, source: str, out_indices: Sequence[int] | None = None, drop_path_rate: float = 0.0):
        super().__init__()
        vit, self.spec, self.report = load_backbone(
            source, drop_path_rate=drop_path_rate, dynamic_img_size=True
        )
        self.features = FeatureMaps(vit, self.spec, out_indices)

    def forward(self, imgs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """imgs (N, C, H, W), H and W multiples of the patch -> one (N, D, H / patch, W / patch) an index."""
        return tuple(self.features(imgs))


def get_patch_side(spec: BackboneSpec) -> int:
    """The side of the patch in pixels; UserError where the backbone cannot stand under mmsegmentation's pyramid."""
    side, across = spec.patch_size
    if side != across or spec.in_chans != 3:
        raise UserError(f"a backbone with patch_size {spec.patch_size} and in_chans {spec.in_chans}",
                        expected="square patches and RGB images for mmsegmentation")  # fmt: skip
    return side


def build_preprocessor(spec: BackboneSpec, crop_size: int) -> dict[str, Any]:
    """SegDataPreProcessor's config: the spec's mean and std for pixels of 0 to 255, mmcv's BGR turned to RGB.

    Images are padded to the crop in training and to a multiple of the patch in test, with pixels that no loss or metric sees.
    """
    return {
        "type": "SegDataPreProcessor", "mean": [255 * value for value in spec.mean], "std": [255 * value for value in spec.std],
        "bgr_to_rgb": True, "pad_val": 0, "seg_pad_val": 255, "size": (crop_size, crop_size),
        "test_cfg": {"size_divisor": get_patch_side(spec)},
    }  # fmt: skip


def build_neck(spec: BackboneSpec, norm: dict[str, Any]) -> dict[str, Any]:
    """Feature2Pyramid's config: strides 4, 8, 16, 32 from patches of 16 or 8; other patches come as near as its scales allow."""
    rescales = [4, 2, 1, 0.5] if get_patch_side(spec) > 8 else [2, 1, 0.5, 0.25]
    return {"type": "Feature2Pyramid", "embed_dim": spec.embed_dim, "rescales": rescales, "norm_cfg": norm}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MAEBenchLayerDecay:
    """Optimizer with a learning rate a layer: `paramwise_cfg=dict(layer_decay=0.65)`; neck and heads run at the full rate.

    Layer i of a backbone of depth d has lr x layer_decay ** (d + 1 - i) (facebookresearch/mae util/lr_decay.py); 1-D parameters,
    position table and prefix tokens have no weight decay. mmsegmentation's own constructor knows only its own ViTs' names.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None):
        self.wrapper, self.paramwise = dict(optim_wrapper_cfg), dict(paramwise_cfg or {})

    def __call__(self, model: nn.Module) -> OptimWrapper:
        segmentor: Any = model.module if is_model_wrapper(model) else model
        depth, decay = segmentor.backbone.spec.depth, self.paramwise.get("layer_decay", 1.0)

        def lr_scale(name: str) -> float:
            return (
                decay ** (depth + 1 - get_layer_id(name.removeprefix(VIT_PREFIX), depth))
                if name.startswith(VIT_PREFIX)
                else 1.0
            )

        wrapper = {"type": "OptimWrapper", **self.wrapper}
        optimizer = dict(wrapper.pop("optimizer"))
        groups = build_param_groups(
            segmentor.named_parameters(), optimizer["weight_decay"], finetune_no_decay, lr_scale
        )
        for group in groups:
            group["lr"] = optimizer["lr"] * group["lr_scale"]
        return OPTIM_WRAPPERS.build(
            {**wrapper, "optimizer": OPTIMIZERS.build({**optimizer, "params": groups})}
        )


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """bfloat16 autocast on any device, which needs no loss scaling; mmengine's AmpOptimWrapper asks for a GPU."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16):
            yield
