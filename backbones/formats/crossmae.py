"""crossmae: TonyLianLong/CrossMAE pretraining files (encoder and cross-attention decoder)."""

from backbones.reading.source import Checkpoint
from backbones.translating.translation import MASK_TOKEN, Translation, is_plain_vit, read_timm_vit

DROP = {
    r"mask_token$": MASK_TOKEN,
    r"decoder_": "pretraining decoder: not part of the backbone",
    r"wfm\.": "weights of the encoder's feature maps for each layer of the decoder: not part of the backbone",
    r"dec_norms\.": "norm of the feature maps for a layer of the decoder: not part of the backbone",
}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether a plain ViT has the weights of its feature maps, which no other family has."""
    return "wfm.linear.weight" in checkpoint.tensors and is_plain_vit(checkpoint.tensors, *DROP)


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the encoder, which has timm's names and no final norm.

    In pretraining each layer of the decoder has a norm of its own for a weighted sum of all blocks' outputs.
    """
    result = read_timm_vit(checkpoint, "crossmae", DROP)
    if "norm.weight" not in result.weights:
        result.facts["options"] = {"final_norm": False}
        result.notes.append(
            "the encoder has no final norm: its features are the last block's; CrossMAE's fine-tuning and "
            "linear probe initialise a new one"
        )
    return result
