"""Toy files of facebookresearch/SlowFast's MaskFeat for images (models/masked.py, utils/checkpoint.py)."""

from pathlib import Path

import torch

from tests.backbones.formats.plain_vit import PATCH, WIDTH, encoder_shapes, linear, norm
from tests.backbones.formats.reference import Files, Shapes, fill


def pretrained_shapes(width: int = WIDTH, depth: int = 2, size: int = 32, patch: int = PATCH) -> Shapes:
    """No final norm: it stands in the head, before 9 HOG bins of 3 channels for each cell of 8 x 8 pixels."""
    encoder = {
        name: shape
        for name, shape in encoder_shapes(width, depth, size, patch).items()
        if not name.startswith("norm.")
    }
    filters: Shapes = {"hogs.0.weight_x": (3, 1, 3, 3), "hogs.0.weight_y": (3, 1, 3, 3)}
    head = norm("pred_head.transforms.0.0", width) | linear(
        "pred_head.projections.0", width, 27 * (patch // 8) ** 2
    )
    return encoder | filters | head | {"mask_token": (1, 1, width)}


def weights(name: str) -> dict[str, torch.Tensor]:
    return fill(
        pretrained_shapes()
        if name == "pretrained"
        else encoder_shapes() | linear("head.projection", WIDTH, 10)
    )


def write(folder: Path) -> Files:
    configs = {
        "pretrained": "MASK:\n  PRED_HOG: true\n",
        "fine": "MVIT:\n  USE_MEAN_POOLING: true\n",
        "class-token": "MVIT:\n  USE_MEAN_POOLING: false\n",
    }
    for name, cfg in configs.items():
        rest = {
            "epoch": 1599,
            "optimizer_state": {"state": {}, "param_groups": [{"lr": 1e-3}]},
            "scaler_state": {"scale": 1.0},
        }
        torch.save({"model_state": weights(name), "cfg": cfg, **rest}, folder / f"{name}.pyth")
    return {name: (folder / f"{name}.pyth", {}) for name in configs}
