"""Toy files in the layout of microsoft/SimMIM (main_simmim.py, main_finetune.py, utils.save_checkpoint)."""

from pathlib import Path
from typing import Any

import torch

from tests.backbones.formats.beit_layout import weights
from tests.backbones.formats.reference import Files, pair

FILES = {
    "pretrained": weights(pair("norm", 192) | {"mask_token": (1, 1, 192)}, positions="shared"),
    "fine": weights(pair("fc_norm", 192) | pair("head", 7, 192)),
}


def training(model: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Without `config`, a node of yacs."""
    return {
        "model": model,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "lr_scheduler": {"base_values": [1e-4], "warmup_t": 100},
        "max_accuracy": 0.0,
        "epoch": 799,
        "amp": {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 0}},
    }


def write(folder: Path) -> Files:
    pretrained = {f"encoder.{name}": tensor for name, tensor in FILES["pretrained"].items()}
    pretrained |= {"decoder.0.weight": torch.zeros(192, 192, 1, 1), "decoder.0.bias": torch.zeros(192)}
    torch.save(training(pretrained), folder / "ckpt_epoch_799.pth")
    torch.save(training(FILES["fine"]), folder / "ckpt_epoch_99.pth")
    torch.save({"model": FILES["fine"]}, folder / "stripped.pth")
    return {
        "pretrained": (folder / "ckpt_epoch_799.pth", {}),
        "fine": (folder / "ckpt_epoch_99.pth", {}),
        "stripped": (folder / "stripped.pth", {"format": "simmim"}),
    }
