"""Toy files in the layout of bytedance/ibot (main_ibot.py, models/head.py, extract_backbone_weights.py)."""

import argparse
from pathlib import Path

import torch

from tests.backbones.formats.plain_vit import WIDTH, encoder_shapes, mlp_head
from tests.backbones.formats.reference import Files, fill, prefixed


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    return fill(encoder_shapes(), seed)


def write(folder: Path) -> Files:
    """The student alone is masked. A head that serves both losses is saved under both names."""
    head = prefixed("head.", mlp_head("last_layer", "last_layer2"))
    student = {**weights(1), "masked_embed": torch.zeros(1, WIDTH)}
    training = {
        "student": prefixed("module.", prefixed("backbone.", student) | head),
        "teacher": prefixed("backbone.", weights()) | head,
        "optimizer": {"state": {}, "param_groups": [{"lr": 5e-4}]},
        "epoch": 800,
        "args": argparse.Namespace(arch="vit_tiny", use_masked_im_modeling=True, pred_ratio=[0.0, 0.3]),
        "ibot_loss": {"center": torch.zeros(1, 24), "center2": torch.zeros(1, 1, 24)},
        "fp16_scaler": {"scale": 65536.0},
    }
    torch.save(training, folder / "checkpoint.pth")
    torch.save({"state_dict": weights()}, folder / "checkpoint_teacher.pth")
    torch.save({"state_dict": student}, folder / "checkpoint_student.pth")
    scaled = fill(encoder_shapes(scales=("gamma_1", "gamma_2"))) | {"masked_embed": torch.zeros(1, WIDTH)}
    torch.save({"state_dict": scaled}, folder / "checkpoint_scaled.pth")
    return {
        "teacher": (folder / "checkpoint.pth", {"weights": "teacher"}),
        "student": (folder / "checkpoint.pth", {"weights": "student"}),
        "extracted-teacher": (folder / "checkpoint_teacher.pth", {"format": "ibot"}),
        "extracted-student": (folder / "checkpoint_student.pth", {}),
        "layer-scale": (folder / "checkpoint_scaled.pth", {}),
    }
