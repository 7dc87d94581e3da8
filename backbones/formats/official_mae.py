"""official_mae: files of facebookresearch/mae (encoder, with decoder, fine-tuned, linear probe, training state)."""

from pathlib import Path
from typing import Any

import torch

from backbones.formats import deit, moco_v3
from backbones.reading.source import SPEC_KEY, Checkpoint
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
    r"decoder_|mask_token$": "decoder of the pretraining: no part of the backbone",
    r"head\.": HEAD,
}
WRAPPERS = ("model", "model_ema")


def fits(checkpoint: Checkpoint) -> bool:
    """Names of its ViT with MAE's decoder, or wrapped as its scripts (and others') save them, with no other family's mark."""
    keys = checkpoint.tensors
    if not is_plain_vit(keys, r"fc_norm\.", *DROP) or not {"cls_token", "pos_embed"} <= set(keys):
        return False
    if "mask_token" in keys and "decoder_embed.weight" in keys:
        return True
    return checkpoint.wrapper in WRAPPERS and not deit.is_marked(checkpoint) and not moco_v3.fits(checkpoint)


def is_marked(checkpoint: Checkpoint) -> bool:
    """Whether something tells MAE's file from anyone's ViT: its fixed position table, a head of its transfers, its arguments,
    the spec that `write` adds."""
    keys = checkpoint.tensors
    if (
        "head.0.running_mean" in keys
        or "fc_norm.weight" in keys
        or hasattr(checkpoint.extras.get("args"), "blr")
    ):
        return True
    if checkpoint.stated_spec:
        return True
    return "pos_embed" in keys and is_sincos(keys["pos_embed"])


def read(checkpoint: Checkpoint) -> Translation:
    """The encoder keeps its names; decoder and head are dropped."""
    result = read_timm_vit(checkpoint, "official_mae", DROP)
    if is_fine_tuned(checkpoint.tensors):
        result.assumed["pretrain_method"] = "mae, fine-tuned"
    if "fc_norm.weight" in result.weights:
        result.assumed["global_pool"] = "avg"
    return result


def is_fine_tuned(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the encoder was trained with labels; a probe's head (head.1 behind a BatchNorm) leaves it as it was."""
    return "head.weight" in tensors


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """`{"model": weights, "spec": ..., "provenance": ...}`; the reference's scripts read `model` alone."""
    require_plain_vit(spec, weights, "official_mae", fc_norm=True)
    content = {"model": weights, SPEC_KEY: spec.to_dict(), "provenance": provenance}
    write_atomic(out, lambda file: torch.save(content, file))
