"""Windows, heads and neck of SAM's image encoders, inferred from their relative position tables."""

from collections.abc import Mapping
from typing import Any

import torch

from backbones.translating.structure import count_blocks
from backbones.translating.translation import Translation
from mae_bench.errors import UserError
from mae_bench.models.vit import quarter_indices

Grid = tuple[int, int]  # patches (h, w)


def infer_window_facts(
    result: Translation, source: str, stated: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return BackboneSpec fields of a translated encoder with relative positions in every block.

    stated: what a SamVisionConfig of transformers states. Raise UserError for tables that fit neither the
    image nor a window, or that contradict `stated`.
    """
    stated = stated or {}
    try:
        grid, block_grids, num_heads, neck_chans = _measure(result.weights)
        patch = result.weights["patch_embed.proj.weight"].shape[2:]
        global_blocks = _find_global_blocks(grid, block_grids, stated.get("global_attn_indexes"))
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{source}: no usable {error}", expected="the position tables of SAM's image encoder"
        ) from error
    windows = {block_grid for i, block_grid in enumerate(block_grids) if i not in global_blocks}
    if len(windows) > 1 or any(height != width for height, width in windows):
        raise UserError(
            f"{source}: relative positions for windows of {sorted(windows)}",
            expected="square windows of one size",
        )
    found: dict[str, Any] = {"num_attention_heads": num_heads, "global_attn_indexes": global_blocks}
    if windows:
        found["window_size"] = windows.pop()[0]
    wrong = {key: stated[key] for key, value in found.items() if stated.get(key, value) != value}
    if wrong:
        raise UserError(
            f"{source}: {wrong} where the tables say {found}", expected="a description that fits the weights"
        )
    return {
        "arch": "sam",
        "img_size": tuple(side * pixels for side, pixels in zip(grid, patch, strict=True)),
        "num_heads": num_heads,
        "options": {
            "use_rel_pos": True,
            "window_size": found.get("window_size", 0),
            "global_attn_indexes": global_blocks,
            "neck_chans": neck_chans,
        },
    }


def _measure(weights: Mapping[str, torch.Tensor]) -> tuple[Grid, list[Grid], int, int]:
    """Return the image's grid, the grid of each block's tables, the number of heads and the neck's channels.

    A table for n patches is (2 n - 1, D / num_heads).
    """
    _, grid_h, grid_w, embed_dim = weights["pos_embed"].shape
    depth = count_blocks(weights)
    tables = [[weights[f"blocks.{i}.attn.rel_pos_{axis}"].shape for axis in "hw"] for i in range(depth)]
    block_grids = [((table_h[0] + 1) // 2, (table_w[0] + 1) // 2) for table_h, table_w in tables]
    num_heads = embed_dim // tables[0][0][1]
    return (grid_h, grid_w), block_grids, num_heads, weights["neck.0.weight"].shape[0]


def _find_global_blocks(grid: Grid, block_grids: list[Grid], stated: Any) -> list[int]:
    """Return the blocks with global attention.

    Where every table has the size of a square image, windows make no difference at this size: return the
    stated blocks, by default the last of each quarter, as in SAM.
    """
    depth = len(block_grids)
    found = [i for i, block_grid in enumerate(block_grids) if block_grid == grid]
    if len(found) < depth or grid[0] != grid[1]:
        return found
    return list(stated) if stated is not None else sorted(set(quarter_indices(depth)))
