"""ibot: training files of bytedance/ibot (student, teacher) and the backbones that its script extracts."""

from backbones.reading.source import Checkpoint
from backbones.translating.translation import (
    HEAD,
    MASK_TOKEN,
    PROJECTOR,
    Translation,
    is_plain_vit,
    read_timm_vit,
)

DROP = {r"masked_embed$": MASK_TOKEN, r"head\.": HEAD}
LAYER_SCALE = r"blocks\.\d+\.gamma_[12]$"
OUTSIDE = {r"(?:module\.)?head\.": PROJECTOR}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether there is the student's mask embedding, or iBOT's head with two last layers.

    An extracted teacher has neither.
    """
    if not is_plain_vit(checkpoint.tensors, LAYER_SCALE, *DROP):
        return False
    if "masked_embed" in checkpoint.tensors:
        return True
    stem = checkpoint.prefix.removesuffix("backbone.")
    has_head = any(name.startswith(f"{stem}head.last_layer2.") for name in checkpoint.outside)
    return has_head and stem != checkpoint.prefix


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the backbone, which has timm's names, and BEiT's (gamma_1, gamma_2) for layer scales."""
    return read_timm_vit(checkpoint, "ibot", DROP, outside=OUTSIDE)
