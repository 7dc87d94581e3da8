"""maskfeat: MaskFeat's ViTs as facebookresearch/SlowFast saves them, pretrained or fine-tuned."""

import re

from backbones.reading.source import Checkpoint
from backbones.translating.translation import HEAD, MASK_TOKEN, Translation, is_plain_vit, read_timm_vit

DROP = {
    r"mask_token$": MASK_TOKEN,
    r"pred_head\.projections\.": "pretraining prediction head: not part of the backbone",
    r"hogs\.": "filters of the HOG targets: not part of the backbone",
    r"head\.projection\.": HEAD,
}
LAST_NORM = r"pred_head\.transforms\.0\.0\.(weight|bias)$"
TOKEN_POOLING = re.compile(r"\bUSE_MEAN_POOLING: false\b", re.IGNORECASE)


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether there is a head for HOG features, or SlowFast's wrapper around a classifier."""
    keys = checkpoint.tensors
    if not is_plain_vit(keys, r"pred_head\.transforms\.", *DROP):
        return False
    if "pred_head.projections.0.weight" in keys:
        return True
    return checkpoint.wrapper == "model_state" and "head.projection.weight" in keys


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the encoder.

    A pretrained one ends in the norm before its predictions; a fine-tuned one has its norm after the average
    pooling.
    """
    if "norm.weight" not in checkpoint.tensors:
        result = read_timm_vit(checkpoint, "maskfeat", DROP, rename={LAST_NORM: r"norm.\1"})
        result.notes.append(
            "the norm before the HOG predictions is used as the final norm; "
            "MaskFeat's fine-tuning initialises a new one"
        )
        return result
    pooled = not TOKEN_POOLING.search(str(checkpoint.extras.get("cfg", "")))
    rename = {r"norm\.": "fc_norm."} if pooled else {}
    result = read_timm_vit(checkpoint, "maskfeat", DROP, rename=rename)
    result.assumed["global_pool"] = "avg" if pooled else "token"
    result.assumed["pretrain_method"] = "maskfeat, fine-tuned"
    return result
