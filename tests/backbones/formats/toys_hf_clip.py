"""Toy folders of transformers' CLIP, saved by its own classes."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from tests.backbones.formats.reference import randomise

VISION: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8, "projection_dim": 24,
}  # fmt: skip
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 99,
}


def models() -> dict[str, Any]:
    gelu = CLIPVisionConfig(**VISION, hidden_act="gelu", layer_norm_eps=1e-6)
    twelve = VISION | {
        "num_attention_heads": 12
    }  # a nested config does not write what is the class's default
    both = CLIPConfig(vision_config=twelve, text_config=TEXT, projection_dim=24)
    made = {
        "vision": CLIPVisionModel(CLIPVisionConfig(**VISION)),
        "gelu": CLIPVisionModelWithProjection(gelu),
        "both": CLIPModel(both),
    }
    return {name: randomise(model) for name, model in made.items()}


def write(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    files: dict[str, tuple[Path, dict[str, Any]]] = {}
    for name, model in models().items():
        model.save_pretrained(folder / name)
        memory = folder / f"{name}_memory"
        memory.mkdir()
        torch.save(model.state_dict(), memory / "pytorch_model.bin")
        (memory / "config.json").write_text((folder / name / "config.json").read_text())
        files |= {name: (folder / name, {}), memory.name: (memory, {})}
    older = {f"vision_model.{name}": tensor for name, tensor in models()["vision"].state_dict().items()}
    older["vision_model.embeddings.position_ids"] = torch.arange(17)[
        None
    ]  # as files of transformers before 4.31 have them
    torch.save(older, folder / "older.bin")
    told = {"num_heads": 4, "options": {"act_layer": "quick_gelu"}}
    return files | {"older": (folder / "older.bin", {"overrides": told})}
