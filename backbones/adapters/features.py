"""Feature maps of a timm ViT: the one piece that every dense adapter (detectron2, mmsegmentation) builds on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mae_bench.errors import UserError
from mae_bench.models.vit import ViT, quarter_indices
from mae_bench.spec import BackboneSpec


class FeatureMaps(nn.Module):
    """Patch tokens after the blocks `out_indices` (0-based), as maps; build the ViT with `dynamic_img_size=True` for images of
    any size.

    N batch, C channels, H W image, h w grid, D width. Tables are resampled to the image's grid as the family publishes it
    (`mae_bench.models.any_size`; timm's own bicubic with antialiasing is 1 % off MAE's in a table from 14 x 14 to 32 x 32).
    """

    def __init__(
        self, vit: ViT, spec: BackboneSpec, out_indices: Sequence[int] | None = None, norm: bool = False
    ):
        super().__init__()
        if bad := [i for i in out_indices or () if not 0 <= i < spec.depth]:
            raise UserError(
                f"out_indices {bad} of a backbone of depth {spec.depth}", expected=f"0 to {spec.depth - 1}"
            )
        self.vit, self.spec, self.norm = vit, spec, norm
        self.out_indices = list(out_indices) if out_indices is not None else quarter_indices(spec.depth)

    def forward(self, imgs: torch.Tensor) -> list[torch.Tensor]:
        """imgs (N, C, H, W), normalised as the spec says -> a list of (N, D, h, w), one an index, in their order."""
        vit: Any = self.vit
        taps = sorted(set(self.out_indices))  # timm gives each block's map once, in the blocks' order
        maps = vit.forward_intermediates(imgs, indices=taps, norm=self.norm, intermediates_only=True)
        return [maps[taps.index(i)] for i in self.out_indices]


def get_layer_id(name: str, depth: int) -> int:
    """Layer of a backbone's parameter for layer-wise decay: 0 for the embedding, i + 1 for block i, depth + 1 for the rest.

    `name` is the parameter's name inside the timm ViT; scale = layer_decay ** (depth + 1 - get_layer_id)
    (facebookresearch/mae util/lr_decay.py, arXiv 2111.06377 A.1).
    """
    if name.startswith(("cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1
