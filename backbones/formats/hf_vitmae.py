"""hf_vitmae: transformers' ViTMAEModel and ViTMAEForPreTraining, from save_pretrained."""

from pathlib import Path
from typing import Any

import torch

from backbones.reading.source import Checkpoint
from backbones.translating.hugging_face import (
    VIT,
    build_config,
    get_model_type,
    infer_model_type,
    is_hf_vit,
    note_missing_files,
    read_facts,
    write_folder,
)
from backbones.translating.translation import Translation, explain, require_plain_vit
from mae_bench.spec import BackboneSpec

DEFAULT_EPS = 1e-12  # of ViTMAEConfig; the reference trained with 1e-6
OUTSIDE = {r"(.*\.)?decoder\.": "decoder of the pretraining: not part of the backbone"}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has transformers' names, and a ViTMAE config or no mark of a ViT.

    Without either, files of ViT look the same.
    """
    if not is_hf_vit(checkpoint) or "embeddings.cls_token" not in checkpoint.tensors:
        return False
    model_type = get_model_type(checkpoint)
    return model_type == "vit_mae" if model_type else infer_model_type(checkpoint) != "vit"


def read(checkpoint: Checkpoint) -> Translation:
    """Translate the encoder: query, key and value are stacked; JSON files state eps, heads, mean, std."""
    result = VIT.read(checkpoint.tensors, checkpoint.source)
    result.outside = explain(checkpoint.outside, OUTSIDE)
    result.assumed = {"norm_eps": DEFAULT_EPS, "pretrain_method": "mae", "pretrain_data": "unknown"}
    result.facts = read_facts(checkpoint, DEFAULT_EPS)
    result.notes = note_missing_files(checkpoint, "ViTMAE", DEFAULT_EPS)
    if result.facts.get("norm_eps", DEFAULT_EPS) != 1e-6:
        result.notes.append("the reference trains with a LayerNorm eps of 1e-6; this file's own is used")
    return result


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """Write a folder that `ViTMAEModel.from_pretrained` loads."""
    require_plain_vit(spec, weights, "hf_vitmae", fc_norm=False)
    config = build_config(spec, "ViTMAEModel", "vit_mae")
    write_folder(out, VIT.write(weights), config, spec, provenance)
