"""Toy files of facebookresearch/data2vec_vision (beit/run_cyclical.py, beit/run_class_finetuning.py)."""

from pathlib import Path

import torch

from tests.backbones.formats.beit_layout import weights
from tests.backbones.formats.reference import Files, pair
from tests.backbones.formats.toys_beit import training

HEADS = pair("norm", 192) | pair("lm_head", 192, 192) | {"mask_token": (1, 1, 192)}
FILES = {
    "student": weights(HEADS, positions="shared"),
    "teacher": weights(HEADS, seed=1, positions="shared"),
    "fine": weights(pair("fc_norm", 192) | pair("head", 7, 192), positions="shared"),
}


def write(folder: Path) -> Files:
    """Pretraining saves student and teacher; DeepSpeed's fine-tuning saves `module`."""
    pretraining = training(FILES["student"], imagenet=True) | {"model_ema": FILES["teacher"]}
    torch.save(pretraining, folder / "checkpoint-799.pth")
    torch.save(
        {"module": FILES["fine"], "epoch": 99, "dp_world_size": 8}, folder / "mp_rank_00_model_states.pt"
    )
    return {
        "student": (folder / "checkpoint-799.pth", {"weights": "model"}),
        "teacher": (folder / "checkpoint-799.pth", {"weights": "model_ema"}),
        "fine": (folder / "mp_rank_00_model_states.pt", {}),
    }
