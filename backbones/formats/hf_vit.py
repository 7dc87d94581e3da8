"""hf_vit: transformers' ViT and DeiT, with and without heads, from save_pretrained."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from backbones.families import family
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
from backbones.translating.translation import HEAD, MASK_TOKEN, Translation, explain, require_plain_vit
from mae_bench.spec import BackboneSpec

DEFAULT_EPS = 1e-12  # of ViTConfig and DeiTConfig
DISTILLATION = "embeddings.distillation_token"
NAMES = replace(
    VIT,
    top={**VIT.top, DISTILLATION: "reg_token"},  # the second prefix token, like a register with a position
    drop={
        r"pooler\.": "pooler: a layer on the class token in front of a classifier",
        r"embeddings\.mask_token$": MASK_TOKEN,
    },
)
OUTSIDE = {
    r".*classifier\.": HEAD,
    r"(.*\.)?decoder\.": "decoder of a masked-image pretraining: not part of the backbone",
}


def fits(checkpoint: Checkpoint) -> bool:
    """Return whether the file has transformers' names, and a ViT or DeiT config or what ViTMAE lacks.

    Without either, files of ViTMAE look the same.
    """
    if not is_hf_vit(checkpoint) or "embeddings.cls_token" not in checkpoint.tensors:
        return False
    model_type = get_model_type(checkpoint)
    return model_type in ("vit", "deit") if model_type else infer_model_type(checkpoint) != "vit_mae"


def read(checkpoint: Checkpoint) -> Translation:
    """Translate a ViT or DeiT: query, key and value are stacked; DeiT's distillation token is a register."""
    result = NAMES.read(checkpoint.tensors, checkpoint.source)
    result.outside = explain(checkpoint.outside, OUTSIDE)
    name = "deit" if DISTILLATION in checkpoint.tensors else "hf_vit"
    result.assumed = {"norm_eps": DEFAULT_EPS} | family(name)
    result.family = "hf_vit, distilled" if name == "deit" else ""
    result.facts = read_facts(checkpoint, DEFAULT_EPS)
    result.notes = note_missing_files(checkpoint, "ViT", DEFAULT_EPS)
    return result


def write(
    weights: dict[str, torch.Tensor], spec: BackboneSpec, out: Path, provenance: dict[str, Any]
) -> None:
    """Write a folder that `ViTModel.from_pretrained` loads (its pooler is new).

    With one register it is written for `DeiTModel`.
    """
    is_deit = "reg_token" in weights and spec.num_prefix_tokens == 2
    require_plain_vit(
        replace(spec, num_prefix_tokens=1) if is_deit else spec, weights, "hf_vit", fc_norm=False
    )
    config = build_config(spec, "DeiTModel", "deit") if is_deit else build_config(spec, "ViTModel", "vit")
    write_folder(out, NAMES.write(weights), config, spec, provenance)
