"""The ViT with windowed attention of SAM and ViTDet, giving tokens as the other timm ViTs do."""

from typing import Any

import torch
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn


class WindowedViT(VisionTransformerSAM):
    """timm's image encoder of SAM (arXiv 2304.02643) and, without the neck, detectron2's ViT (arXiv 2203.16527).

    neck_chans: channels of SAM's convolutional neck; 0 has none, and the last block's tokens come as they are, without a norm.
    N batch, L patches in raster order, D width of the neck or else of the blocks.
    """

    num_prefix_tokens = 0

    def __init__(self, *, neck_chans: int = 256, global_pool: str = "avg", **options: Any):
        super().__init__(neck_chans=neck_chans, global_pool="", **options)
        if not neck_chans:
            self.neck = nn.Sequential()  # timm puts a norm here
        self.norm, self.fc_norm = nn.Identity(), nn.Identity()
        self.head: Any = nn.Identity()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, C, H, W) -> (N, L, D)."""
        return super().forward_features(x).flatten(2).transpose(1, 2)
