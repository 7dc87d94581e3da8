"""The ViT with windowed attention of SAM and ViTDet, giving tokens as the other timm ViTs do."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.models import checkpoint
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from mae_bench.models.resampling import resize_table
from mae_bench.spec import PosResample


class WindowedViT(VisionTransformerSAM):
    """timm's image encoder of SAM (arXiv 2304.02643) and, without the neck, detectron2's ViT (arXiv 2203.16527).

    neck_chans: channels of SAM's convolutional neck; 0 has none, and the last block's tokens come as they are, without a norm.
    Images may be of any size that the patch divides: the table is resampled by `pos_resample`, distances linearly.
    N batch, L patches in raster order, D width of the neck or else of the blocks.
    """

    num_prefix_tokens = 0
    pos_resample: PosResample = "bicubic"

    def __init__(self, *, neck_chans: int = 256, global_pool: str = "avg", **options: Any):
        super().__init__(neck_chans=neck_chans, global_pool="", **options)
        self.global_pool = global_pool  # timm's knows poolings of maps alone
        if not neck_chans:
            self.neck = nn.Sequential()  # timm puts a norm here
        self.norm, self.fc_norm = nn.Identity(), nn.Identity()
        self.head: Any = nn.Identity()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, C, H, W) -> (N, L, D)."""
        for tokens in self._after_blocks(x):
            x = tokens
        return self.neck(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """x (N, L, D) -> (N, D), or x as it is without pooling (global_pool "")."""
        return self.head(x.mean(dim=1) if self.global_pool == "avg" else x)

    def forward_intermediates(  # type: ignore[override]
        self, x: torch.Tensor, indices: Sequence[int], norm: bool = False, intermediates_only: bool = True
    ) -> list[torch.Tensor]:
        """x (N, C, H, W) -> the patches after the blocks `indices` (0-based) as maps (N, D, h, w); `norm` is the neck."""
        maps = [x.permute(0, 3, 1, 2) for index, x in enumerate(self._after_blocks(x)) if index in indices]
        return [self.neck(x) if norm else x for x in maps]

    def _after_blocks(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        patch_embed: Any = self.patch_embed
        x = patch_embed(x)
        if self.pos_embed is not None:
            grid = (x.shape[1], x.shape[2])
            table = resize_table(self.pos_embed.flatten(1, 2), patch_embed.grid_size, grid, self.pos_resample)
            x = x + table.unflatten(1, grid)
        x = self.norm_pre(self.patch_drop(self.pos_drop(x)))
        for block in self.blocks:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
            yield x
