"""MAE's fixed sine-cosine position table.

Legend: h w grid of patches, L = h w patches, D width.
"""

import torch


def sincos_2d(embed_dim: int, grid_size: tuple[int, int], num_prefix_tokens: int = 1) -> torch.Tensor:
    """Return the table (1, prefix + L, D) in float32, computed in float64; rows of prefix tokens are zero.

    The first half of the channels encodes the column (w), the second half the row (h). Each half has a
    block of sines followed by a block of cosines, with frequencies 10000 ** (-i / (D / 4))
    (facebookresearch/mae util/pos_embed.py).
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim {embed_dim} must be divisible by 4 for a sine-cosine table")
    height, width = grid_size
    down, across = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    frequency = 10000 ** (-torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    columns, rows = (position.reshape(-1, 1) * frequency for position in (across, down))  # (L, D / 4)
    table = torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)  # (L, D)
    prefix = torch.zeros(num_prefix_tokens, embed_dim, dtype=torch.float64)
    return torch.cat([prefix, table])[None].float()
