"""moco_v3: training and linear-probe files of facebookresearch/moco-v3, known by their encoders' names or position table."""

from backbones.reading.source import Checkpoint
from backbones.translating.translation import (
    HEAD,
    PROJECTOR,
    Translation,
    has_moco_pos_embed,
    is_plain_vit,
    read_timm_vit,
)

ENCODERS = ("base_encoder", "momentum_encoder")
DROP = {r"head\.\d": PROJECTOR, r"head\.": HEAD}
LARGER = {
    1024: 16,
    1280: 16,
}  # heads of L and H, which the paper trains (arXiv 2104.02057) and vits.py does not build
PREDICTOR = r"(?:module\.)?predictor\."


def fits(checkpoint: Checkpoint) -> bool:
    """The base or momentum encoder of a training file, or (a probe's file) an encoder with MoCo v3's fixed position table."""
    if not is_plain_vit(checkpoint.tensors, *DROP):
        return False
    if set(ENCODERS) & set(checkpoint.prefix.split(".")):
        return True
    described = checkpoint.stated_spec or checkpoint.beside  # by whoever converted it
    return checkpoint.prefix in ("", "module.") and not described and has_moco_pos_embed(checkpoint.tensors)


def read(checkpoint: Checkpoint) -> Translation:
    """The names are timm's. Its ViTs of 384 and of 768 channels both have 12 heads (vits.py; families.yaml)."""
    outside = {PREDICTOR: "predictor of the pretraining: no part of the backbone"}
    return read_timm_vit(checkpoint, "moco_v3", DROP, outside=outside, heads=LARGER)
