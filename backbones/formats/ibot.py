"""ibot: training files of bytedance/ibot (student and teacher) and the backbones that its script extracts from them."""

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
HEADS = r"(?:module\.)?head\."


def fits(checkpoint: Checkpoint) -> bool:
    """The student's mask embedding, or a backbone beside iBOT's head of two last layers; an extracted teacher has neither."""
    stem = checkpoint.prefix.removesuffix("backbone.")
    marked = "masked_embed" in checkpoint.tensors or (
        stem != checkpoint.prefix
        and any(name.startswith(f"{stem}head.last_layer2.") for name in checkpoint.outside)
    )
    return marked and is_plain_vit(checkpoint.tensors, *DROP)


def read(checkpoint: Checkpoint) -> Translation:
    """The backbone's names are timm's; its layer scales, where it was trained with some, are BEiT's gamma_1 and gamma_2."""
    return read_timm_vit(checkpoint, "ibot", DROP, outside={HEADS: PROJECTOR})
