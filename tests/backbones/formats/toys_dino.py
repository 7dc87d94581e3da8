"""Toy files in the layout of facebookresearch/dino (main_dino.py, utils.MultiCropWrapper)."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.backbones.formats.plain_vit import encoder_shapes, mlp_head
from tests.backbones.formats.reference import Files, fill, prefixed


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    return fill(encoder_shapes(), seed)


def training() -> dict[str, Any]:
    """Only the student is wrapped for DDP: a ViT has no batch norm. Rates and decays are numpy scalars."""
    head = prefixed("head.", mlp_head("last_layer"))
    groups = [{"lr": np.float64(5e-4), "weight_decay": np.float64(0.04), "params": [0]}]
    return {
        "student": prefixed("module.", prefixed("backbone.", weights(1)) | head),
        "teacher": prefixed("backbone.", weights()) | head,
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}, "param_groups": groups},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_tiny", patch_size=8, out_dim=24, global_crops_scale=(0.4, 1.0)),
        "dino_loss": {"center": torch.zeros(1, 24)},
        "fp16_scaler": {"scale": 65536.0},
    }


def write(folder: Path) -> Files:
    torch.save(training(), folder / "checkpoint.pth")
    torch.save(training()["teacher"], folder / "teacher.pth")
    torch.save(weights(), folder / "dino_vittiny8_pretrain.pth")
    return {
        "teacher": (folder / "checkpoint.pth", {"weights": "teacher"}),
        "student": (folder / "checkpoint.pth", {"weights": "student"}),
        "only-teacher": (folder / "teacher.pth", {}),
        "published": (folder / "dino_vittiny8_pretrain.pth", {"format": "dino"}),
    }
