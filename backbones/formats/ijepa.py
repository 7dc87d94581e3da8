"""ijepa: training files of facebookresearch/ijepa (encoder, target_encoder and predictor)."""

from backbones.reading.source import Checkpoint
from backbones.translating.translation import Translation, is_plain_vit, read_timm_vit

ENCODERS = ("encoder", "target_encoder")


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether an encoder next to a predictor is a ViT without a class token."""
    return (
        is_plain_vit(checkpoint.tensors)
        and "cls_token" not in checkpoint.tensors
        and checkpoint.wrapper in ENCODERS
        and "predictor" in checkpoint.extras
    )


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the encoder, which has timm's names and only patch tokens; their average is evaluated."""
    return read_timm_vit(checkpoint, "ijepa", {})
