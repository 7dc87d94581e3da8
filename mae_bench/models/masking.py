"""Which patches are removed: by the order of a noise, drawn so that it realises random, block-wise or grid-wise sampling."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from mae_bench.errors import UserError

Sampling = Literal["random", "block", "grid"]
BLOCK_ROUNDS = (
    64  # blocks drawn an image; what is then still missing, at ratios near 1, is removed patch by patch
)
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
        most = next((k for k in range(999, 0, -1) if int(num_patches * (1 - k / 1000))), 0) / 1000
        raise UserError(
            f"mask_ratio {mask_ratio} keeps {len_keep} of {num_patches} patches",
            expected="at least one patch kept and one removed",
            fix=f"use a mask_ratio above 0 and at most {most}"
            if most
            else "make the images larger or the patches smaller",
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
    num_patches = grid_size[0] * grid_size[1]
    num_masked = num_patches - count_kept(num_patches, mask_ratio)
    at = generator.device if generator else torch.device(device)
    noise = torch.rand(num_imgs, num_patches, generator=generator, device=at)
    if sampling == "grid":
        noise = (_grid_phase(grid_size).to(at) + noise) / 4
    elif sampling == "block":
        draws = torch.rand(num_imgs, BLOCK_ROUNDS, 4, generator=generator, device=at)
        noise = 1 - (_removal_round(draws, grid_size, num_masked) + noise) / (BLOCK_ROUNDS + 1)
    elif sampling != "random":
        raise UserError(f"mask_sampling {sampling!r}", expected="random, block or grid")
    return noise.to(device, non_blocking=True)


def _grid_phase(grid_size: tuple[int, int]) -> torch.Tensor:
    """(L,) of 0 to 3: when a patch is kept, by its place among 2 x 2; the first two are diagonal."""
    down, across = torch.meshgrid(
        torch.arange(grid_size[0]) % 2, torch.arange(grid_size[1]) % 2, indexing="ij"
    )
    return torch.tensor([[0, 2], [3, 1]])[down, across].flatten()


def _removal_round(draws: torch.Tensor, grid_size: tuple[int, int], num_masked: int) -> torch.Tensor:
    """draws (N, rounds, 4) in [0, 1) -> (N, L): which block removes a patch, the number of rounds where none does."""
    (n, rounds, _), num_patches = draws.shape, grid_size[0] * grid_size[1]
    removed_in = torch.full((n, num_patches), rounds, dtype=torch.int16, device=draws.device)
    smallest = min(BLOCK_PATCHES, max(1, num_patches // 12))
    active, missing = torch.arange(n, device=draws.device), torch.full((n,), num_masked, device=draws.device)
    for i in range(rounds):
        block = _rectangles(draws[active, i], missing.clamp(max=smallest), missing, grid_size)
        removed = removed_in[active]
        removed = torch.where(block & (removed == rounds), i, removed)
        removed_in[active] = removed
        missing = num_masked - (removed < rounds).sum(dim=1)
        active, missing = active[missing > 0], missing[missing > 0]
        if not len(active):
            break
    return removed_in


def _rectangles(
    draws: torch.Tensor, low: torch.Tensor, high: torch.Tensor, grid_size: tuple[int, int]
) -> torch.Tensor:
    """draws (N, 4): size uniform in low to high (N,), aspect log-uniform, place uniform -> (N, L), True inside."""
    size = low + draws[:, 0] * (high - low)
    aspect = torch.exp((1 - 2 * draws[:, 1]) * math.log(BLOCK_ASPECT))
    inside = []
    for side, length, place in zip((size * aspect, size / aspect), grid_size, draws[:, 2:].T, strict=True):
        extent = side.sqrt().round().clamp(1, length)
        start = (place * (length - extent + 1)).floor()[:, None]
        steps = torch.arange(length, device=draws.device)
        inside.append((steps >= start) & (steps < start + extent[:, None]))
    return (inside[0][:, :, None] & inside[1][:, None, :]).flatten(1)


def gather_tokens(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """x (N, L, D), ids (N, M) -> (N, M, D); a table (1, L, D) is gathered for every image."""
    return x.expand(ids.shape[0], -1, -1).gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
