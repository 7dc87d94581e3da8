"""lightly: Lightning files of lightly's ViT methods, and the embedding models that lightly-train exports."""

import re

from backbones.reading.source import Checkpoint
from backbones.translating.translation import (
    HEAD,
    MASK_TOKEN,
    Translation,
    is_plain_vit,
    parse_numbers,
    read_timm_vit,
)

# lightly's MaskedVisionTransformerTIMM in a method's backbone; lightly-train's wrappers around a timm model.
PREFIX = re.compile(r"(?:.*\.)?(?:\w*backbone\w*\.vit|wrapped_model\._model)\.$")
METHODS = {  # a key beside the ViT that only this method of lightly's benchmarks has
    "decoder_embed.weight": "mae",
    "student_projection_head.last_layer.weight_v": "dino",
    "student_head.last_layer.weight_v": "ibot",
    "student_head.dino_head.last_layer.weight_v": "dinov2",
}


def fits(checkpoint: Checkpoint) -> bool:
    """A timm ViT where lightly's or lightly-train's wrappers keep it."""
    others = (r"head\.", r"fc_norm\.", r"blocks\.\d+\.ls[12]\.gamma$")
    return bool(PREFIX.match(checkpoint.prefix)) and is_plain_vit(checkpoint.tensors, *others)


def read(checkpoint: Checkpoint) -> Translation:
    """The ViT is timm's own, with the classifier that timm gives it; lightly-train says how it normalised images."""
    result = read_timm_vit(
        checkpoint, "lightly", {r"head\.": HEAD}, outside={r"(?:.*\.)?mask_token$": MASK_TOKEN}
    )
    described = checkpoint.extras.get("lightly_train")
    fed = described.get("normalize_args") if isinstance(described, dict) else None
    if isinstance(fed, dict):
        result.facts |= {
            key: parse_numbers(fed[key], key, checkpoint.source) for key in ("mean", "std") if key in fed
        }
    if method := next((method for key, method in METHODS.items() if key in checkpoint.outside), None):
        result.assumed["pretrain_method"] = method
    return result
