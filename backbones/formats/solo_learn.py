"""solo_learn: Lightning files of solo-learn's methods, with a momentum backbone or without."""

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

PREFIXES = (
    "backbone.",
    "momentum_backbone.",
    "encoder.",
    "momentum_encoder.",
)  # the latter two are of its first versions
OUTSIDE = {
    r"(?:momentum_)?classifier\.": HEAD,
    r"(?:momentum_)?(?:projector|head)\.": PROJECTOR,
    r"decoder\.|predictor\.": "decoder or predictor of the pretraining: no part of the backbone",
}


def fits(checkpoint: Checkpoint) -> bool:
    """A backbone beside the linear classifier that every method of solo-learn trains along."""
    return (
        checkpoint.wrapper == "state_dict"
        and checkpoint.prefix in PREFIXES
        and "classifier.weight" in checkpoint.outside
        and is_plain_vit(checkpoint.tensors, r"head\.")
    )


def read(checkpoint: Checkpoint) -> Translation:
    """The names are timm's. What was trained shows in the table (fixed for MAE and MoCo v3, learned for the others) and heads.

    Its own ViTs for MAE and MoCo v3 have 12 heads from tiny to base (solo/backbones/vit/vit_mae.py, vit_mocov3.py).
    """
    table = checkpoint.tensors.get("pos_embed")
    method = (
        "mae"
        if table is not None and is_sincos(table)
        else "moco_v3"
        if has_moco_pos_embed(checkpoint.tensors)
        else None
    )
    if not method and any(name.startswith("head.last_layer.") for name in checkpoint.outside):
        method = "dino"
    fixed = method in ("mae", "moco_v3")
    result = read_timm_vit(
        checkpoint,
        "solo_learn",
        {r"head\.": HEAD},
        outside=OUTSIDE,
        heads={192: 12, 384: 12} if fixed else {},
    )
    if method:
        result.assumed["pretrain_method"] = method
    return result
