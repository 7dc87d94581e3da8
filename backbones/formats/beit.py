"""beit: files of microsoft/unilm's BEiT (pretrained, fine-tuned), whose layout BEiT v2, data2vec and SimMIM share."""

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
DROP = {
    INDEX: INDEX_REASON,
    r"head\.": HEAD,
    r"mask_token$": MASK_TOKEN,
    r"(cls_pt_)?lm_head\.": "predicts the visual tokens or features of the pretraining: no part of the backbone",
    r"cls_pt_layers\.": "layers that pretrain the class token of BEiT v2, behind an early block: no part of the backbone",
    r"cls_pt_norm\.": "norm behind the class token's pretraining layers: no part of the backbone",
}


def fits(checkpoint: Checkpoint) -> bool:
    """A ViT of BEiT's layout whose marks do not tell another family."""
    return "beit" in possible_families(checkpoint)


def possible_families(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The families that a file of BEiT's layout may be of: one where it bears a mark, several for a fine-tuned BEiT.

    Marks: SimMIM pretrains inside `encoder.` and saves `max_accuracy`; BEiT v2 has layers for its class token; data2vec
    regresses features of its own width and shares its bias table, when fine-tuned too.
    """
    tensors = checkpoint.tensors
    if (
        not is_beit(tensors)
        or (is_eva(tensors) and "pos_embed" not in tensors)
        or not _is_official(checkpoint)
    ):
        return ()
    if "decoder.0.weight" in checkpoint.outside or "max_accuracy" in checkpoint.extras:
        return ("simmim",)
    if any(name.startswith("cls_pt_") for name in tensors):
        return ("beitv2",)
    shared = f"rel_pos_bias.{TABLE}" in tensors
    if (head := tensors.get("lm_head.weight")) is not None:
        return ("data2vec",) if shared and head.ndim == 2 and head.shape[0] == head.shape[1] else ("beit",)
    if shared and "mask_token" not in tensors and "head.weight" in tensors:
        return ("data2vec",)
    return FAMILIES if shared else ("beit", "beitv2", "simmim")


def _is_official(checkpoint: Checkpoint) -> bool:
    """Whether a trainer saved it: timm's files of this layout are bare, and have neither mask token nor index."""
    marks = ("mask_token", f"rel_pos_bias.{INDEX_NAME}", f"blocks.0.attn.{INDEX_NAME}")
    own = checkpoint.wrapper not in ("", "state_dict", "state_dict_ema") or any(
        mark in checkpoint.tensors for mark in marks
    )
    return own and not checkpoint.stated_spec


def read(checkpoint: Checkpoint) -> Translation:
    """BEiT: timm has its names. Pixels are scaled to [-1, 1], unless the saved arguments say that ImageNet's mean was taken."""
    return read_as("beit", checkpoint)


def read_as(name: str, checkpoint: Checkpoint) -> Translation:
    """A file of BEiT's layout as the family `name`; heads and grid are told by the bias tables where there are any."""
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
        result.assumed |= {
            "global_pool": "token",
            "pretrain_method": result.assumed["pretrain_method"] + ", fine-tuned",
        }
    return result


def _read_preprocessing(checkpoint: Checkpoint) -> dict[str, Any]:
    """mean and std as the trainer's arguments say, where they were saved."""
    args = checkpoint.extras.get("args")
    told = vars(args).get("imagenet_default_mean_and_std") if isinstance(args, argparse.Namespace) else None
    if not isinstance(told, bool):
        return {}
    return IMAGENET if told else {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
