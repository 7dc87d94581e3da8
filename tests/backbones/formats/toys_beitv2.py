"""Toy files of microsoft/unilm's beit2 folder (run_beitv2_pretraining.py, run_class_finetuning.py)."""

from pathlib import Path

import torch

from tests.backbones.formats.beit_layout import encoder_shapes, weights
from tests.backbones.formats.reference import Files, pair

CLS_LAYERS = {
    name.replace("blocks.", "cls_pt_layers."): shape
    for name, shape in encoder_shapes(positions="none").items()
    if name.startswith("blocks.")
}
HEADS = pair("norm", 192) | pair("lm_head", 40, 192) | {"mask_token": (1, 1, 192)} | CLS_LAYERS
FILES = {
    "pretrained": weights(HEADS, positions="shared"),
    "own-head": weights(
        HEADS | pair("cls_pt_norm", 192) | pair("cls_pt_lm_head", 40, 192), positions="shared"
    ),
    "fine": weights(pair("fc_norm", 192) | pair("head", 7, 192)),
}


def write(folder: Path) -> Files:
    for name, model in FILES.items():
        torch.save({"model": model}, folder / f"{name}.pth")
    return {name: (folder / f"{name}.pth", {"format": "beitv2"} if name == "fine" else {}) for name in FILES}
