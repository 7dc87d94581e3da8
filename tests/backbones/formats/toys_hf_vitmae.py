"""Toy folders of transformers' ViTMAE, saved by its own classes."""

from pathlib import Path
from typing import Any

import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from tests.backbones.formats.reference import Files, randomise, save_pretrained
from tests.backbones.formats.toys_hf_vit import SIZES


def models() -> dict[str, Any]:
    config = ViTMAEConfig(
        **SIZES,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        layer_norm_eps=1e-6,
        mask_ratio=0.0,
    )
    made = {"encoder": ViTMAEModel(config), "full": ViTMAEForPreTraining(config)}
    return {name: randomise(model) for name, model in made.items()}


def write(folder: Path) -> Files:
    """In memory the encoder looks like a ViT's: its random position embedding is no mark of MAE."""
    files = save_pretrained(folder, models())
    for name, model in models().items():
        torch.save(model.state_dict(), folder / f"{name}.pth")
        files[f"{name}.pth"] = (folder / f"{name}.pth", {"format": "hf_vitmae"} if name == "encoder" else {})
    return files
