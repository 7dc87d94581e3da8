"""deit: files of facebookresearch/deit, with or without a distillation token (DeiT III is deit3)."""

from backbones.reading.source import Checkpoint
from backbones.translating.translation import (
    HEAD,
    Translation,
    has_moco_pos_embed,
    is_plain_vit,
    is_sincos,
    read_timm_vit,
)

DROP = {r"head\.": HEAD, r"head_dist\.": "classifier of the distillation token: each task trains its own"}
WRAPPERS = ("model", "model_ema")
TRAINING_STATE = {"lr_scheduler", "args", *WRAPPERS}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has DeiT's mark, or is `model` with a classifier and learned positions.

    The latter is how DeiT publishes its models; fine-tuned MAEs look the same.
    """
    keys = checkpoint.tensors
    if not is_plain_vit(keys, r"dist_token$", *DROP) or not {"cls_token", "pos_embed"} <= set(keys):
        return False
    if is_marked(checkpoint):
        return True
    published = checkpoint.wrapper == "model" and not checkpoint.extras and "head.weight" in keys
    return published and not is_sincos(keys["pos_embed"]) and not has_moco_pos_embed(keys)


def is_marked(checkpoint: Checkpoint) -> bool:
    """Return whether the file has a distillation token or the training state that DeiT's main.py saves.

    That state holds a scheduler, the arguments and a second set of weights.
    """
    if "dist_token" in checkpoint.tensors:
        return True
    saved = {*checkpoint.extras, checkpoint.wrapper}
    return checkpoint.wrapper in WRAPPERS and saved >= TRAINING_STATE


def read(checkpoint: Checkpoint) -> Translation:
    """Translate a DeiT; its distillation token follows the class token, like a register."""
    result = read_timm_vit(checkpoint, "deit", DROP, rename={r"dist_token$": "reg_token"})
    if "reg_token" in result.weights:
        result.assumed["pretrain_method"] = "supervised, distilled"
        result.notes.append(
            "the distillation token is kept as a register; DeiT averages the classifiers of both tokens"
        )
    return result
