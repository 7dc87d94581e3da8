"""The detectron2 `Backbone` around a timm ViT, and what the detectors on top of it need to know: strides, layers, lr scales."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from backbones.adapters.features import FeatureMaps, get_layer_id
from backbones.load import load_backbone
from backbones.translating.report import ConversionReport
from mae_bench.errors import NotInstalled, UserError
from mae_bench.models.vit import ViT
from mae_bench.spec import BackboneSpec

try:
    import pycocotools  # noqa: F401 - detectron2 needs it and does not declare it; so does fvcore with shapely
    import shapely  # noqa: F401
    from detectron2.modeling import Backbone
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool
except ModuleNotFoundError as error:
    raise NotInstalled(
        f"the module {error.name!r} is not installed", expected="detectron2, pycocotools and shapely for the COCO tasks",
        fix="in a source checkout run `make setup`; it installs requirements/lock.txt and then requirements/detectron2.txt",
    ) from error  # fmt: skip

PYRAMID_SCALES = (4.0, 2.0, 1.0, 0.5)  # those that detectron2's SimpleFeaturePyramid knows
VIT_PREFIX = "features.vit."  # of the ViT's parameters inside a ViTBackbone


class ViTBackbone(Backbone):
    """Maps of a ViT under detectron2's contract: an output `block{i}` (0-based) a tapped block, each at the patch's stride.

    N batch, C channels, H W image, h w grid, D width. Images come normalised as the spec says, H and W multiples of the patch.
    """

    def __init__(
        self, vit: ViT, spec: BackboneSpec, report: ConversionReport, out_indices: Sequence[int] | None = None
    ):
        super().__init__()
        self.features = FeatureMaps(vit, spec, [spec.depth - 1] if out_indices is None else out_indices)
        self.spec, self.report = spec, report
        self._stride = get_patch_side(spec)
        self._out_features = [f"block{index}" for index in self.features.out_indices]
        self._out_feature_channels = dict.fromkeys(self._out_features, spec.embed_dim)
        self._out_feature_strides = dict.fromkeys(self._out_features, self._stride)

    def forward(self, imgs: torch.Tensor) -> dict[str, torch.Tensor]:
        """imgs (N, C, H, W) -> {"block{i}": (N, D, h, w)}."""
        return dict(zip(self._out_features, self.features(imgs), strict=True))

    @property
    def size_divisibility(self) -> int:
        return self._stride

    @property
    def padding_constraints(self) -> Mapping[str, int]:
        return {"size_divisibility": self._stride}


class TopLevelMaxPool(LastLevelMaxPool):
    """detectron2's extra level for the RPN, over the level `in_feature` where detectron2 itself knows "p5" only."""

    def __init__(self, in_feature: str):
        super().__init__()
        self.in_feature = in_feature


def load_vit_backbone(
    source: str | Path, drop_path_rate: float = 0.0, out_indices: Sequence[int] | None = None
) -> ViTBackbone:
    """The ViTBackbone of a checkpoint, for images of any size; `.spec` and `.report` say what was loaded and how."""
    vit, spec, report = load_backbone(source, drop_path_rate=drop_path_rate, dynamic_img_size=True)
    return ViTBackbone(vit, spec, report, out_indices)


def get_patch_side(spec: BackboneSpec) -> int:
    """The patch's side, which is the stride of every map; detectron2 knows one stride for both directions."""
    height, width = spec.patch_size
    if height != width:
        raise UserError(
            f"patches of {height} x {width} pixels",
            expected="square patches for detectron2",
            fix="leave this backbone out of the COCO tasks",
        )
    return height


def get_pyramid_scales(spec: BackboneSpec, strides: Sequence[int]) -> list[float]:
    """Scale of each pyramid level over the ViT's map: patch 8, strides (4, 8, 16): 2, 1, 0.5 (arXiv 2203.16527 sec. 3)."""
    patch = get_patch_side(spec)
    if bad := [stride for stride in strides if patch / stride not in PYRAMID_SCALES]:
        reachable = [int(patch / scale) for scale in PYRAMID_SCALES if patch % scale == 0]
        raise UserError(
            f"pyramid strides {bad} over a map of stride {patch}", expected=f"strides among {reachable} for this backbone",
            fix=f"set pyramid_strides to some of {reachable}, with one anchor size a level",
        )  # fmt: skip
    return [patch / stride for stride in strides]


def build_lr_scale(spec: BackboneSpec, layer_decay: float) -> Callable[[str], float]:
    """lr over the base lr by a detector's parameter name: layer_decay ** (depth + 1 - layer) inside the ViT, 1 outside."""

    def scale(name: str) -> float:
        _, inside, vit_name = name.partition(VIT_PREFIX)
        return layer_decay ** (spec.depth + 1 - get_layer_id(vit_name, spec.depth)) if inside else 1.0

    return scale
