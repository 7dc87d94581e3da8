"""deit3: DeiT III's files (facebookresearch/deit models_v2.py): layer scale, and no row for the class token in the table."""

from math import isqrt

import torch

from backbones.reading.source import Checkpoint
from backbones.translating.structure import has_timm_description
from backbones.translating.translation import HEAD, Translation, is_plain_vit, read_timm_vit

DROP = {r"head\.": HEAD}
HEADS = {
    512: 8,
    1408: 16,
    1664: 16,
}  # of deit_medium, deit_giant and deit_Giant; the others' are the standard


def fits(checkpoint: Checkpoint) -> bool:
    """gamma_1 and gamma_2 in a ViT whose table has a row for each patch and none for its class token."""
    keys = checkpoint.tensors
    if (
        has_timm_description(checkpoint)
        or not is_plain_vit(keys, r"blocks\.\d+\.gamma_[12]$", *DROP)
        or not {"cls_token", "pos_embed"} <= set(keys)
    ):
        return False
    return "blocks.0.gamma_1" in keys and _grid_side(keys["pos_embed"]) > 0


def read(checkpoint: Checkpoint) -> Translation:
    """Layer scales are renamed; the class token is put in front of the patches after their positions were added."""
    result = read_timm_vit(checkpoint, "deit3", DROP, heads=HEADS)
    result.facts["options"] = {"no_embed_class": True, **result.facts.get("options", {})}
    if (table := checkpoint.tensors.get("pos_embed")) is not None and (side := _grid_side(table)):
        result.notes.append(
            f"its table of {side * side} rows is taken for {side} x {side} patches without the class token's row"
        )
    return result


def _grid_side(table: torch.Tensor) -> int:
    """Patches a side of a square grid of which the table (1, L, D) has a row each; 0 where there is none."""
    side = isqrt(table.shape[1]) if table.ndim == 3 else 0
    return side if side and side * side == table.shape[1] else 0
