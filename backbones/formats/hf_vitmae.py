"""hf_vitmae: transformers' ViTMAEModel and ViTMAEForPreTraining, as their save_pretrained writes them."""

from pathlib import Path
from typing import Any

import torch

from backbones.reading.source import CONFIG_FILE, PREPROCESSOR_FILE, Checkpoint
from backbones.translating.hugging_face import (
    VIT,
    build_config,
    build_processor_config,
    get_model_type,
    infer_model_type,
    is_hf_vit,
    note_missing_files,
    read_facts,
)
from backbones.translating.translation import Translation, require_plain_vit
from backbones.writing import write_safetensors
from mae_bench.files import write_json
from mae_bench.spec import BackboneSpec

DEFAULT_EPS = 1e-12  # of ViTMAEConfig; the reference trained with 1e-6
DECODER = "decoder of the pretraining: no part of the backbone"


def fits(checkpoint: Checkpoint) -> bool:
    """transformers' names with its ViTMAE config, or without what marks a ViT; without either, ViT's files look alike."""
    if not is_hf_vit(checkpoint) or "embeddings.cls_token" not in checkpoint.tensors:
        return False
    told = get_model_type(checkpoint)
    return told == "vit_mae" if told else infer_model_type(checkpoint) != "vit"


def read(checkpoint: Checkpoint) -> Translation:
    """Query, key and value are stacked to qkv; the decoder is dropped; eps, heads, mean and std come from the JSON files."""
    result = VIT.read(checkpoint.tensors, checkpoint.source)
    result.outside = dict.fromkeys(
        (name for name in checkpoint.outside if ".decoder." in f".{name}"), DECODER
    )
    result.assumed = {"norm_eps": DEFAULT_EPS, "pretrain_method": "mae", "pretrain_data": "unknown"}
    result.facts = read_facts(checkpoint, DEFAULT_EPS)
    result.notes = note_missing_files(checkpoint, "ViTMAE", DEFAULT_EPS)
    if result.facts.get("norm_eps", DEFAULT_EPS) != 1e-6:
        result.notes.append("the reference trains with a LayerNorm eps of 1e-6; this file's own is followed")
    return result


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """A folder that `ViTMAEModel.from_pretrained` loads; its tensors' metadata carry spec and provenance."""
    require_plain_vit(spec, weights, "hf_vitmae", fc_norm=False)
    config = build_config(spec, "ViTMAEModel", "vit_mae")
    write_safetensors(out / "model.safetensors", VIT.write(weights), spec, provenance)
    write_json(out / PREPROCESSOR_FILE, build_processor_config(spec))
    write_json(out / CONFIG_FILE, config)
