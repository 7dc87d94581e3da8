"""Toy files in the layout of facebookresearch/ijepa (src/train.py, src/models/vision_transformer.py)."""

from pathlib import Path
from typing import Any

import torch

from tests.backbones.formats.plain_vit import (
    PATCH,
    SIZE,
    WIDTH,
    block_shapes,
    encoder_shapes,
    linear,
    norm,
    sincos,
)
from tests.backbones.formats.reference import Files, Shapes, fill, prefixed


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    table = sincos(WIDTH, SIZE // PATCH, down_first=False, class_row=False)
    return {**fill(encoder_shapes(tokens=()), seed), "pos_embed": table}


def predictor_shapes(width: int = 16) -> Shapes:
    shapes: Shapes = linear("predictor_embed", WIDTH, width) | {
        "mask_token": (1, 1, width),
        "predictor_pos_embed": (1, 16, width),
    }
    shapes |= {f"predictor_blocks.0.{name}": shape for name, shape in block_shapes(width).items()}
    return shapes | norm("predictor_norm", width) | linear("predictor_proj", width, WIDTH)


def training() -> dict[str, Any]:
    """All three networks are wrapped for DDP."""
    return {
        "encoder": prefixed("module.", weights(1)),
        "predictor": prefixed("module.", fill(predictor_shapes())),
        "target_encoder": prefixed("module.", weights()),
        "opt": {"state": {}, "param_groups": [{"lr": 1e-3, "WD_exclude": True}]},
        "scaler": None,
        "epoch": 300,
        "loss": 0.1,
        "batch_size": 128,
        "world_size": 16,
        "lr": 1e-3,
    }


def write(folder: Path) -> Files:
    torch.save(training(), folder / "latest.pth.tar")
    torch.save({"target_encoder": training()["target_encoder"]}, folder / "only-target.pth")
    return {
        "target": (folder / "latest.pth.tar", {"weights": "target_encoder"}),
        "context": (folder / "latest.pth.tar", {"weights": "encoder"}),
        "only-target": (folder / "only-target.pth", {"format": "ijepa"}),
    }
