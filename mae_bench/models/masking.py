"""Masking: patches are removed by sorting noise, drawn for random, block-wise or grid-wise sampling.

Legend: N batch, L patches, K kept patches, M = L - K removed patches, D width, R rounds of block-wise
    sampling.
"""

import math
from dataclasses import dataclass

import torch

from mae_bench.errors import UserError
from mae_bench.models.options import Sampling

# Blocks drawn per image. Patches still missing after them (at ratios near 1) are removed one by one
BLOCK_ROUNDS = 64
# Height over width of the narrowest block; the widest has the inverse (BEiT, arXiv 2106.08254, Algorithm 1)
BLOCK_ASPECT = 0.3
# Smallest block on BEiT's grid of 14 x 14; smaller grids use smaller blocks
BLOCK_PATCHES = 16


@dataclass(frozen=True)
class Masking:
    """Masks of N images of L patches each, with the names of facebookresearch/mae (mask: 1 = removed).

    ids_shuffle: (N, L) patches sorted by their noise, the kept ones first.
    len_keep: number K of kept patches.
    """

    ids_shuffle: torch.Tensor
    len_keep: int

    @property
    def num_masked(self) -> int:
        """Number M of removed patches."""
        return self.ids_shuffle.shape[1] - self.len_keep

    @property
    def ids_keep(self) -> torch.Tensor:
        """(N, K) kept patches."""
        return self.ids_shuffle[:, : self.len_keep]

    @property
    def ids_masked(self) -> torch.Tensor:
        """(N, M) removed patches."""
        return self.ids_shuffle[:, self.len_keep :]

    @property
    def ids_restore(self) -> torch.Tensor:
        """(N, L) inverse of `ids_shuffle`."""
        return self.ids_shuffle.argsort(dim=1)

    @property
    def mask(self) -> torch.Tensor:
        """(N, L) floats in raster order: 0 = kept, 1 = removed."""
        mask = torch.ones(self.ids_shuffle.shape, device=self.ids_shuffle.device)
        return mask.scatter_(1, self.ids_keep, 0.0)


def build_masking(noise: torch.Tensor, mask_ratio: float) -> Masking:
    """Keep the patches with the smallest noise (N, L); `count_kept` gives their number."""
    return Masking(noise.argsort(dim=1), count_kept(noise.shape[1], mask_ratio))


def count_kept(num_patches: int, mask_ratio: float) -> int:
    """Return len_keep = int(L * (1 - mask_ratio)), truncated as in the reference.

    Raise UserError if no patch would be kept, or none removed (there would be no loss).
    """
    len_keep = int(num_patches * (1 - mask_ratio))
    if not 0 < len_keep < num_patches:
        largest = next((k for k in range(999, 0, -1) if int(num_patches * (1 - k / 1000))), 0) / 1000
        use_less = f"use a mask_ratio above 0 and at most {largest}"
        raise UserError(
            f"mask_ratio {mask_ratio} keeps {len_keep} of {num_patches} patches",
            expected="at least one patch kept and one removed",
            fix=use_less if largest else "use larger images or smaller patches",
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
    """Return noise (num_imgs, L) in [0, 1] whose ascending order realises a sampling (Figure 6, Table 1f).

    "random": every set of patches has the same probability.
    "grid": of every 2 x 2 patches the upper left one is kept first, then the diagonally opposite one. A
        ratio of 0.75 gives the paper's regular grid, 0.5 a chessboard; in between, patches are drawn at
        random.
    "block": rectangles are removed as in BEiT (arXiv 2106.08254); the last one is cut to reach the exact
        count.

    Noise is drawn on the generator's device (`device` without a generator). Row i only depends on the
    generator and i.
    """
    num_patches = grid_size[0] * grid_size[1]
    num_masked = num_patches - count_kept(num_patches, mask_ratio)
    draw_on = generator.device if generator else torch.device(device)
    noise = torch.rand(num_imgs, num_patches, generator=generator, device=draw_on)
    if sampling == "grid":
        noise = (_grid_phase(grid_size).to(draw_on) + noise) / 4
    elif sampling == "block":
        draws = torch.rand(num_imgs, BLOCK_ROUNDS, 4, generator=generator, device=draw_on)
        noise = 1 - (_removal_round(draws, grid_size, num_masked) + noise) / (BLOCK_ROUNDS + 1)
    elif sampling != "random":
        raise UserError(f"mask_sampling {sampling!r}", expected="random, block or grid")
    return noise.to(device, non_blocking=True)


def _grid_phase(grid_size: tuple[int, int]) -> torch.Tensor:
    """Return (L,) values 0 to 3, the order in which the patches of each 2 x 2 are kept."""
    rows, columns = torch.arange(grid_size[0]), torch.arange(grid_size[1])
    down, across = torch.meshgrid(rows % 2, columns % 2, indexing="ij")
    return torch.tensor([[0, 2], [3, 1]])[down, across].flatten()


def _removal_round(draws: torch.Tensor, grid_size: tuple[int, int], num_masked: int) -> torch.Tensor:
    """draws (N, R, 4) in [0, 1) -> (N, L): the round whose block removes each patch, R if none does."""
    (n, rounds, _), num_patches = draws.shape, grid_size[0] * grid_size[1]
    removed_in = torch.full((n, num_patches), rounds, dtype=torch.int16, device=draws.device)
    smallest = min(BLOCK_PATCHES, max(1, num_patches // 12))
    # Images with patches left to remove, and how many
    active = torch.arange(n, device=draws.device)
    missing = torch.full((n,), num_masked, device=draws.device)
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
    """draws (N, 4) -> (N, L), True inside one rectangle per image.

    The area is uniform between low and high (N,), the aspect log-uniform, the position uniform.
    """
    area = low + draws[:, 0] * (high - low)
    aspect = torch.exp((1 - 2 * draws[:, 1]) * math.log(BLOCK_ASPECT))
    inside = []
    for squared, length, place in zip((area * aspect, area / aspect), grid_size, draws[:, 2:].T, strict=True):
        extent = squared.sqrt().round().clamp(1, length)
        start = (place * (length - extent + 1)).floor()[:, None]
        steps = torch.arange(length, device=draws.device)
        inside.append((steps >= start) & (steps < start + extent[:, None]))
    down, across = inside
    rectangles: torch.Tensor = down[:, :, None] & across[:, None, :]
    return rectangles.flatten(1)


def gather_tokens(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """x (N, L, D), ids (N, M) -> (N, M, D). A table (1, L, D) is shared by all images."""
    index = ids[..., None].expand(-1, -1, x.shape[-1])
    return x.expand(ids.shape[0], -1, -1).gather(1, index)
