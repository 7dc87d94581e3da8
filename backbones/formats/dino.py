"""dino: training files of facebookresearch/dino (student, teacher); its published backbones have no mark."""

from backbones.reading.source import Checkpoint
from backbones.translating.translation import HEAD, PROJECTOR, Translation, is_plain_vit, read_timm_vit

OUTSIDE = {r"(?:module\.)?head\.": PROJECTOR}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether there is a backbone next to DINO's head, which has one last layer.

    iBOT's head has two; solo-learn's files have a classifier as well.
    """
    stem, outside = checkpoint.prefix.removesuffix("backbone."), checkpoint.outside
    if not is_plain_vit(checkpoint.tensors) or stem == checkpoint.prefix:
        return False
    has_head = any(name.startswith(f"{stem}head.last_layer.") for name in outside)
    is_other = any(name.startswith((f"{stem}head.last_layer2.", "classifier.")) for name in outside)
    return has_head and not is_other


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the backbone, which has timm's names."""
    return read_timm_vit(checkpoint, "dino", {r"head\.": HEAD}, outside=OUTSIDE)
