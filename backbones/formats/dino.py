"""dino: training files of facebookresearch/dino (student and teacher); its published backbones bear no mark."""

from backbones.reading.source import Checkpoint
from backbones.translating.translation import HEAD, PROJECTOR, Translation, is_plain_vit, read_timm_vit

HEADS = r"(?:module\.)?head\."


def fits(checkpoint: Checkpoint) -> bool:
    """A backbone beside DINO's head, which ends in one layer (iBOT's has two); solo-learn has a classifier beside both."""
    stem, outside = checkpoint.prefix.removesuffix("backbone."), checkpoint.outside
    return (
        is_plain_vit(checkpoint.tensors)
        and stem != checkpoint.prefix
        and any(name.startswith(f"{stem}head.last_layer.") for name in outside)
        and not any(name.startswith((f"{stem}head.last_layer2.", "classifier.")) for name in outside)
    )


def read(checkpoint: Checkpoint) -> Translation:
    """The backbone's names are timm's."""
    return read_timm_vit(checkpoint, "dino", {r"head\.": HEAD}, outside={HEADS: PROJECTOR})
