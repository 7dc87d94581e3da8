"""What SAM's image encoders have in common wherever they come from: which blocks look through windows, told by their tables."""

from collections.abc import Mapping
from typing import Any

import torch

from backbones.translating.translation import Translation
from mae_bench.errors import UserError
from mae_bench.models.vit import quarter_indices

Side = tuple[int, int]


def infer_window_facts(
    result: Translation, source: str, stated: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Fields of the BackboneSpec of a translated encoder with relative positions in every block.

    stated: what a SamVisionConfig of transformers says. UserError for tables that fit neither the image nor a window, and for
    those that contradict `stated`.
    """
    stated = stated or {}
    try:
        grid, sides, heads, neck_chans = _measure(result.weights)
        patch = result.weights["patch_embed.proj.weight"].shape[2:]
        seeing_all = _find_global_blocks(grid, sides, stated.get("global_attn_indexes"))
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{source}: no usable {error}", expected="position tables as SAM's image encoder has them"
        ) from error
    windows = {side for i, side in enumerate(sides) if i not in seeing_all}
    if len(windows) > 1 or any(high != wide for high, wide in windows):
        raise UserError(
            f"{source}: relative positions for windows of {sorted(windows)}",
            expected="square windows of one size",
        )
    found: dict[str, Any] = {"num_attention_heads": heads, "global_attn_indexes": seeing_all}
    found |= {"window_size": windows.pop()[0]} if windows else {}
    if wrong := {key: stated[key] for key, value in found.items() if stated.get(key, value) != value}:
        raise UserError(
            f"{source}: {wrong} where the tables say {found}", expected="a description that fits the weights"
        )
    options = {
        "use_rel_pos": True,
        "window_size": found.get("window_size", 0),
        "global_attn_indexes": seeing_all,
    }
    img_size = tuple(side * pixels for side, pixels in zip(grid, patch, strict=True))
    return {
        "arch": "sam",
        "img_size": img_size,
        "num_heads": heads,
        "options": {**options, "neck_chans": neck_chans},
    }


def _measure(weights: Mapping[str, torch.Tensor]) -> tuple[Side, list[Side], int, int]:
    """Patches (down, across) of the image and of what each block's tables are for, heads, channels of the neck.

    Tables have 2 n - 1 rows for n patches, each of the width of a head."""
    _, down, across, width = weights["pos_embed"].shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    tables = [[weights[f"blocks.{i}.attn.rel_pos_{axis}"].shape for axis in "hw"] for i in range(depth)]
    sides = [((high[0] + 1) // 2, (wide[0] + 1) // 2) for high, wide in tables]
    return (down, across), sides, width // tables[0][0][1], weights["neck.0.weight"].shape[0]


def _find_global_blocks(grid: Side, sides: list[Side], stated: Any) -> list[int]:
    """The blocks that see all patches. Where every table is the square image's, windows make no difference at this size: then
    those that are stated, or else the last of every quarter, as in SAM."""
    found, depth = [i for i, side in enumerate(sides) if side == grid], len(sides)
    if len(found) < depth or grid[0] != grid[1]:
        return found
    return list(stated) if stated is not None else sorted(set(quarter_indices(depth)))
