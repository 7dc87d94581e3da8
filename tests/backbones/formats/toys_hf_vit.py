"""Toy folders of transformers' ViT and DeiT, saved by its own classes."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from tests.backbones.formats.reference import Files, prefixed, randomise, save_pretrained

SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "image_size": 32,
    "patch_size": 8,
    "encoder_stride": 8,
}


def models() -> dict[str, Any]:
    made = {
        "vit": ViTModel(ViTConfig(**SIZES)),
        "bare": ViTModel(
            ViTConfig(**SIZES, qkv_bias=False, hidden_act="gelu_new", layer_norm_eps=1e-6),
            add_pooling_layer=False,
        ),
        "classifier": ViTForImageClassification(ViTConfig(**SIZES | {"num_labels": 7})),
        "masked": ViTForMaskedImageModeling(ViTConfig(**SIZES)),
        "deit": DeiTModel(DeiTConfig(**SIZES)),
        "teacher": DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES | {"num_labels": 7})),
    }
    return {name: randomise(model) for name, model in made.items()}


def write(folder: Path) -> Files:
    """Write each model as a folder, and its state_dict in memory where that is enough to detect it."""
    files = save_pretrained(folder, models())
    for name, model in models().items():
        if name != "bare":  # only its config states its options
            torch.save(prefixed("module.", model.state_dict()), folder / f"{name}.pth")
            files[f"{name}.pth"] = (folder / f"{name}.pth", {})
    plain = ViTModel(ViTConfig(**SIZES), add_pooling_layer=False)
    torch.save(randomise(plain).state_dict(), folder / "unmarked.pth")
    return files | {"unmarked.pth": (folder / "unmarked.pth", {"format": "hf_vit"})}
