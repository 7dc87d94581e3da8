"""official_mae: facebookresearch/mae (encoder, with decoder, fine-tuned, linear probe, training state)."""

from pathlib import Path
from typing import Any

import torch

from backbones.formats import deit, moco_v3
from backbones.reading.source import PROVENANCE_KEY, SPEC_KEY, Checkpoint
from backbones.translating.translation import (
    HEAD,
    Translation,
    is_plain_vit,
    is_sincos,
    read_timm_vit,
    require_plain_vit,
)
from mae_bench.files import write_atomic
from mae_bench.spec import BackboneSpec

DROP = {
    r"decoder_|mask_token$": "pretraining decoder: not part of the backbone",
    r"head\.": HEAD,
}
WRAPPERS = ("model", "model_ema")
MAE_LITE = {"start_epoch", "best_top1", "best_top5", "best_top1_epoch"}  # what its trainer saves with `model`


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether a plain ViT has MAE's decoder, or its wrapper without another family's mark."""
    keys = checkpoint.tensors
    if not is_plain_vit(keys, r"fc_norm\.", *DROP) or not {"cls_token", "pos_embed"} <= set(keys):
        return False
    if "mask_token" in keys and "decoder_embed.weight" in keys:
        return True
    return checkpoint.wrapper in WRAPPERS and not deit.is_marked(checkpoint) and not moco_v3.fits(checkpoint)


def is_marked(checkpoint: Checkpoint) -> bool:
    """Return whether a file of a plain ViT has a mark of MAE.

    Marks: its fixed position embedding, a head of its transfers, its arguments, or the spec that `write`
    adds.
    """
    keys = checkpoint.tensors
    if "head.0.running_mean" in keys or "fc_norm.weight" in keys:
        return True
    if hasattr(checkpoint.extras.get("args"), "blr") or checkpoint.stated_spec:
        return True
    return "pos_embed" in keys and is_sincos(keys["pos_embed"])


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the encoder, which has timm's names."""
    result = read_timm_vit(checkpoint, "official_mae", DROP)
    if is_mae_lite(checkpoint):
        result.family = "mae_lite"
    if is_fine_tuned(checkpoint.tensors):
        result.assumed["pretrain_method"] = "mae, fine-tuned"
    if "fc_norm.weight" in result.weights:
        result.assumed["global_pool"] = "avg"
    return result


def is_mae_lite(checkpoint: Checkpoint) -> bool:
    """Return whether wangsr126/MAE-Lite pretrained or fine-tuned the model, which has heads of its own.

    Its trainer also takes timm's models, which have neither a decoder nor a norm after the pooling.
    """
    own = {"decoder_embed.weight", "fc_norm.weight"} & set(checkpoint.tensors)
    return bool(own) and set(checkpoint.extras) >= MAE_LITE


def is_fine_tuned(tensors: dict[str, torch.Tensor]) -> bool:
    """Return whether the encoder was trained with labels, unlike under a linear probe (head.1)."""
    return "head.weight" in tensors


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """Write `{"model": weights, "spec": ..., "provenance": ...}`; the authors' scripts read `model`."""
    require_plain_vit(spec, weights, "official_mae", fc_norm=True)
    content = {"model": weights, SPEC_KEY: spec.to_dict(), PROVENANCE_KEY: provenance}
    write_atomic(out, lambda file: torch.save(content, file))
