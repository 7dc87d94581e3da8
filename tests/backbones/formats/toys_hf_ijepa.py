"""Toy folders of transformers' I-JEPA, saved by its own classes."""

from pathlib import Path
from typing import Any

import torch
from transformers import IJepaConfig, IJepaForImageClassification, IJepaModel

from tests.backbones.formats.reference import Files, randomise, save_pretrained
from tests.backbones.formats.toys_hf_vit import SIZES

HEADS = 6


def models() -> dict[str, Any]:
    config = IJepaConfig(**SIZES | {"num_attention_heads": HEADS, "layer_norm_eps": 1e-6, "num_labels": 7})
    made = {"ijepa": IJepaModel(config), "classifier": IJepaForImageClassification(config)}
    return {name: randomise(model) for name, model in made.items()}


def write(folder: Path) -> Files:
    files = save_pretrained(folder, models())
    for name, model in models().items():
        torch.save(model.state_dict(), folder / f"{name}.pth")
        files[f"{name}.pth"] = (folder / f"{name}.pth", {"overrides": {"num_heads": HEADS}})
    return files
