"""Toy files in the layout of facebookresearch/deit (models.py, main.py)."""

import argparse
from pathlib import Path

import torch

from tests.backbones.formats.plain_vit import WIDTH, encoder_shapes, linear
from tests.backbones.formats.reference import Files, fill


def weights(seed: int = 0, *, distilled: bool = False) -> dict[str, torch.Tensor]:
    return fill(encoder_shapes(tokens=("cls_token", "dist_token") if distilled else ("cls_token",)), seed)


def model(seed: int = 0, *, distilled: bool = False) -> dict[str, torch.Tensor]:
    heads = linear("head", WIDTH, 10) | (linear("head_dist", WIDTH, 10) if distilled else {})
    return weights(seed, distilled=distilled) | fill(heads)


def write(folder: Path) -> Files:
    """Published files hold only `model`; without a distillation token one looks like a fine-tuned MAE."""
    torch.save({"model": model()}, folder / "deit_tiny.pth")
    torch.save({"model": model(distilled=True)}, folder / "deit_tiny_distilled.pth")
    training = {
        "model": model(1),
        "optimizer": {"state": {}, "param_groups": [{"lr": 5e-4}]},
        "lr_scheduler": {"base_values": [5e-4], "metric": None},
        "epoch": 299,
        "model_ema": model(),
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="deit_tiny_patch16_224", distillation_type="none"),
    }
    torch.save(training, folder / "checkpoint.pth")
    return {
        "published": (folder / "deit_tiny.pth", {"format": "deit"}),
        "distilled": (folder / "deit_tiny_distilled.pth", {}),
        "training": (folder / "checkpoint.pth", {"weights": "model"}),
        "ema": (folder / "checkpoint.pth", {"weights": "model_ema"}),
    }
