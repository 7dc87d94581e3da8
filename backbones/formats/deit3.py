"""deit3: DeiT III (facebookresearch/deit models_v2.py): layer scale, no position for the class token."""

from math import isqrt

from backbones.reading.source import Checkpoint
from backbones.translating.structure import has_timm_description
from backbones.translating.translation import HEAD, Translation, is_plain_vit, read_timm_vit

DROP = {r"head\.": HEAD}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether a ViT has gamma_1 and gamma_2, and positions only for its patches."""
    keys = checkpoint.tensors
    if has_timm_description(checkpoint) or not is_plain_vit(keys, r"blocks\.\d+\.gamma_[12]$", *DROP):
        return False
    if not {"cls_token", "pos_embed", "blocks.0.gamma_1"} <= set(keys):
        return False
    table = keys["pos_embed"]
    return table.ndim == 3 and isqrt(table.shape[1]) ** 2 == table.shape[1] > 0


def read(checkpoint: Checkpoint) -> Translation:
    """Translate a DeiT III, whose class token is prepended after the positions are added to the patches."""
    result = read_timm_vit(checkpoint, "deit3", DROP)
    result.facts["options"] = {"no_embed_class": True, **result.facts.get("options", {})}
    table = checkpoint.tensors.get("pos_embed")
    if table is not None and table.ndim == 3:
        result.notes.append(f"its {table.shape[1]} positions are read as those of patches alone")
    return result
