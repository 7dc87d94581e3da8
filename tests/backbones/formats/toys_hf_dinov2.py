"""Toy folders of transformers' DINOv2 models, saved by themselves, and a state_dict of one in memory."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
)

from tests.backbones.formats.reference import Files, randomise, save_pretrained

SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 56,
    "patch_size": 14,
}


def models() -> dict[str, Any]:
    plain, gated = Dinov2Config(**SIZES), Dinov2Config(**SIZES, use_swiglu_ffn=True, layerscale_value=0.5)
    registers = Dinov2WithRegistersConfig(**SIZES, layer_norm_eps=1e-5)
    made = {
        "plain": Dinov2Model(plain),
        "gated": Dinov2Model(gated),
        "no-bias": Dinov2Model(Dinov2Config(**SIZES, qkv_bias=False)),
        "classifier": Dinov2ForImageClassification(plain),
        "registers": Dinov2WithRegistersModel(registers),
        "registers-gated": Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, use_swiglu_ffn=True)),
        "registers-none": Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=0)),
        "registers-classifier": Dinov2WithRegistersForImageClassification(registers),
    }
    return {name: randomise(model, seed) for seed, (name, model) in enumerate(made.items())}


def write(folder: Path) -> Files:
    files = save_pretrained(folder, models())
    for name, model in models().items():
        torch.save(model.state_dict(), folder / f"{name}.pth")
        files[f"{name}-memory"] = (folder / f"{name}.pth", {})
    return files
