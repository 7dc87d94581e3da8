"""timm's ViTs for images of any size: tables are taken to the image's grid as the family publishes it, and stay as stored."""

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
    """timm's ViT; with `dynamic_img_size` its table is resampled by `pos_resample`, where timm knows one method only."""

    pos_resample: PosResample = "bicubic"

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, h, w, D), or (N, L, D) without `dynamic_img_size` -> (N, prefix + L, D)."""
        return (
            _tokens(self, x)
            if self.dynamic_img_size and self.pos_embed is not None
            else super()._pos_embed(x)
        )


class AnySizeEva(Eva):
    """timm's EVA; with `dynamic_img_size` its table is resampled by `pos_resample`, and rotations follow the image's grid."""

    pos_resample: PosResample = "bicubic"

    def _pos_embed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (N, h, w, D), or (N, L, D) without `dynamic_img_size` -> (N, prefix + L, D) and the rotations."""
        if not self.dynamic_img_size or self.pos_embed is None:
            return super()._pos_embed(x)
        rope: Any = self.rope
        return _tokens(self, x), None if rope is None else rope.get_embed(shape=list(x.shape[1:3]))


def _tokens(vit: Any, x: torch.Tensor) -> torch.Tensor:
    """Patches (N, h, w, D) as tokens behind the prefix tokens, with positions."""
    table = resize_table(vit.pos_embed, vit.patch_embed.grid_size, (x.shape[1], x.shape[2]), vit.pos_resample)
    prefix = [token.expand(len(x), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
    if vit.no_embed_class:
        return vit.pos_drop(torch.cat([*prefix, x.flatten(1, 2) + table], dim=1))
    return vit.pos_drop(torch.cat([*prefix, x.flatten(1, 2)], dim=1) + table)


@lru_cache(maxsize=2)  # 4097 x 4097 for an image of 1024
@torch.inference_mode(False)  # what is kept serves training too
def _index(grid: Grid, device: torch.device) -> torch.Tensor:
    return gen_relative_position_index(grid, device=device)


def _bias(module: Any) -> torch.Tensor:
    """(heads, 1 + L, 1 + L) at the grid of the images that are looked at."""
    table = resize_bias_table(module.relative_position_bias_table, module.window_size, module.grid)
    return (
        table[_index(module.grid, table.device)].permute(2, 0, 1).contiguous()
    )  # as attention kernels want it


class AnySizeAttention(Attention):
    """`grid` is that of the images that are looked at, where it is another than the own."""

    grid: Grid | None = None

    def _get_rel_pos_bias(self) -> torch.Tensor:
        return super()._get_rel_pos_bias() if self.grid in (None, self.window_size) else _bias(self)[None]


class AnySizeRelativePositionBias(RelativePositionBias):
    """`grid` is that of the images that are looked at, where it is another than the own."""

    grid: Grid | None = None

    def forward(self) -> torch.Tensor:
        return super().forward() if self.grid in (None, self.window_size) else _bias(self)


class AnySizeBeit(Beit):
    """timm's BEiT; with `dynamic_img_size` its absolute and relative tables are resampled to the grid of each batch.

    The parameters keep their size, so training reaches them through the resampling, and a state_dict is the same at any size.
    final_norm: False leaves the last norm out, as mmsegmentation's BEiT does, for which timm has no option.
    """

    pos_resample: PosResample = "bicubic"

    def __init__(self, *, dynamic_img_size: bool = False, final_norm: bool = True, **options: Any):
        super().__init__(**options)
        if not final_norm:
            self.norm = self.fc_norm = nn.Identity()
        self.patch_embed.strict_img_size = not dynamic_img_size
        for module in self.modules():  # the same weights under a class that knows other grids
            if type(module) in (Attention, RelativePositionBias):
                module.__class__ = (
                    AnySizeAttention if isinstance(module, Attention) else AnySizeRelativePositionBias
                )

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, C, H, W) -> (N, 1 + L, D), after the final norm."""
        for tokens in self._after_blocks(x):
            x = tokens
        return self.norm(x)

    def forward_intermediates(  # type: ignore[override]
        self,
        x: torch.Tensor,
        indices: int | Sequence[int],
        return_prefix_tokens: bool = False,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = True,
    ) -> list[Any]:
        """x (N, C, H, W) -> the patches after the blocks `indices` (0-based; a number: the last so many) as maps (N, D, h, w), or
        as tokens (N, L, D) by `output_fmt` "NLC"; with `return_prefix_tokens` each in a pair with the class token (N, 1, D)."""
        grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        wanted = range(len(self.blocks))[-indices:] if isinstance(indices, int) else indices
        taken = [
            self.norm(x) if norm else x for index, x in enumerate(self._after_blocks(x)) if index in wanted
        ]
        patches = [
            x[:, 1:] if output_fmt == "NLC" else x[:, 1:].transpose(1, 2).unflatten(2, grid) for x in taken
        ]
        return list(zip(patches, [x[:, :1] for x in taken], strict=True)) if return_prefix_tokens else patches

    def _after_blocks(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        grid = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        for module in self.modules():
            if isinstance(module, AnySizeAttention | AnySizeRelativePositionBias):
                module.grid = grid
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        if self.pos_embed is not None:
            x = x + resize_table(self.pos_embed, self.patch_embed.grid_size, grid, self.pos_resample)
        x, shared = self.pos_drop(x), None if self.rel_pos_bias is None else self.rel_pos_bias()
        for block in self.blocks:
            x = (
                checkpoint(block, x, shared)
                if self.grad_checkpointing
                else block(x, shared_rel_pos_bias=shared)
            )
            yield x
