"""Random masking by shuffled noise (arXiv 2111.06377, section 3)."""

from dataclasses import dataclass

import torch

from mae_bench.errors import UserError


@dataclass(frozen=True)
class Masking:
    """Which of L patches each of N images keeps. mask 1 = removed.

    ids_shuffle (N, L): patches in the order of their noise, the kept ones first; ids_restore (N, L) is its inverse.
    """

    ids_shuffle: torch.Tensor
    len_keep: int

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


def random_masking(noise: torch.Tensor, mask_ratio: float) -> Masking:
    """Keeps the int(L * (1 - mask_ratio)) patches of smallest noise (N, L); the truncation is the reference's.

    A ratio that keeps no patch, or removes none and so leaves no loss, raises UserError.
    """
    num_patches = noise.shape[1]
    len_keep = int(num_patches * (1 - mask_ratio))
    if not 0 < len_keep < num_patches:
        raise UserError(
            f"mask_ratio {mask_ratio} keeps {len_keep} of {num_patches} patches",
            expected="at least one patch kept and one removed",
            fix=f"use a mask_ratio from {1 / num_patches:.3f} to {1 - 1 / num_patches:.3f}",
        )
    return Masking(noise.argsort(dim=1), len_keep)


def gather_tokens(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """x (N, L, D), ids (N, M) -> (N, M, D); a table (1, L, D) is gathered for every image."""
    return x.expand(ids.shape[0], -1, -1).gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
