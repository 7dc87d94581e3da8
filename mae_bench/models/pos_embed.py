"""The fixed sine-cosine position table of MAE."""

import torch


def sincos_2d(embed_dim: int, grid_size: tuple[int, int], num_prefix_tokens: int = 1) -> torch.Tensor:
    """(1, prefix + h * w, embed_dim) in float32, computed in float64; the rows of prefix tokens are zero.

    The first half of the channels encodes the position across (w), the second the position down (h); in each half a block of
    sines stands before a block of cosines, of frequencies 10000 ** (-i / (embed_dim / 4)) (facebookresearch/mae
    util/pos_embed.py).
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim {embed_dim} must be divisible by 4 for a sine-cosine table")
    height, width = grid_size
    down, across = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    frequency = 10000 ** (-torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    halves = [position.reshape(-1, 1) * frequency for position in (across, down)]
    table = torch.cat([wave for half in halves for wave in (half.sin(), half.cos())], dim=1)
    return torch.cat([torch.zeros(num_prefix_tokens, embed_dim, dtype=torch.float64), table])[None].float()
