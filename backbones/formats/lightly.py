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
METHODS = {  # a key outside the ViT that only one method of lightly's benchmarks has -> the method
    "decoder_embed.weight": "mae",
    "student_projection_head.last_layer.weight_v": "dino",
    "student_head.last_layer.weight_v": "ibot",
    "student_head.dino_head.last_layer.weight_v": "dinov2",
}
OTHERS = (r"head\.", r"fc_norm\.", r"blocks\.\d+\.ls[12]\.gamma$")
OUTSIDE = {r"(?:.*\.)?mask_token$": MASK_TOKEN}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether there is a timm ViT inside lightly's or lightly-train's wrappers."""
    return bool(PREFIX.match(checkpoint.prefix)) and is_plain_vit(checkpoint.tensors, *OTHERS)


def read(checkpoint: Checkpoint) -> Translation:
    """Translate timm's ViT without its classifier; lightly-train states mean and std."""
    result = read_timm_vit(checkpoint, "lightly", {r"head\.": HEAD}, outside=OUTSIDE)
    description = checkpoint.extras.get("lightly_train")
    normalize = description.get("normalize_args") if isinstance(description, dict) else None
    for key in ("mean", "std"):
        if isinstance(normalize, dict) and key in normalize:
            result.facts[key] = parse_numbers(normalize[key], key, checkpoint.source)
    method = next((method for key, method in METHODS.items() if key in checkpoint.outside), None)
    if method:
        result.assumed["pretrain_method"] = method
    return result
