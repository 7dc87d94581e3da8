"""Toy folders and files of transformers' BEiT and data2vec vision models, by their own save_pretrained."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    BeitForMaskedImageModeling,
    BeitForSemanticSegmentation,
    BeitModel,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    Data2VecVisionModel,
)

from tests.backbones.formats.reference import Files, randomise

SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "image_size": 32,
    "patch_size": 8,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "model": (BeitModel, BeitConfig, {"use_relative_position_bias": True}),
    "token": (BeitModel, BeitConfig, {"use_shared_relative_position_bias": True, "use_mean_pooling": False}),
    "absolute": (
        BeitModel,
        BeitConfig,
        {"use_absolute_position_embeddings": True, "use_mean_pooling": False},
    ),
    "masked": (
        BeitForMaskedImageModeling,
        BeitConfig,
        {"use_shared_relative_position_bias": True, "use_mask_token": True},
    ),
    "masked-token": (
        BeitForMaskedImageModeling,
        BeitConfig,
        {"use_shared_relative_position_bias": True, "use_mask_token": True, "use_mean_pooling": False},
    ),
    "classifier": (BeitForImageClassification, BeitConfig, {"use_relative_position_bias": True}),
    "data2vec": (
        Data2VecVisionModel,
        Data2VecVisionConfig,
        {"use_shared_relative_position_bias": True, "use_mean_pooling": False},
    ),
    "data2vec-classifier": (
        Data2VecVisionForImageClassification,
        Data2VecVisionConfig,
        {"use_shared_relative_position_bias": True},
    ),
    # Mean pooling without the pooler, whose norm is the last one
    "no-pooler": (
        partial(BeitModel, add_pooling_layer=False),
        BeitConfig,
        {"use_relative_position_bias": True},
    ),
    "segmentation": (
        BeitForSemanticSegmentation,
        BeitConfig,
        {"use_relative_position_bias": True, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    ),
    "data2vec-no-pooler": (
        Data2VecVisionModel,
        Data2VecVisionConfig,
        {"use_shared_relative_position_bias": True},
    ),
}


def build(name: str) -> Any:
    model, config, options = MODELS[name]
    return randomise(model(config(**SIZES | {"layer_norm_eps": 1e-6} | options)))


def write(folder: Path) -> Files:
    """Folders, and the state_dict as it is in memory."""
    files: Files = {}
    for name in MODELS:
        model = build(name)
        model.save_pretrained(folder / name)
        files[name] = (folder / name, {})
        torch.save(model.state_dict(), folder / f"{name}.bin")
        files[f"{name}-memory"] = (folder / f"{name}.bin", {})
    return files
