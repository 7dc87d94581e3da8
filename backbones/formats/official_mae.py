"""official_mae: files of facebookresearch/mae (encoder, with decoder, fine-tuned, linear probe, training state)."""

from pathlib import Path
from typing import Any

import torch

from backbones.source import SPEC_KEY, Checkpoint
from backbones.translation import HEAD, Translation, is_sincos, is_vit, keep_names, require_plain
from mae_bench.files import write_atomic
from mae_bench.spec import BackboneSpec

DROP = {
    r"decoder_|mask_token$": "decoder of the pretraining: no part of the backbone",
    r"head\.": HEAD,
}


def fits(checkpoint: Checkpoint) -> bool:
    """Names of a timm ViT with MAE's decoder, or wrapped in `model` as the reference's scripts save them (others do so too)."""
    keys = checkpoint.tensors
    has_decoder = "mask_token" in keys and "decoder_embed.weight" in keys
    return is_vit(keys) and (has_decoder or checkpoint.wrapper == "model")


def is_marked(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether something tells MAE's file from anyone's ViT: its fixed position table, or a head of its transfers."""
    if "head.0.running_mean" in tensors or "fc_norm.weight" in tensors:
        return True
    return "pos_embed" in tensors and is_sincos(tensors["pos_embed"])


def read(checkpoint: Checkpoint) -> Translation:
    """The encoder keeps its names; decoder and head are dropped. eps 1e-6 and the mean and std of ImageNet are in its code."""
    result = keep_names(checkpoint.tensors, DROP)
    result.assumed = {
        "norm_eps": 1e-6,
        "pretrain_method": "mae, fine-tuned" if fine_tuned(checkpoint.tensors) else "mae",
        "pretrain_data": "unknown",
    }
    if "fc_norm.weight" in result.weights:
        result.assumed["global_pool"] = "avg"
    return result


def fine_tuned(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the encoder was trained with labels; a probe's head (head.1 behind a BatchNorm) leaves it as it was."""
    return "head.weight" in tensors


def write(weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]) -> None:
    """`{"model": weights, "spec": ..., "provenance": ...}`; the reference's scripts read `model` alone."""
    require_plain(spec, weights, "official_mae", fc_norm=True)
    content = {"model": weights, SPEC_KEY: spec.to_dict(), "provenance": provenance}
    write_atomic(out, lambda file: torch.save(content, file))
