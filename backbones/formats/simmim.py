"""simmim: ViTs of microsoft/SimMIM (pretrained, with the decoder; fine-tuned), in BEiT's layout."""

from backbones.formats.beit import possible_families, read_as
from backbones.reading.source import Checkpoint
from backbones.translating.translation import Translation, explain
from mae_bench.errors import UserError

OUTSIDE = {r"decoder\.": "pretraining decoder, one linear layer to pixels: not part of the backbone"}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has BEiT's layout, with SimMIM's marks or without any.

    Its Swin Transformers fit too, so that `read` can refuse them with a reason.
    """
    return "simmim" in possible_families(checkpoint) or _is_swin(checkpoint)


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the encoder, which has timm's names for BEiT; raise UserError for a Swin Transformer."""
    if _is_swin(checkpoint):
        raise UserError(
            f"{checkpoint.source} is a Swin Transformer",
            expected="a plain ViT: SimMIM's vit_base, not its swin models",
        )
    result = read_as("simmim", checkpoint)
    result.outside = explain(checkpoint.outside, OUTSIDE)
    return result


def _is_swin(checkpoint: Checkpoint) -> bool:
    return "layers.0.blocks.0.attn.qkv.weight" in checkpoint.tensors
