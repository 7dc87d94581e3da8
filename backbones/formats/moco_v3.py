"""moco_v3: training and linear-probe files of facebookresearch/moco-v3."""

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
OUTSIDE = {r"(?:module\.)?predictor\.": "pretraining predictor: not part of the backbone"}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether there is the base or momentum encoder, or MoCo v3's position embedding.

    The latter is the only mark of a linear probe's file.
    """
    if not is_plain_vit(checkpoint.tensors, *DROP):
        return False
    if set(ENCODERS) & set(checkpoint.prefix.split(".")):
        return True
    described = checkpoint.stated_spec or checkpoint.beside  # written by a converter
    return checkpoint.prefix in ("", "module.") and not described and has_moco_pos_embed(checkpoint.tensors)


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the encoder, which has timm's names."""
    return read_timm_vit(checkpoint, "moco_v3", DROP, outside=OUTSIDE)
