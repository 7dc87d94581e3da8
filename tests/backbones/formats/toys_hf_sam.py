"""Toy folders of transformers' SAM, saved by its own classes."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    SamConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
    SamVisionModel,
)

from tests.backbones.formats.reference import Files, randomise, save_pretrained

VISION: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "mlp_dim": 96,
    "image_size": 80,
    "patch_size": 16,
    "output_channels": 16,
    "window_size": 3,
    "global_attn_indexes": [1, 3],
}


def models() -> dict[str, Any]:
    prompt = SamPromptEncoderConfig(hidden_size=16, image_size=80, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_dim=16, iou_head_hidden_dim=16
    )
    both = SamConfig(
        vision_config=SamVisionConfig(**VISION), prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    alone = SamVisionConfig(**VISION, layer_norm_eps=1e-5, hidden_act="quick_gelu")
    return {
        name: randomise(model)
        for name, model in {"vision": SamVisionModel(alone), "both": SamModel(both)}.items()
    }


def write(folder: Path) -> Files:
    files = save_pretrained(folder, models())
    torch.save(models()["both"].state_dict(), folder / "memory.pth")
    return files | {"memory": (folder / "memory.pth", {})}
