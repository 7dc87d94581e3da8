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

from tests.backbones.formats.reference import Files, prefixed, randomise, save_pretrained

VISION: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 24,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 99,
}


def models() -> dict[str, Any]:
    gelu = CLIPVisionConfig(**VISION, hidden_act="gelu", layer_norm_eps=1e-6)
    twelve = VISION | {"num_attention_heads": 12}  # the class's default, which a nested config does not write
    both = CLIPConfig(vision_config=twelve, text_config=TEXT, projection_dim=24)
    made = {
        "vision": CLIPVisionModel(CLIPVisionConfig(**VISION)),
        "gelu": CLIPVisionModelWithProjection(gelu),
        "both": CLIPModel(both),
    }
    return {name: randomise(model) for name, model in made.items()}


def write(folder: Path) -> Files:
    files = save_pretrained(folder, models())
    for name, model in models().items():
        memory = folder / f"{name}_memory"
        memory.mkdir()
        torch.save(model.state_dict(), memory / "pytorch_model.bin")
        (memory / "config.json").write_text((folder / name / "config.json").read_text())
        files[memory.name] = (memory, {})
    older = prefixed("vision_model.", models()["vision"].state_dict())
    # Files of transformers before 4.31 have position_ids.
    older["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save(older, folder / "older.bin")
    told = {"num_heads": 4, "options": {"act_layer": "quick_gelu"}}
    return files | {"older": (folder / "older.bin", {"overrides": told})}
