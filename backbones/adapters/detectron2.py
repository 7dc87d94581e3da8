"""Wrap a timm ViT as a detectron2 backbone, with strides, pyramid scales and lr scales for its detectors."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from backbones.adapters.features import FeatureMaps, get_lr_scale
from backbones.adapters.pyramid import get_patch_side
from backbones.load import load_backbone
from backbones.translating.report import ConversionReport
from mae_bench.errors import NotInstalled
from mae_bench.models.vit import ViT
from mae_bench.spec import BackboneSpec

try:
    import pycocotools  # noqa: F401 - detectron2 needs it without declaring it; so does fvcore with shapely
    import shapely  # noqa: F401
    from detectron2.modeling import Backbone
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool
except ModuleNotFoundError as error:
    raise NotInstalled(
        f"the module {error.name!r} is not installed",
        expected="detectron2, pycocotools and shapely for the COCO tasks",
        fix="in a source checkout run `make setup`, which installs requirements/lock.txt and then "
        "requirements/detectron2.txt",
    ) from error

# Shapes: N batch, C channels, H W image, h w grid, D width.
VIT_PREFIX = "features.vit."  # of the ViT's parameters inside a ViTBackbone


class ViTBackbone(Backbone):  # type: ignore[misc]
    """A ViT as a detectron2 backbone: one output `block{i}` (0-based) per index, at the stride of the patch.

    Images come normalised as the spec says; H and W are multiples of the patch size.
    """

    def __init__(
        self, vit: ViT, spec: BackboneSpec, report: ConversionReport, out_indices: Sequence[int] | None = None
    ):
        super().__init__()
        self.features = FeatureMaps(vit, spec, [spec.depth - 1] if out_indices is None else out_indices)
        self.spec, self.report = spec, report
        self._stride = get_patch_side(spec, "detectron2")
        self._out_features = [f"block{index}" for index in self.features.out_indices]
        self._out_feature_channels = dict.fromkeys(self._out_features, spec.embed_dim)
        self._out_feature_strides = dict.fromkeys(self._out_features, self._stride)

    def forward(self, imgs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map imgs (N, C, H, W) to {"block{i}": (N, D, h, w)}."""
        return dict(zip(self._out_features, self.features(imgs), strict=True))

    @property
    def size_divisibility(self) -> int:
        return self._stride

    @property
    def padding_constraints(self) -> Mapping[str, int]:
        return {"size_divisibility": self._stride}


class TopLevelMaxPool(LastLevelMaxPool):  # type: ignore[misc]
    """detectron2's extra level for the RPN, on top of the level `in_feature` instead of "p5"."""

    def __init__(self, in_feature: str):
        super().__init__()
        self.in_feature = in_feature


def load_vit_backbone(
    source: str | Path, drop_path_rate: float = 0.0, out_indices: Sequence[int] | None = None
) -> ViTBackbone:
    """Load a checkpoint as a ViTBackbone for images of any size; `.spec` and `.report` describe it."""
    vit, spec, report = load_backbone(source, drop_path_rate=drop_path_rate, dynamic_img_size=True)
    return ViTBackbone(vit, spec, report, out_indices)


def build_lr_scale(spec: BackboneSpec, layer_decay: float) -> Callable[[str], float]:
    """Return the function parameter name -> lr / base lr of a detector; outside the ViT it is 1."""

    def lr_scale(name: str) -> float:
        prefix, inside, _ = name.partition(VIT_PREFIX)
        return get_lr_scale(name, prefix + inside, spec.depth, layer_decay) if inside else 1.0

    return lr_scale
