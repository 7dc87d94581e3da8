"""maskfeat: MaskFeat's ViTs as facebookresearch/SlowFast saves them, pretrained or fine-tuned."""

import re

from backbones.reading.source import Checkpoint
from backbones.translating.translation import HEAD, MASK_TOKEN, Translation, is_plain_vit, read_timm_vit

DROP = {
    r"mask_token$": MASK_TOKEN,
    r"pred_head\.projections\.": "prediction head of the pretraining: no part of the backbone",
    r"hogs\.": "filters of the HOG targets: no part of the backbone",
    r"head\.projection\.": HEAD,
}
LAST_NORM = r"pred_head\.transforms\.0\.0\.(weight|bias)$"


def fits(checkpoint: Checkpoint) -> bool:
    """The head that predicts HOG features, or SlowFast's wrapper around a ViT with its classifier."""
    keys = checkpoint.tensors
    marked = "pred_head.projections.0.weight" in keys or (
        checkpoint.wrapper == "model_state" and "head.projection.weight" in keys
    )
    return marked and is_plain_vit(keys, r"pred_head\.transforms\.", *DROP)


def read(checkpoint: Checkpoint) -> Translation:
    """A pretrained encoder ends in the norm before its predictions; a fine-tuned one has its norm behind the average pooling."""
    if "norm.weight" not in checkpoint.tensors:
        result = read_timm_vit(checkpoint, "maskfeat", DROP, rename={LAST_NORM: r"norm.\1"})
        result.notes.append(
            "the norm in front of the HOG predictions is taken as the final norm; its fine-tuning draws a new one"
        )
        return result
    pooled = not re.search(
        r"\bUSE_MEAN_POOLING: false\b", str(checkpoint.extras.get("cfg", "")), re.IGNORECASE
    )
    result = read_timm_vit(checkpoint, "maskfeat", DROP, rename={r"norm\.": "fc_norm."} if pooled else {})
    result.assumed |= {"global_pool": "avg" if pooled else "token", "pretrain_method": "maskfeat, fine-tuned"}
    return result
