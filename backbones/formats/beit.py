"""beit: microsoft/unilm's BEiT (pretrained, fine-tuned); BEiT v2, data2vec and SimMIM share its layout."""

import argparse
from typing import Any

from backbones.families import family
from backbones.reading.source import Checkpoint
from backbones.translating.structure import INDEX, INDEX_REASON, TABLE, infer_beit_facts, is_beit, is_eva
from backbones.translating.translation import HEAD, MASK_TOKEN, Translation, keep_names
from mae_bench.errors import UserError

FAMILIES = ("beit", "beitv2", "data2vec", "simmim")
INDEX_NAME = "relative_position_index"
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
DROP = {
    INDEX: INDEX_REASON,
    r"head\.": HEAD,
    r"mask_token$": MASK_TOKEN,
    r"(cls_pt_)?lm_head\.": "predicts visual tokens or features in pretraining: not part of the backbone",
    r"cls_pt_layers\.": "pretraining layers for BEiT v2's class token: not part of the backbone",
    r"cls_pt_norm\.": "norm of the class token's pretraining layers: not part of the backbone",
}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file is a ViT of BEiT's layout without another family's mark."""
    return "beit" in possible_families(checkpoint)


def possible_families(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the families to which a file of BEiT's layout may belong.

    One for a file with a mark, several for a fine-tuned BEiT. Marks: SimMIM pretrains inside `encoder.` and
    saves `max_accuracy`; BEiT v2 has layers for its class token; data2vec regresses features of its own width
    and shares its bias table, when fine-tuned too.
    """
    tensors = checkpoint.tensors
    is_other_eva = is_eva(tensors) and "pos_embed" not in tensors
    if not is_beit(tensors) or is_other_eva or not _is_from_trainer(checkpoint):
        return ()
    if "decoder.0.weight" in checkpoint.outside or "max_accuracy" in checkpoint.extras:
        return ("simmim",)
    if any(name.startswith("cls_pt_") for name in tensors):
        return ("beitv2",)
    shared = f"rel_pos_bias.{TABLE}" in tensors
    head = tensors.get("lm_head.weight")
    if head is not None:
        is_square = head.ndim == 2 and head.shape[0] == head.shape[1]
        return ("data2vec",) if shared and is_square else ("beit",)
    if shared and "mask_token" not in tensors and "head.weight" in tensors:
        return ("data2vec",)
    return FAMILIES if shared else ("beit", "beitv2", "simmim")


def _is_from_trainer(checkpoint: Checkpoint) -> bool:
    """Return whether a trainer saved the file: timm's are bare, without mask token and index."""
    marks = ("mask_token", f"rel_pos_bias.{INDEX_NAME}", f"blocks.0.attn.{INDEX_NAME}")
    wrapped = checkpoint.wrapper not in ("", "state_dict", "state_dict_ema")
    marked = any(mark in checkpoint.tensors for mark in marks)
    return (wrapped or marked) and not checkpoint.stated_spec


def read(checkpoint: Checkpoint) -> Translation:
    """Translate a BEiT, which has timm's names.

    Pixels are scaled to [-1, 1], unless the saved arguments state ImageNet's mean and std.
    """
    return read_as("beit", checkpoint)


def read_as(name: str, checkpoint: Checkpoint) -> Translation:
    """Translate a file of BEiT's layout as the family `name`; bias tables show heads and grid."""
    if not is_beit(checkpoint.tensors):
        raise UserError(
            f"{checkpoint.source} is no ViT of BEiT's layout",
            expected="blocks.N.attn.q_bias or a relative bias table",
        )
    result = keep_names(checkpoint.tensors, DROP)
    result.facts = infer_beit_facts(result.weights, checkpoint.source) | _read_preprocessing(checkpoint)
    result.assumed = family(name) | {"norm_eps": 1e-6}
    if "fc_norm.weight" in result.weights:
        result.assumed["pretrain_method"] += ", fine-tuned"
    elif "head.weight" in checkpoint.tensors:
        result.assumed["pretrain_method"] += ", fine-tuned"
        result.assumed["global_pool"] = "token"
    return result


def _read_preprocessing(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return mean and std from the trainer's arguments, where they were saved."""
    args = checkpoint.extras.get("args")
    if not isinstance(args, argparse.Namespace):
        return {}
    imagenet = vars(args).get("imagenet_default_mean_and_std")
    if not isinstance(imagenet, bool):
        return {}
    return IMAGENET if imagenet else HALF
