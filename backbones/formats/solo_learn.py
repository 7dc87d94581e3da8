"""solo_learn: Lightning files of solo-learn's methods, with or without a momentum backbone."""

from backbones.reading.source import Checkpoint
from backbones.translating.translation import (
    HEAD,
    PROJECTOR,
    Translation,
    has_moco_pos_embed,
    is_plain_vit,
    is_sincos,
    read_timm_vit,
)

# encoder. and momentum_encoder. are the names of its first versions.
PREFIXES = ("backbone.", "momentum_backbone.", "encoder.", "momentum_encoder.")
OUTSIDE = {
    r"(?:momentum_)?classifier\.": HEAD,
    r"(?:momentum_)?(?:projector|head)\.": PROJECTOR,
    r"decoder\.|predictor\.": "pretraining decoder or predictor: not part of the backbone",
}
FIXED = "solo_learn, fixed positions"  # its own ViTs for MAE and MoCo v3, others are timm's


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether there is solo-learn's linear classifier, which all methods train, and a backbone."""
    return (
        checkpoint.wrapper == "state_dict"
        and checkpoint.prefix in PREFIXES
        and "classifier.weight" in checkpoint.outside
        and is_plain_vit(checkpoint.tensors, r"head\.")
    )


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the backbone, which has timm's names."""
    method = _infer_method(checkpoint)
    result = read_timm_vit(checkpoint, "solo_learn", {r"head\.": HEAD}, outside=OUTSIDE)
    result.family = FIXED if method in ("mae", "moco_v3") else ""
    if method:
        result.assumed["pretrain_method"] = method
    return result


def _infer_method(checkpoint: Checkpoint) -> str | None:
    """Return the pretraining method, from the position embedding (fixed for MAE, MoCo v3) or the head."""
    table = checkpoint.tensors.get("pos_embed")
    if table is not None and is_sincos(table):
        return "mae"
    if has_moco_pos_embed(checkpoint.tensors):
        return "moco_v3"
    has_dino_head = any(name.startswith("head.last_layer.") for name in checkpoint.outside)
    return "dino" if has_dino_head else None
