"""hf_vit: transformers' ViT and DeiT, with and without heads, as their save_pretrained writes them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from backbones.families import family
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
from backbones.translating.naming import Naming
from backbones.translating.translation import HEAD, Translation, require_plain_vit
from backbones.writing import write_safetensors
from mae_bench.files import write_json
from mae_bench.spec import BackboneSpec

DEFAULT_EPS = 1e-12  # of ViTConfig and DeiTConfig
DISTILLATION = "embeddings.distillation_token"
DECODER = "decoder of a masked-image pretraining: no part of the backbone"
NAMES = Naming(
    {
        **VIT.top,
        DISTILLATION: "reg_token",
    },  # the second prefix token: attended to like a register, with its row in the table
    VIT.block,
    VIT.blocks,
    VIT.qkv,
    drop={
        r"pooler\.": "pooler: a layer on the class token in front of a classifier",
        r"embeddings\.mask_token$": "mask token of a masked-image pretraining: no part of the backbone",
    },
)


def fits(checkpoint: Checkpoint) -> bool:
    """transformers' names with its ViT or DeiT config, or with what ViTMAE lacks; without either, ViTMAE's files look alike."""
    if not is_hf_vit(checkpoint) or "embeddings.cls_token" not in checkpoint.tensors:
        return False
    told = get_model_type(checkpoint)
    return told in ("vit", "deit") if told else infer_model_type(checkpoint) != "vit_mae"


def read(checkpoint: Checkpoint) -> Translation:
    """Query, key and value are stacked to qkv; pooler and classifiers are dropped; DeiT's distillation token is a register."""
    result = NAMES.read(checkpoint.tensors, checkpoint.source)
    result.outside = {name: HEAD for name in checkpoint.outside if "classifier." in name}
    result.outside |= dict.fromkeys(
        (name for name in checkpoint.outside if ".decoder." in f".{name}"), DECODER
    )
    result.assumed = {"norm_eps": DEFAULT_EPS} | family(
        "deit" if DISTILLATION in checkpoint.tensors else "hf_vit"
    )
    result.facts = read_facts(checkpoint, DEFAULT_EPS)
    result.notes = note_missing_files(checkpoint, "ViT", DEFAULT_EPS)
    return result


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """A folder that `ViTModel.from_pretrained` loads (its pooler is new), with one register `DeiTModel.from_pretrained`; its
    tensors' metadata carry spec and provenance."""
    is_deit = "reg_token" in weights and spec.num_prefix_tokens == 2
    require_plain_vit(
        replace(spec, num_prefix_tokens=1) if is_deit else spec, weights, "hf_vit", fc_norm=False
    )
    config = build_config(spec, "DeiTModel", "deit") if is_deit else build_config(spec, "ViTModel", "vit")
    write_safetensors(out / "model.safetensors", NAMES.write(weights), spec, provenance)
    write_json(out / PREPROCESSOR_FILE, build_processor_config(spec))
    write_json(out / CONFIG_FILE, config)
