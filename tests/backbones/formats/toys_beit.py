"""Toy files of microsoft/unilm's beit (run_beit_pretraining.py, run_class_finetuning.py, utils.py)."""

import argparse
from pathlib import Path
from typing import Any

import torch

from tests.backbones.formats.beit_layout import encoder_shapes, weights
from tests.backbones.formats.reference import Files, pair

HEADS = pair("norm", 192) | pair("lm_head", 40, 192) | {"mask_token": (1, 1, 192)}
TUNED = pair("fc_norm", 192) | pair("head", 7, 192)
FILES = {
    "pretrained": weights(HEADS, positions="shared"),
    "pretrained-1k": weights(HEADS, positions="absolute", scales=False),
    "fine": weights(TUNED),
    "fine-cls": weights(pair("norm", 192) | pair("head", 7, 192)),
}


def training(model: dict[str, torch.Tensor], *, imagenet: bool) -> dict[str, Any]:
    return {
        "model": model,
        "optimizer": {
            "state": {0: {"step": 3, "exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 1e-3, "params": [0]}],
        },
        "epoch": 799,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(
            model="beit_toy", imagenet_default_mean_and_std=imagenet, rel_pos_bias=True
        ),
    }


def write(folder: Path) -> Files:
    torch.save({"model": FILES["pretrained"]}, folder / "pt22k.pth")
    torch.save(training(FILES["pretrained-1k"], imagenet=True), folder / "pt1k.pth")
    torch.save({"module": FILES["fine"]}, folder / "ft.pth")
    torch.save(training(FILES["fine-cls"], imagenet=False), folder / "cls.pth")
    return {
        "pretrained": (folder / "pt22k.pth", {}),
        "pretrained-1k": (folder / "pt1k.pth", {}),
        "fine": (folder / "ft.pth", {"format": "beit"}),
        "fine-cls": (folder / "cls.pth", {"format": "beit"}),
    }


def real_size(width: int, depth: int, side: int, heads: int, patch: int = 16) -> dict[str, Any]:
    shapes = encoder_shapes(width, depth, side, patch, heads, positions="shared")
    index = {"rel_pos_bias.relative_position_index": (side**2 + 1,) * 2}
    return {
        "model": shapes
        | index
        | pair("norm", width)
        | pair("lm_head", 8192, width)
        | {"mask_token": (1, 1, width)}
    }
