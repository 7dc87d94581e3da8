"""simmim: ViTs of microsoft/SimMIM (pretrained, with the decoder beside the encoder; fine-tuned), in BEiT's layout."""

from backbones.formats.beit import possible_families, read_as
from backbones.reading.source import Checkpoint
from backbones.translating.translation import Translation
from mae_bench.errors import UserError

DECODER = "decoder of the pretraining, one linear layer to pixels: no part of the backbone"


def fits(checkpoint: Checkpoint) -> bool:
    """BEiT's layout with SimMIM's marks, or with none; and its Swin Transformers, to say that they are none."""
    return "simmim" in possible_families(checkpoint) or _is_swin(checkpoint)


def read(checkpoint: Checkpoint) -> Translation:
    """The encoder has timm's names for BEiT; UserError for a Swin Transformer."""
    if _is_swin(checkpoint):
        raise UserError(
            f"{checkpoint.source} is a Swin Transformer",
            expected="a plain ViT: SimMIM's vit_base, not its swin models",
        )
    result = read_as("simmim", checkpoint)
    result.outside = dict.fromkeys(
        (name for name in checkpoint.outside if name.startswith("decoder.")), DECODER
    )
    return result


def _is_swin(checkpoint: Checkpoint) -> bool:
    return "layers.0.blocks.0.attn.qkv.weight" in checkpoint.tensors
