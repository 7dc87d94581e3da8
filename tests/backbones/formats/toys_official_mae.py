"""Toy files in the layout of facebookresearch/mae (models_mae.py, models_vit.py, main_*.py, util/misc.py)."""

import argparse
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.backbones.formats.plain_vit import (
    DEPTH,
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

DECODER = 16  # width


def decoder_shapes(width: int, decoder: int, depth: int, size: int, patch: int) -> Shapes:
    shapes: Shapes = {
        "mask_token": (1, 1, decoder),
        "decoder_pos_embed": (1, (size // patch) ** 2 + 1, decoder),
    }
    shapes |= linear("decoder_embed", width, decoder) | norm("decoder_norm", decoder)
    shapes |= linear("decoder_pred", decoder, patch * patch * 3)
    for i in range(depth):
        shapes |= {f"decoder_blocks.{i}.{name}": shape for name, shape in block_shapes(decoder).items()}
    return shapes


@cache
def models() -> dict[str, dict[str, torch.Tensor]]:
    """What `model` holds in each kind of file; not to be changed.

    fine: as main_finetune.py saves it (global pooling, fc_norm, a trained table); fine-cls: with --cls_token.
    probe: as main_linprobe.py saves it (BatchNorm without affine parameters, then a linear layer).
    """
    encoder = fill(encoder_shapes(WIDTH, DEPTH, SIZE, PATCH))
    encoder["pos_embed"] = sincos(WIDTH, SIZE // PATCH, down_first=False, class_row=True)
    head = fill(linear("head", WIDTH, 10), 2)
    trained = {**encoder, "pos_embed": encoder["pos_embed"] + fill({"table": (1, 17, WIDTH)}, 3)["table"]}
    fine = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t
        for name, t in trained.items()
    }
    batch_norm = {"head.0.running_mean": torch.zeros(WIDTH), "head.0.running_var": torch.ones(WIDTH)}
    batch_norm["head.0.num_batches_tracked"] = torch.tensor(7)
    return {
        "encoder": encoder,
        "full": {**encoder, **fill(decoder_shapes(WIDTH, DECODER, 1, SIZE, PATCH), 1)},
        "fine": {**fine, **head},
        "fine-cls": {**trained, **head},
        "probe": {
            **encoder,
            **batch_norm,
            "head.1.weight": head["head.weight"],
            "head.1.bias": head["head.bias"],
        },
        "classifier": {**encoder, **head},
    }


def training(name: str, **args: Any) -> dict[str, Any]:
    """What util/misc.py saves to go on from; every script of the repository has an argument `blr`."""
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    namespace = argparse.Namespace(blr=1.5e-4, resume="", gpu=0, **args)
    scaler = {"scale": 65536.0, "growth_factor": 2.0}
    return {"model": models()[name], "optimizer": optimizer, "epoch": 7, "scaler": scaler, "args": namespace}


def write(folder: Path) -> Files:
    """Write all files; fine-cls, fine-tuned with its class token, could be DeiT's without arguments."""
    contents: dict[str, Any] = {
        name: {"model": models()[name]} for name in ("encoder", "full", "fine", "fine-cls", "probe")
    }
    contents["checkpoint-7"] = training("full", model="mae_vit_toy", norm_pix_loss=True)
    contents["checkpoint-cls"] = training("fine-cls", model="vit_toy", global_pool=False)
    contents["ddp"] = {"model": prefixed("module.", models()["full"])}
    twice = {
        name: tensor * 2 if tensor.is_floating_point() else tensor
        for name, tensor in models()["fine"].items()
    }
    contents["ema"] = {"model": twice, "model_ema": models()["fine"]}
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pth")
    needed: dict[str, dict[str, Any]] = {
        "fine-cls": {"format": "official_mae"},
        "ema": {"weights": "model_ema"},
    }
    return {name: (folder / f"{name}.pth", needed.get(name, {})) for name in contents}
