"""Which patches are removed: by the order of a noise, drawn so that it realises random, block-wise or grid-wise sampling."""

from dataclasses import dataclass
from typing import Literal

import torch

from mae_bench.errors import UserError

Sampling = Literal["random", "block", "grid"]
BLOCK_ROUNDS = 96  # blocks drawn an image; what is then still missing, at ratios near 1, is removed patch by patch
BLOCK_ASPECT = 0.3  # of the narrowest block, height over width; the widest has its inverse (arXiv 2106.08254, Algorithm 1)
BLOCK_PATCHES = 16  # of the smallest block, for BEiT's grid of 14 x 14; a smaller grid has smaller ones


@dataclass(frozen=True)
class Masking:
    """Which of L patches each of N images keeps. mask 1 = removed.

    ids_shuffle (N, L): patches in the order of their noise, the kept ones first; ids_restore (N, L) is its inverse.
    """

    ids_shuffle: torch.Tensor
    len_keep: int

    @property
    def num_masked(self) -> int:
        return self.ids_shuffle.shape[1] - self.len_keep

    @property
    def ids_keep(self) -> torch.Tensor:
        """(N, len_keep)"""
        return self.ids_shuffle[:, : self.len_keep]

    @property
    def ids_masked(self) -> torch.Tensor:
        """(N, L - len_keep)"""
        return self.ids_shuffle[:, self.len_keep :]

    @property
    def ids_restore(self) -> torch.Tensor:
        """(N, L)"""
        return self.ids_shuffle.argsort(dim=1)

    @property
    def mask(self) -> torch.Tensor:
        """(N, L) float: 0 = kept, 1 = removed."""
        mask = torch.ones(self.ids_shuffle.shape, device=self.ids_shuffle.device)
        return mask.scatter_(1, self.ids_keep, 0.0)


def build_masking(noise: torch.Tensor, mask_ratio: float) -> Masking:
    """Keeps the patches of smallest noise (N, L), as many as `count_kept` says."""
    return Masking(noise.argsort(dim=1), count_kept(noise.shape[1], mask_ratio))


def count_kept(num_patches: int, mask_ratio: float) -> int:
    """int(L * (1 - mask_ratio)); the truncation is the reference's.

    A ratio that keeps no patch, or removes none and so leaves no loss, raises UserError.
    """
    len_keep = int(num_patches * (1 - mask_ratio))
    if not 0 < len_keep < num_patches:
        usable = f"use a mask_ratio from {1 / num_patches:.3f} to {1 - 1 / num_patches:.3f}"
        raise UserError(
            f"mask_ratio {mask_ratio} keeps {len_keep} of {num_patches} patches",
            expected="at least one patch kept and one removed",
            fix=usable if num_patches > 1 else "make the images larger or the patches smaller",
        )
    return len_keep


def sample_noise(
    sampling: Sampling,
    num_imgs: int,
    grid_size: tuple[int, int],
    mask_ratio: float,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """(num_imgs, L) noise in [0, 1] whose ascending order realises the sampling at any mask_ratio (Figure 6, Table 1f).

    random: every set of patches is as likely. grid: of every 2 x 2 patches the upper left is kept first, then the one across,
    so that 0.75 is the paper's regular one of four and 0.5 a chessboard; between them patches are drawn.
    block: rectangles are removed as in BEiT (arXiv 2106.08254), the last one in part, until the count is exact.
    Drawn where the generator lives, by default on `device`. Row i depends on the generator and i alone.
    """
    count_kept(grid_size[0] * grid_size[1], mask_ratio)
    at = generator.device if generator else torch.device(device)
    noise = torch.rand(num_imgs, grid_size[0] * grid_size[1], generator=generator, device=at)
    return noise.to(device, non_blocking=True)


def gather_tokens(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """x (N, L, D), ids (N, M) -> (N, M, D); a table (1, L, D) is gathered for every image."""
    return x.expand(ids.shape[0], -1, -1).gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
