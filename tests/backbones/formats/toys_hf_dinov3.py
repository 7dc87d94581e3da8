"""Toy folders of transformers' DINOv3ViTModel, saved by itself, and its state_dict in memory."""

from pathlib import Path
from typing import Any

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from tests.backbones.formats.reference import Files, randomise, save_pretrained

SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 64,
    "intermediate_size": 488,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"num_register_tokens": 4},
    "gated": {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
    "no-registers": {"rope_theta": 50.0, "layer_norm_eps": 1e-6},
    "key-bias": {"num_register_tokens": 2, "key_bias": True},
    "no-bias": {"num_register_tokens": 4, "query_bias": False, "value_bias": False, "num_attention_heads": 6},
}


def models() -> dict[str, Any]:
    return {
        name: randomise(DINOv3ViTModel(DINOv3ViTConfig(**SIZES | kind)), 7) for name, kind in KINDS.items()
    }


def write(folder: Path) -> Files:
    files = save_pretrained(folder, models())
    torch.save(models()["gated"].state_dict(), folder / "memory.pth")
    return files | {"memory": (folder / "memory.pth", {"overrides": {"img_size": [64, 64]}})}
