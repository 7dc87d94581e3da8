"""Toy folders of transformers' SigLIP and SigLIP 2, saved by its own classes."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.backbones.formats.reference import Files, randomise, save_pretrained

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 99,
}
NAFLEX = ("naflex", "naflex-both")  # of 4 x 4 patches, like the others


def models() -> dict[str, Any]:
    fixed = SIZES | {"image_size": 36}  # 4 x 4 patches, and a rest that is not seen
    headless = SiglipVisionConfig(**fixed, vision_use_head=False, hidden_act="gelu", layer_norm_eps=1e-5)
    naflex = SIZES | {"num_patches": 16}
    twelve = fixed | {"num_attention_heads": 12}  # the class's default, which a nested config does not write
    classifier: Any = {"vision_config": fixed, "text_config": TEXT, "num_labels": 5}
    made = {
        "vision": SiglipVisionModel(SiglipVisionConfig(**fixed)),
        "headless": SiglipVisionModel(headless),
        "both": SiglipModel(SiglipConfig(vision_config=twelve, text_config=TEXT)),
        "classifier": SiglipForImageClassification(SiglipConfig(**classifier)),
        "naflex": Siglip2VisionModel(Siglip2VisionConfig(**naflex)),
        "naflex-both": Siglip2Model(Siglip2Config(vision_config=naflex, text_config=TEXT)),
    }
    return {name: randomise(model) for name, model in made.items()}


def write(folder: Path) -> Files:
    """Folders, and the state_dict as it is in memory next to its config."""
    made = models()
    files = save_pretrained(folder, made)
    for name, model in made.items():
        memory = folder / f"{name}_memory"
        memory.mkdir()
        torch.save(model.state_dict(), memory / "pytorch_model.bin")
        (memory / "config.json").write_text((folder / name / "config.json").read_text())
        files[memory.name] = (memory, {})
    for name in ("vision", "naflex"):
        torch.save(made[name].state_dict(), folder / f"{name}.bin")
        files[f"{name}_bare"] = (folder / f"{name}.bin", {"overrides": {"num_heads": 4}})
    return files
