"""deit: files of facebookresearch/deit, with a distillation token or without (DeiT III is deit3)."""

from backbones.reading.source import Checkpoint
from backbones.translating.translation import (
    HEAD,
    Translation,
    has_moco_pos_embed,
    is_plain_vit,
    is_sincos,
    read_timm_vit,
)

DROP = {r"head\.": HEAD, r"head_dist\.": "classifier of the distillation token: every task trains its own"}
WRAPPERS = ("model", "model_ema")


def fits(checkpoint: Checkpoint) -> bool:
    """A marked file, or `model` alone with classifier and a learned table, as it is published; fine-tuned MAEs look the same."""
    keys = checkpoint.tensors
    if not is_plain_vit(keys, r"dist_token$", *DROP) or not {"cls_token", "pos_embed"} <= set(keys):
        return False
    published = checkpoint.wrapper == "model" and not checkpoint.extras and "head.weight" in keys
    return is_marked(checkpoint) or (
        published and not is_sincos(keys["pos_embed"]) and not has_moco_pos_embed(keys)
    )


def is_marked(checkpoint: Checkpoint) -> bool:
    """A distillation token, or the training state that its main.py saves: scheduler, command line and a second set of weights."""
    if "dist_token" in checkpoint.tensors:
        return True
    return checkpoint.wrapper in WRAPPERS and {"lr_scheduler", "args", *WRAPPERS} <= {
        *checkpoint.extras,
        checkpoint.wrapper,
    }


def read(checkpoint: Checkpoint) -> Translation:
    """The names are timm's; the distillation token stands behind the class token, as a register does."""
    result = read_timm_vit(checkpoint, "deit", DROP, rename={r"dist_token$": "reg_token"})
    if "reg_token" in result.weights:
        result.assumed["pretrain_method"] = "supervised, distilled"
        result.notes.append(
            "the distillation token is kept as a register; its authors average its classifier with the other"
        )
    return result
