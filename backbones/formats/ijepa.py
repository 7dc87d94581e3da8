"""ijepa: training files of facebookresearch/ijepa (encoder and target_encoder beside the predictor)."""

from backbones.reading.source import Checkpoint
from backbones.translating.translation import Translation, is_plain_vit, read_timm_vit

ENCODERS = ("encoder", "target_encoder")
HEADS = {1408: 16}  # of vit_giant


def fits(checkpoint: Checkpoint) -> bool:
    """A ViT without a class token in one of the file's two encoders, or in one of its own beside nothing but the predictor."""
    return (
        is_plain_vit(checkpoint.tensors)
        and "cls_token" not in checkpoint.tensors
        and checkpoint.wrapper in ENCODERS
        and "predictor" in checkpoint.extras
    )


def read(checkpoint: Checkpoint) -> Translation:
    """The names are timm's. Without a class token there are only patch tokens; their average is what is evaluated."""
    return read_timm_vit(checkpoint, "ijepa", {}, heads=HEADS)
