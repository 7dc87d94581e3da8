"""Extract feature maps from a timm ViT; the detectron2 and mmsegmentation adapters build on it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mae_bench.errors import UserError
from mae_bench.models.vit import ViT, quarter_indices
from mae_bench.spec import BackboneSpec

# Shapes: N batch, C channels, H W image, h w grid, D width.


class FeatureMaps(nn.Module):
    """Return the patch tokens after the blocks `out_indices` (0-based) as maps.

    Build the ViT with `dynamic_img_size=True` for images of any size. Position tables are then resampled to
    the image's grid as the family publishes it (`mae_bench.models.any_size`; timm's bicubic with antialiasing
    differs from MAE's by 1 % for a table from 14 x 14 to 32 x 32).

    Args:
        vit: the backbone. spec: its description.
        out_indices: blocks whose maps are returned; by default the last of each quarter.
        norm: apply the final norm to every map.
    """

    def __init__(
        self, vit: ViT, spec: BackboneSpec, out_indices: Sequence[int] | None = None, norm: bool = False
    ):
        super().__init__()
        wrong = [i for i in out_indices or () if not 0 <= i < spec.depth]
        if wrong:
            raise UserError(
                f"out_indices {wrong} for a backbone of depth {spec.depth}", expected=f"0 to {spec.depth - 1}"
            )
        self.vit, self.spec, self.norm = vit, spec, norm
        self.out_indices = list(out_indices) if out_indices is not None else quarter_indices(spec.depth)

    def forward(self, imgs: torch.Tensor) -> list[torch.Tensor]:
        """Map imgs (N, C, H, W), normalised as the spec says, to one map (N, D, h, w) per index."""
        vit: Any = self.vit
        taps = sorted(set(self.out_indices))  # timm returns each block's map once, in block order
        maps = vit.forward_intermediates(imgs, indices=taps, norm=self.norm, intermediates_only=True)
        return [maps[taps.index(i)] for i in self.out_indices]


def get_layer_id(name: str, depth: int) -> int:
    """Return the layer of a ViT parameter for layer-wise lr decay.

    0 for the embedding, i + 1 for block i, depth + 1 for the rest; lr_scale = layer_decay ** (depth + 1 -
    layer_id) (facebookresearch/mae util/lr_decay.py, arXiv 2111.06377 A.1). `name` is the parameter's name
    inside the timm ViT.
    """
    if name.startswith(("cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1


def get_lr_scale(name: str, prefix: str, depth: int, layer_decay: float) -> float:
    """Return layer_decay ** (depth + 1 - layer) for a ViT parameter below `prefix`, 1 for any other."""
    if not name.startswith(prefix):
        return 1.0
    return layer_decay ** (depth + 1 - get_layer_id(name.removeprefix(prefix), depth))
