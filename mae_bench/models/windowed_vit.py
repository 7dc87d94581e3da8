"""The ViT with windowed attention of SAM and ViTDet, with the interface of timm's other ViTs.

Legend: N batch, L patches in raster order, D width (of the neck, if there is one), C channels, H W image,
h w grid of patches.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.models import checkpoint
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from mae_bench.models.resampling import resize_table
from mae_bench.spec import PosResample


class WindowedViT(VisionTransformerSAM):
    """SAM's image encoder (arXiv 2304.02643) and, without the neck, ViTDet's ViT (arXiv 2203.16527).

    Images may have any size that the patch divides: the absolute table is resampled by `pos_resample`, the
    relative ones linearly.

    neck_chans: channels of SAM's convolutional neck. 0 removes it, and the output is the last block's,
        without a norm.
    """

    num_prefix_tokens = 0
    pos_resample: PosResample = "bicubic"

    def __init__(self, *, neck_chans: int = 256, global_pool: str = "avg", **options: Any):
        super().__init__(neck_chans=neck_chans, global_pool="", **options)
        self.global_pool = global_pool  # timm's class only pools maps
        if not neck_chans:
            self.neck = nn.Sequential()  # timm would put a norm here
        self.norm, self.fc_norm = nn.Identity(), nn.Identity()
        self.head: Any = nn.Identity()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, C, H, W) -> (N, L, D)."""
        for tokens in self._after_blocks(x):
            x = tokens
        maps: torch.Tensor = self.neck(x.permute(0, 3, 1, 2))  # (N, D, h, w)
        return maps.flatten(2).transpose(1, 2)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """x (N, L, D) -> (N, D), or (N, L, D) without pooling (global_pool "")."""
        out: torch.Tensor = self.head(x.mean(dim=1) if self.global_pool == "avg" else x)
        return out

    def forward_intermediates(  # type: ignore[override]
        self, x: torch.Tensor, indices: Sequence[int], norm: bool = False, intermediates_only: bool = True
    ) -> list[torch.Tensor]:
        """x (N, C, H, W) -> the patches after the blocks `indices` (counted from 0), as maps (N, D, h, w).

        norm: apply the neck.
        """
        maps = [x.permute(0, 3, 1, 2) for index, x in enumerate(self._after_blocks(x)) if index in indices]
        return [self.neck(x) if norm else x for x in maps]

    def _after_blocks(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """x (N, C, H, W) -> the tokens (N, h, w, D) after each block."""
        # Embed patches: (N, h, w, D)
        patch_embed: Any = self.patch_embed
        x = patch_embed(x)
        # Add absolute positions, resampled to the grid of this batch
        if self.pos_embed is not None:
            grid = (x.shape[1], x.shape[2])
            table = resize_table(self.pos_embed.flatten(1, 2), patch_embed.grid_size, grid, self.pos_resample)
            x = x + table.reshape(len(table), *grid, -1)
        x = self.norm_pre(self.patch_drop(self.pos_drop(x)))
        # Apply the blocks; their relative tables are resampled by timm
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            yield x
