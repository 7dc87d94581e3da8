"""Toy files of lightly's Lightning modules (benchmarks/imagenet/vitb16) and of lightly-train's exports."""

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
from tests.backbones.formats.reference import Files, fill, prefixed


def weights(seed: int = 0, *, scales: bool = False) -> dict[str, torch.Tensor]:
    return fill(encoder_shapes(scales=("ls1.gamma", "ls2.gamma") if scales else ()), seed)


def mae() -> dict[str, torch.Tensor]:
    """timm's classifier stays in the ViT; mask token and decoder stand beside it."""
    table = sincos(WIDTH, SIZE // PATCH, down_first=False, class_row=True)
    vit = weights() | fill(linear("head", WIDTH, 1000)) | {"pos_embed": table}
    block = {f"decoder.blocks.0.{name}": shape for name, shape in block_shapes(16).items()}
    decoder = fill(
        {
            "decoder.mask_token": (1, 1, 16),
            "decoder.pos_embed": (1, 17, 16),
            **block,
            **norm("decoder.norm", 16),
        }
    )
    heads = linear("decoder_embed", WIDTH, 16) | linear("prediction_head", 16, 192)
    heads |= linear("online_classifier.classification_head", WIDTH, 10)
    return (
        prefixed("backbone.vit.", vit)
        | {"backbone.mask_token": torch.zeros(1, 1, WIDTH)}
        | decoder
        | fill(heads)
    )


def dino() -> dict[str, torch.Tensor]:
    """`backbone` is the teacher."""
    last = {"last_layer.weight_g": (24, 1), "last_layer.weight_v": (24, 8)}
    head = fill(
        {**linear("layers.0", WIDTH, 16), **linear("layers.2", 16, 16), **linear("layers.4", 16, 8), **last}
    )
    state = prefixed("projection_head.", head) | prefixed("student_projection_head.", head)
    for name, seed in (("backbone", 0), ("student_backbone", 1)):
        state |= prefixed(f"{name}.vit.", weights(seed)) | {f"{name}.mask_token": torch.zeros(1, 1, WIDTH)}
    return state | {"criterion.center.center": torch.zeros(1, 1, 24)}


def train() -> dict[str, Any]:
    """lightly-train's DINO without the modules that its files pickle along."""
    state = fill({f"{name}_projection_head.last_layer.weight_v": (24, 8) for name in ("teacher", "student")})
    for name, seed in (("teacher", 0), ("student", 1)):
        state |= prefixed(f"{name}_embedding_model.wrapped_model._model.", weights(seed))
    described = {
        "version": "0.9.0",
        "normalize_args": {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]},
        "license_info": None,
    }
    return {"state_dict": state, "epoch": 99, "lightly_train": described}


def write(folder: Path) -> Files:
    layer_scale = prefixed("teacher_backbone.vit.", weights(scales=True)) | {
        "teacher_backbone.mask_token": torch.zeros(1, 1, WIDTH)
    }
    for name, state in (("mae", mae()), ("dino", dino()), ("ibot", layer_scale)):
        rest = {
            "epoch": 99,
            "global_step": 500,
            "pytorch-lightning_version": "2.4.0",
            "hyper_parameters": {"num_classes": 10},
        }
        torch.save(
            {"state_dict": state, **rest, "optimizer_states": [], "lr_schedulers": []},
            folder / f"{name}.ckpt",
        )
    torch.save(train(), folder / "last.ckpt")
    embedding = prefixed("wrapped_model._model.", weights() | fill(linear("head", WIDTH, 1000)))
    torch.save(
        embedding | fill({"embed_head.weight": (8, WIDTH, 1, 1), "embed_head.bias": (8,)}),
        folder / "embedding_model.pt",
    )
    return {
        "mae": (folder / "mae.ckpt", {}),
        "teacher": (folder / "dino.ckpt", {"weights": "backbone"}),
        "student": (folder / "dino.ckpt", {"weights": "student_backbone"}),
        "layer-scale": (folder / "ibot.ckpt", {}),
        "train": (folder / "last.ckpt", {"weights": "teacher_embedding_model"}),
        "embedding-model": (folder / "embedding_model.pt", {}),
    }
