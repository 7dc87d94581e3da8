"""timm's ViTs for images of any size: tables are resampled per batch, parameters keep their size.

Legend: N batch, L patches, D width, C channels, H W image, h w grid of patches.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from timm.models import checkpoint
from timm.models.beit import Attention, Beit, RelativePositionBias, gen_relative_position_index
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_bench.models.resampling import Grid, resize_bias_table, resize_table
from mae_bench.spec import PosResample


class AnySizeVisionTransformer(VisionTransformer):
    """timm's ViT; with `dynamic_img_size` its table is resampled by `pos_resample` (timm has one method)."""

    pos_resample: PosResample = "bicubic"

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, h, w, D), or (N, L, D) without `dynamic_img_size` -> (N, prefix + L, D)."""
        if not self.dynamic_img_size or self.pos_embed is None:
            return super()._pos_embed(x)
        return _add_prefix_and_positions(self, x)


class AnySizeEva(Eva):
    """timm's EVA; with `dynamic_img_size` its table is resampled and its rotations follow the grid."""

    pos_resample: PosResample = "bicubic"

    def _pos_embed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (N, h, w, D), or (N, L, D) without `dynamic_img_size` -> (N, prefix + L, D) and the rotations."""
        if not self.dynamic_img_size or self.pos_embed is None:
            return super()._pos_embed(x)
        rope: Any = self.rope
        rotations = None if rope is None else rope.get_embed(shape=list(x.shape[1:3]))
        return _add_prefix_and_positions(self, x), rotations


def _add_prefix_and_positions(vit: Any, x: torch.Tensor) -> torch.Tensor:
    """x (N, h, w, D) -> (N, prefix + L, D) with positions."""
    table = resize_table(vit.pos_embed, vit.patch_embed.grid_size, (x.shape[1], x.shape[2]), vit.pos_resample)
    prefix = [token.expand(len(x), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
    x = x.flatten(1, 2)
    tokens = (
        torch.cat([*prefix, x + table], dim=1) if vit.no_embed_class else torch.cat([*prefix, x], 1) + table
    )
    out: torch.Tensor = vit.pos_drop(tokens)
    return out


@lru_cache(maxsize=2)  # 4097 x 4097 entries for an image of 1024
@torch.inference_mode(False)  # the cached tensor is used in training too
def _relative_position_index(grid: Grid, device: torch.device) -> torch.Tensor:
    """(1 + L, 1 + L) rows of the relative table."""
    return gen_relative_position_index(grid, device=device)


def _relative_position_bias(module: Any) -> torch.Tensor:
    """(heads, 1 + L, 1 + L) at the grid of the current images."""
    table = resize_bias_table(module.relative_position_bias_table, module.window_size, module.grid)
    bias = table[_relative_position_index(module.grid, table.device)].permute(2, 0, 1)
    return bias.contiguous()  # as attention kernels expect it


class AnySizeAttention(Attention):
    """BEiT's attention; `grid` is the grid of the current images if it is not the module's own."""

    grid: Grid | None = None

    def _get_rel_pos_bias(self) -> torch.Tensor:
        if self.grid in (None, self.window_size):
            return super()._get_rel_pos_bias()
        return _relative_position_bias(self)[None]


class AnySizeRelativePositionBias(RelativePositionBias):
    """BEiT's shared relative bias; `grid` is the grid of the current images if it is not the module's own."""

    grid: Grid | None = None

    def forward(self) -> torch.Tensor:
        if self.grid in (None, self.window_size):
            return super().forward()
        return _relative_position_bias(self)


class AnySizeBeit(Beit):
    """timm's BEiT; with `dynamic_img_size` its tables are resampled to the grid of each batch.

    The parameters keep their size, so they are trained through the resampling, and a state_dict is the same
    at any size.

    final_norm: False removes the last norm, as in mmsegmentation's BEiT (timm has no option for it).
    """

    pos_resample: PosResample = "bicubic"

    def __init__(self, *, dynamic_img_size: bool = False, final_norm: bool = True, **options: Any):
        super().__init__(**options)
        if not final_norm:
            self.norm = self.fc_norm = nn.Identity()
        self.patch_embed.strict_img_size = not dynamic_img_size
        # Keep the weights, and change the class to one that handles other grids
        for module in self.modules():
            if type(module) is Attention:
                module.__class__ = AnySizeAttention
            elif type(module) is RelativePositionBias:
                module.__class__ = AnySizeRelativePositionBias

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, C, H, W) -> (N, 1 + L, D), after the final norm."""
        for tokens in self._after_blocks(x):
            x = tokens
        out: torch.Tensor = self.norm(x)
        return out

    def forward_intermediates(  # type: ignore[override]
        self,
        x: torch.Tensor,
        indices: int | Sequence[int],
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = True,
    ) -> list[Any]:
        """x (N, C, H, W) -> the patches after some blocks, as maps (N, D, h, w).

        indices: blocks, counted from 0; a number n selects the last n.
        return_prefix_tokens: pair each with its class token (N, 1, D).
        output_fmt: "NLC" returns tokens (N, L, D) in place of maps.
        """
        grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        wanted = range(len(self.blocks))[-indices:] if isinstance(indices, int) else indices
        taken = [
            self.norm(x) if norm else x for index, x in enumerate(self._after_blocks(x)) if index in wanted
        ]
        patches = [x[:, 1:] for x in taken]
        if output_fmt != "NLC":
            patches = [x.transpose(1, 2).reshape(len(x), -1, *grid) for x in patches]
        return list(zip(patches, [x[:, :1] for x in taken], strict=True)) if return_prefix_tokens else patches

    def _after_blocks(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """x (N, C, H, W) -> the tokens (N, 1 + L, D) after each block."""
        # Set the grid of this batch
        grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        for module in self.modules():
            if isinstance(module, AnySizeAttention | AnySizeRelativePositionBias):
                module.grid = grid
        # Embed patches, prepend the class token, add absolute positions
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        if self.pos_embed is not None:
            x = x + resize_table(self.pos_embed, self.patch_embed.grid_size, grid, self.pos_resample)
        x = self.pos_drop(x)
        # Apply the blocks, with the relative bias they may share
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias()
        for block in self.blocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x, shared)
            else:
                x = block(x, shared_rel_pos_bias=shared)
            yield x
